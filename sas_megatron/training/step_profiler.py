"""Traces of chosen steps for Perfetto: one file a rank, in the `profile` folder of the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sas_megatron.config.training import LoggingConfig


class StepProfiler:
    """Records the steps of `logging.profile_steps` on this rank: processor, and GPU where there is one.

    Recording is continuous from the first step to the last: evaluations and saves between them are in
    the trace too. Each step is one range of its name.
    """

    def __init__(self, config: LoggingConfig, *, rank: int, device: torch.device) -> None:
        self._steps = config.profile_steps
        self._folder = Path(config.run_directory) / "profile"
        self._rank = rank
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None
        self._recorded: list[int] = []

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """What runs within is step `number`: recorded where it is asked for."""
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            yield
            return
        if self._profile is None:
            self._profile = profile(activities=self._activities)
            self._profile.start()
        with record_function(f"step {number}"):
            yield
        self._recorded.append(number)
        if number == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being recorded: a run may stop before the last step asked for."""
        if self._profile is None:
            return
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        # Named for what it holds: a run that is gone on with writes the rest beside it.
        steps = f"steps_{self._recorded[0]}_to_{self._recorded[-1]}"
        path = self._folder / f"rank_{self._rank:05d}_{steps}.json.gz"
        partial = path.with_name(f"partial_{path.name}")  # torch compresses by the end of the name
        self._profile.export_chrome_trace(str(partial))
        partial.replace(path)
        self._profile, self._recorded = None, []
