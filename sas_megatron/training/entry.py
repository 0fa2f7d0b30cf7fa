"""Entry points of training: check a run without importing torch, and train it.

`train` checks the run first, so that user errors are reported before torch and Megatron-core are imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sas_megatron.checkpoint.manifest import find_checkpoints
from sas_megatron.checkpoint.weights_source import find_weights
from sas_megatron.config.run import RunConfig
from sas_megatron.data.epochs import check_repetition
from sas_megatron.data.token_files import open_token_files
from sas_megatron.data.validation_sets import check_validation_sets
from sas_megatron.fault_tolerance.final_report import TRAINING
from sas_megatron.fault_tolerance.stop_request import RunExit, StopRequest
from sas_megatron.platform.launcher import is_first_on_node, is_rank0, launched_world_size
from sas_megatron.tracking.tracker import check_installed
from sas_megatron.training.resuming import find_branch
from sas_megatron.training.run_files import RunFiles

# (name of the GPU, dtype) -> peak FLOP/s, or None if it is unknown.
PeakLookup = Callable[[str, str], float | None]


def check_run(config: RunConfig, *, world_size: int) -> None:
    """Check config, data, layout and run directory, without torch and without writing to disk.

    Raises:
        UserError: One of them is invalid, or they do not fit together.
    """
    config.check_world_size(world_size)
    open_token_files(config.data, vocab_size=config.model.vocab_size, verify=is_first_on_node())
    check_validation_sets(config, verify=is_first_on_node())
    check_repetition(config)
    check_installed(config.logging.trackers)
    RunFiles.check_directory(config)
    if config.checkpoint.resume is not False and find_checkpoints(RunFiles.checkpoints(config)):
        return
    if config.checkpoint.initial_weights is not None:
        find_weights(Path(config.checkpoint.initial_weights), config)
    find_branch(config)


def train(config: RunConfig, *, find_peak_flops: PeakLookup = lambda _gpu, _dtype: None) -> RunExit:
    """Train on this rank until the run ends or is stopped; its files are in `logging.run_directory`.

    Args:
        config: The run.
        find_peak_flops: Looks up the peak of a GPU for the logged MFU.

    Returns:
        The reason why training ended, with the exit status for the process.

    Raises:
        UserError: As in `check_run`.
        TrainingFault: A finding of the health checks ends the run.
    """
    world_size = launched_world_size()
    with StopRequest(
        after_seconds=config.training.stop_after_seconds, world_size=world_size, logs=is_rank0()
    ) as stop:
        check_run(config, world_size=world_size)
        from sas_megatron.platform.device import prepare_device
        from sas_megatron.platform.gpu_settings import apply_gpu_settings

        apply_gpu_settings(config.training)
        # This precedes the import of Megatron-core, which on a CPU needs the replacements for CUDA calls.
        device = prepare_device()

        import torch

        from sas_megatron.distributed.shared_directory import check_directory_is_shared
        from sas_megatron.distributed.topology import joined_topology
        from sas_megatron.training.loop import Run

        peak_flops = None
        if device.type == "cuda":
            peak_flops = find_peak_flops(torch.cuda.get_device_name(device), config.training.precision)
        with joined_topology(
            config.parallel,
            device=device,
            seed=config.training.seed,
            timeout_minutes=config.training.collective_timeout_minutes,
            handles_signal=stop.handle_signal,
            flight_records=RunFiles(config).directory / "flight_recorder",
            activity=TRAINING,
        ) as topology:
            check_directory_is_shared(Path(config.logging.run_directory))
            return Run(config, topology, stop, peak_flops=peak_flops).complete()
