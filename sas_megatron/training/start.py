"""From a config to a running rank: what the user can mend is found before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from sas_megatron.checkpoint.manifest import find_checkpoints
from sas_megatron.checkpoint.weights_source import find_weights
from sas_megatron.config.run import RunConfig
from sas_megatron.data.opening import open_token_files
from sas_megatron.platform.launcher import is_rank0, launched_world_size
from sas_megatron.training.continuation import find_branch
from sas_megatron.training.run_files import RunFiles
from sas_megatron.training.stopping import Ending, StopRequest


def check(config: RunConfig, *, world_size: int) -> None:
    """Finds what the user can mend, without torch, and leaves nothing on disk.

    Raises:
        UserError: something in config, data, layout or run directory does not fit.
    """
    config.check_world_size(world_size)
    open_token_files(config.data, vocab_size=config.model.vocab_size, verify=is_rank0())
    RunFiles.check_directory(config)
    goes_on = config.checkpoint.resume and find_checkpoints(RunFiles.checkpoints(config))
    if goes_on:
        return
    if config.checkpoint.initial_weights is not None:
        find_weights(Path(config.checkpoint.initial_weights), config)
    find_branch(config)


def train(config: RunConfig) -> Ending:
    """Runs training on this rank to its end or until it is stopped; files are in `logging.run_directory`.

    Returns:
        Why it ended, and with it the exit status for the process.

    Raises:
        UserError: as `check` does.
        TrainingFault: the loss or gradients became non-finite.
    """
    check(config, world_size=launched_world_size())
    with StopRequest(after_seconds=config.training.stop_after_seconds) as stop:
        from sas_megatron.platform.device import prepare_device

        # Before Megatron-core is imported: on CPU it needs the stand-in.
        device = prepare_device()

        from sas_megatron.distributed.shared_directory import check_directory_is_shared
        from sas_megatron.distributed.topology import joined_topology
        from sas_megatron.training.loop import Run

        with joined_topology(
            config.parallel,
            device=device,
            seed=config.training.seed,
            timeout_minutes=config.training.collective_timeout_minutes,
            handles_signal=stop.take,
            flight_records=RunFiles(config).directory / "flight_recorder",
        ) as topology:
            check_directory_is_shared(Path(config.logging.run_directory))
            return Run(config, topology, stop).complete()
