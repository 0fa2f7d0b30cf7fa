"""From a config to a running rank: what the user can mend is found before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from sas_megatron.config.run import RunConfig
from sas_megatron.data.opening import open_token_files
from sas_megatron.platform.launcher import is_first_rank, launched_world_size
from sas_megatron.training.run_files import RunFiles


def check(config: RunConfig, *, world_size: int) -> None:
    """Finds what the user can mend, without torch, and leaves nothing on disk.

    Raises:
        UserError: something in config, data, layout or run directory does not fit.
    """
    config.check_world_size(world_size)
    open_token_files(config.data, vocab_size=config.model.vocab_size, verify=is_first_rank())
    RunFiles.check_directory(config)


def train(config: RunConfig) -> None:
    """Runs training to its end on this rank; the files are in `logging.run_directory`.

    Raises:
        UserError: as `check` does.
        TrainingFault: the loss or gradients became non-finite.
    """
    check(config, world_size=launched_world_size())

    from sas_megatron.platform.device import prepare_device

    # Before Megatron-core is imported: on CPU it needs the stand-in.
    device = prepare_device()

    from sas_megatron.parallel.shared_directory import check_directory_is_shared
    from sas_megatron.parallel.topology import joined_topology
    from sas_megatron.training.loop import Run

    with joined_topology(
        config.parallel,
        device=device,
        seed=config.training.seed,
        timeout_minutes=config.training.collective_timeout_minutes,
    ) as topology:
        check_directory_is_shared(Path(config.logging.run_directory))
        Run(config, topology).complete()
