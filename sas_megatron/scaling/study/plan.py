"""The plan of a study: every run with its config and costs. `plan_builder` builds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sas_megatron.config.run import RunConfig
from sas_megatron.scaling.study.layouts import Layouts
from sas_megatron.scaling.study.study_file import Study

Role = Literal["run", "trunk", "branch", "sweep"]


@dataclass(frozen=True)
class Cell:
    """A variant at one size and one level of each axis; its runs differ in budget and seed only."""

    variant: str
    size: str
    levels: Mapping[str, str]
    config: RunConfig
    parameters: int
    parameters_without_embeddings: int
    flops_per_token: int
    # Parameters of the base at this size and these levels, to which tokens_per_parameter refers.
    base_parameters: int

    @property
    def name(self) -> str:
        """The prefix of the names of its runs."""
        return "-".join([self.variant, self.size, *self.levels.values()])

    @property
    def step_tokens(self) -> int:
        """Tokens per step."""
        return self.config.training.global_batch_size * self.config.data.sequence_length


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    A trunk is not a result of the study. A branch can start once its trunk has saved the checkpoint
    `config.checkpoint.branch_from`. `trained_steps` excludes the steps of the trunk.
    """

    name: str
    role: Role
    cell: Cell
    budget: float
    seed: int
    config: RunConfig
    trunk: str | None
    trained_steps: int
    # False until the sweep that determines the learning rate has finished.
    is_ready: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of the run, including the steps of its trunk."""
        return self.config.training.num_steps * self.cell.step_tokens

    @property
    def trained_flops(self) -> int:
        """Training FLOPs of the trained steps."""
        return self.trained_steps * self.cell.step_tokens * self.cell.flops_per_token

    @property
    def trunk_steps(self) -> int:
        """Steps of the trunk up to the branch point; 0 for a run that is not a branch."""
        return self.config.training.num_steps - self.trained_steps

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.logging.run_directory)


@dataclass(frozen=True)
class Plan:
    """All runs of a study; a branch comes after its trunk."""

    study: Study
    runs: tuple[PlannedRun, ...]
    cells: tuple[Cell, ...]
    layouts: Layouts

    @property
    def directory(self) -> Path:
        """The directory of the study."""
        return Path(self.study.directory)

    @property
    def results(self) -> tuple[PlannedRun, ...]:
        """The runs whose losses are results of the study."""
        return tuple(run for run in self.runs if run.role in ("run", "branch"))

    def hours(self, run: PlannedRun) -> float | None:
        """Return the hours of one rank times the number of ranks; None if no speed is known.

        They follow from the estimated seconds per step of the layout, or from `machine.teraflops`.
        """
        machine, layout = self.study.machine, self.layouts.get(run.cell.name)
        if layout is not None:
            return run.trained_steps * layout.step_seconds * machine.processes / 3600
        return None if machine.teraflops is None else run.trained_flops / (machine.teraflops * 1e12) / 3600

    def price(self, run: PlannedRun) -> float | None:
        """Return the price in the currency of `machine.price_per_hour`; None if it is unknown."""
        hours, price = self.hours(run), self.study.machine.price_per_hour
        return None if hours is None or price is None else hours * price


def count_budget_tokens(study: Study, cell: Cell, budget: float) -> float:
    """Return the tokens of a budget, before they are rounded to full steps."""
    return {
        "tokens": budget,
        "tokens_per_parameter": budget * cell.base_parameters,
        "flops": budget / cell.flops_per_token,
    }[study.budgets.rule]
