"""Finds the starting point of a run: its newest checkpoint, a checkpoint of another run, or initial weights.

The order of precedence is: own checkpoint (`checkpoint.resume`), branch (`checkpoint.branch_from`), weights
alone (`checkpoint.initial_weights`), random initial weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sas_megatron.checkpoint.restoring import Checkpoint, find_newest_complete, open_checkpoint
from sas_megatron.checkpoint.trained_run import offering_another_checkpoint
from sas_megatron.checkpoint.weights_source import WeightsSource, find_weights
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.object_collectives import run_on_rank0
from sas_megatron.training.metrics import Progress, read_counts
from sas_megatron.training.resuming import Branch, check_checkpoint_config, find_branch, suggest_branch
from sas_megatron.training.run_files import RunFiles


@dataclass(frozen=True)
class StartingPoint:
    """The source of a run's first weights; all fields are None if they are random."""

    # The checkpoint to restore: the run's own, or that of `branch`.
    checkpoint: Checkpoint | None
    branch: Branch | None
    initial_weights: WeightsSource | None

    def read_progress(self) -> Progress:
        """Return the progress that the checkpoint contains; without one, that of a new run.

        Raises:
            DamagedCheckpoint: A field has another type.
        """
        if self.checkpoint is None:
            return Progress()
        return read_counts(self.checkpoint.progress["counts"], checkpoint=self.checkpoint.path)

    @property
    def weights_folder(self) -> Path | None:
        """The folder of the initial weights; None without any."""
        return None if self.initial_weights is None else self.initial_weights.folder


def find_starting_point(config: RunConfig, *, log: Callable[[str], None]) -> StartingPoint:
    """Find and verify the starting point of a run; every rank must call it.

    Args:
        config: The run.
        log: Called with a line for each damaged checkpoint that is skipped, and if there is none to resume.

    Raises:
        UserError: The checkpoint or the weights are missing, damaged, or do not fit the config.
    """
    if config.checkpoint.resume is not False:
        newest = find_newest_complete(RunFiles.checkpoints(config), log=log)
        if newest is not None:
            checkpoint = newest.path
            run_on_rank0(lambda: check_checkpoint_config(config, checkpoint))
            return StartingPoint(newest, None, None)
        if config.checkpoint.resume is True:
            folder = RunFiles.checkpoints(config)
            log(f"checkpoint.resume=true: {folder} has no checkpoint; the run starts at step 0")
    branch = run_on_rank0(lambda: find_branch(config))
    if branch is not None:
        with offering_another_checkpoint(branch.checkpoint, suggest_branch):
            return StartingPoint(open_checkpoint(branch.checkpoint), branch, None)
    path = config.checkpoint.initial_weights
    if path is None:
        return StartingPoint(None, None, None)
    return StartingPoint(None, None, run_on_rank0(lambda: find_weights(Path(path), config)))
