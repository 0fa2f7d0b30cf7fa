"""The file of a study: a base run, and the variations of it.

base -> sizes × axes -> variants, matched to the base -> budgets × seeds
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.config.loading import read_run_tree, read_yaml
from sas_megatron.config.section import Section
from sas_megatron.scaling.matching import MLP, TOLERANCE
from sas_megatron.scaling.study.rate_rule import LearningRateRule

# A plan of this many runs takes a few seconds, in every command.
MAX_RUNS = 3000

Overrides = dict[str, Any]


class Budgets(Section):
    """Length of the runs, by one of three rules; each value is a run."""

    section_name: ClassVar[str] = "budgets"

    tokens: list[int] | None = Field(default=None, description="Tokens, the same at every size (a grid).")
    tokens_per_parameter: list[float] | None = Field(
        default=None, description="Tokens per parameter of the size's base, embeddings included."
    )
    flops: list[float] | None = Field(
        default=None,
        description="Training FLOPs; tokens follow from them for each variant and size (isoFLOP).",
    )

    @model_validator(mode="after")
    def _check(self) -> Budgets:
        stated = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(stated) != 1:
            raise FieldError(
                "budgets",
                stated,
                "must hold exactly one of tokens, tokens_per_parameter and flops",
                "write budgets: {tokens_per_parameter: [5, 10, 20]}, for example",
            )
        values = getattr(self, stated[0])
        if not values or min(values) <= 0 or sorted(set(values)) != values:
            raise self.problem(
                stated[0], "must be positive numbers in ascending order", "sort them without duplicates"
            )
        return self

    @property
    def rule(self) -> str:
        """Name of the rule that is given."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> list[float]:
        """The budgets, in the unit of the rule."""
        return list(getattr(self, self.rule))


class Machine(Section):
    """The machine that runs the study, for the hours and the price of a plan."""

    section_name: ClassVar[str] = "machine"

    processes: int = Field(default=1, description="Ranks of each run: GPUs, or processes on a CPU.")
    teraflops: float | None = Field(
        default=None,
        description="Sustained model TFLOP/s of one rank (10¹² per second); null: hours are unknown.",
    )
    price_per_hour: float | None = Field(default=None, description="Price of one rank, in any currency.")

    @model_validator(mode="after")
    def _check(self) -> Machine:
        self.require_positive("processes", "teraflops", "price_per_hour")
        return self


