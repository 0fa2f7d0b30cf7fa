"""Writes profiler traces of chosen steps for Perfetto: one file per rank, in the run's `profile` folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sas_megatron.config.monitoring import LoggingConfig


class StepProfiler:
    """Profiles the steps of `logging.profile_steps` on this rank: the CPU, and the GPU if the run uses one.

    Profiling is continuous from the first of these steps to the last, so that the trace also contains the
    evaluations and saves between them. Each step is one named range.

    Args:
        config: The `logging` section.
        rank: This rank, for the name of the trace.
        device: This rank's device.
    """

    def __init__(self, config: LoggingConfig, *, rank: int, device: torch.device) -> None:
        self._steps = config.profile_steps
        self._folder = Path(config.run_directory) / "profile"
        self._rank = rank
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None
        self._profiled_steps: list[int] = []

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the block as step `number`, if this step was chosen."""
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            yield
            return
        if self._profile is None:
            self._profile = profile(activities=self._activities)
            self._profile.start()
        with record_function(f"step {number}"):
            yield
        self._profiled_steps.append(number)
        if number == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace, if profiling is active; a run may stop before the last chosen step."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        # The steps are in the name, because a resumed run writes the remaining steps to another file.
        steps = f"steps_{self._profiled_steps[0]}_to_{self._profiled_steps[-1]}"
        path = self._folder / f"rank_{self._rank:05d}_{steps}.json.gz"
        partial = path.with_name(f"partial_{path.name}")  # torch compresses if the name ends in .gz
        self._profile.export_chrome_trace(str(partial))
        partial.replace(path)
        self._profile, self._profiled_steps = None, []