class Study(Section):
    """A study; the first variant is the baseline."""

    section_name: ClassVar[str] = "study"

    base: str = Field(description="Config of the base run, relative to this file.")
    directory: str = Field(description="Directory of the configs, runs, table and report.")
    variants: dict[str, Overrides] = Field(
        description="Name -> attention fields. The kind is the name unless it is given; other fields default "
        "to values derived from the size's base. times: factors of fields, as {num_heads: 2, head_dim: 0.5}."
    )
    sizes: dict[str, Overrides] = Field(description="Name -> fields of the base, as section.field.")
    axes: dict[str, dict[str, Overrides]] = Field(
        default={},
        description="Further axes: name -> level -> fields as in sizes. An axis of attention fields applies "
        "to the variants that have these fields.",
    )
    budgets: Budgets
    seeds: int | dict[str, int] = Field(
        default=1, description="Runs that differ in training.seed only; by variant, or one number for all."
    )
    match: Literal["params", "flops", "kv", "none"] = Field(
        default="params", description="Quantity in which each variant equals the base at that size."
    )
    free: list[str] = Field(
        default=[MLP],
        description="Fields that matching may change: the MLP width, dimensions of the attention.",
    )
    tolerance: float = Field(default=TOLERANCE, description="Largest relative difference of a match.")
    trunks: Literal["shared", "none"] = Field(
        default="shared",
        description="shared: the budgets of a size branch off one run with constant learning rate, then "
        "decay; none: each budget is a separate run with the base's schedule.",
    )
    decay_fraction: float = Field(
        default=0.2,
        description="Fraction of a run's steps in which the learning rate decays linearly to zero.",
    )
    learning_rate: LearningRateRule = Field(default_factory=LearningRateRule)
    weight_decay: Literal["base", "timescale"] = Field(
        default="base",
        description="base: optimizer.weight_decay of base and size; timescale: 1 / (learning rate × steps × "
        "τ) with τ = 1.084 (D/N)^−0.527, the part of a run over which AdamW averages its updates (Bergsma et "
        "al. 2025, arXiv 2505.13738); N includes embeddings, and D is that of the longest run if runs share "
        "a trunk.",
    )
    machine: Machine = Field(default_factory=Machine)
    seed_noise: float | None = Field(
        default=None,
        description="Standard deviation of the final loss over seeds, for the smallest detectable "
        "difference; null: measured once runs of several seeds have finished.",
    )

    withdrawn: dict[str, str] = Field(
        default={},
        description="Variants whose results are not compared until they are trained again, with the reason, "
        "which the report states.",
    )

    @model_validator(mode="after")
    def _check(self) -> Study:
        self.require_paths("base", "directory")
        for field in ("variants", "sizes"):
            if not getattr(self, field):
                raise self.problem(field, "is empty", "add at least one entry")
        names = [
            *self.variants,
            *self.sizes,
            *self.axes,
            *(level for axis in self.axes.values() for level in axis),
        ]
        for name in names:
            if not name.replace("_", "").replace(".", "").isalnum():
                raise FieldError(
                    "study", name, "becomes part of file names", "use letters, digits, dots and underscores"
                )
        for name in self.withdrawn:
            if name not in list(self.variants)[1:]:
                raise FieldError(
                    "withdrawn",
                    name,
                    "is not a variant other than the baseline",
                    f"name one of {', '.join(list(self.variants)[1:])}",
                )
        self.require_between(0.0, 1.0, "decay_fraction")
        self.require_positive("tolerance", "seed_noise")
        counts = self.seeds if isinstance(self.seeds, dict) else dict.fromkeys(self.variants, self.seeds)
        if set(counts) != set(self.variants) or min(counts.values()) < 1:
            raise self.problem(
                "seeds",
                "must be a positive number for every variant",
                f"give one for each of {', '.join(self.variants)}",
            )
        num_runs = self._count_runs(sum(counts.values()))
        if num_runs > MAX_RUNS:
            raise FieldError(
                "study",
                f"{num_runs:,} runs",
                f"must have at most {MAX_RUNS:,}, as the product of sizes, axes, budgets and seeds",
                "divide it into several studies, or use fewer seeds",
            )
        self.learning_rate.check_names(variants=self.variants, sizes=self.sizes)
        return self

    def _count_runs(self, num_seeds: int) -> int:
        """Return the number of results if every axis applies to every variant.

        Args:
            num_seeds: The seeds of all variants.
        """
        levels = math.prod(len(axis) for axis in self.axes.values())
        return len(self.sizes) * levels * len(self.budgets.values) * num_seeds

    def num_seeds(self, variant: str) -> int:
        """Return the number of runs of a variant at each size and budget."""
        return self.seeds if isinstance(self.seeds, int) else self.seeds[variant]

    @property
    def sweep_budget(self) -> float:
        """The budget of a learning rate sweep."""
        return self.learning_rate.sweep_budget or self.budgets.values[0]

    @property
    def baseline(self) -> str:
        """The first variant, with which the others are compared."""
        return next(iter(self.variants))


def load_study(path: str | Path, *, directory: Path | None = None) -> tuple[Study, dict[str, Any]]:
    """Load a study and the tree of its base config.

    Args:
        path: The study file.
        directory: Replaces the directory of the study file; None: see `find_directory`.

    Raises:
        UserError: A file cannot be read, or the study breaks a rule.
    """
    study = read_study(path)
    directory = directory or find_directory(study.directory, Path(path))
    study = study.model_copy(update={"directory": str(directory)})
    return study, read_run_tree(Path(path).parent / study.base)


def read_study(path: str | Path) -> Study:
    """Read a study file.

    Raises:
        UserError: The file cannot be read, or the study breaks a rule.
    """
    tree = read_yaml(path)
    try:
        study = Study.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        location = ".".join(map(str, problem["loc"]))
        known = ", ".join(Study.model_fields)
        remedy = f"known: {known}" if problem["type"] == "extra_forbidden" else "correct the value"
        raise FileProblem(path, f"{location}: {problem['msg'].lower()}", remedy) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return study


def find_directory(directory: str, study_file: Path) -> Path:
    """Return the directory of a study that may have been run from another working directory.

    If a relative path does not exist in the working directory, it is the first of the study file's folder and
    the folders around it that contains the path with runs.
    """
    path = Path(directory)
    if not path.is_absolute() and not path.exists():
        for folder in study_file.resolve().parents:
            if (folder / path / "runs").is_dir():
                return folder / path
    return path
