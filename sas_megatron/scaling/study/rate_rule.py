"""The section `learning_rate` of a study file: where the peak learning rate of each run comes from."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.errors import FieldError
from sas_megatron.config.section import Section
from sas_megatron.config.training import NUM_SEEDS


class LearningRateRule(Section):
    """Source of the peak learning rate of each run."""

    section_name: ClassVar[str] = "learning_rate"

    rule: Literal["base", "stated", "kaplan", "step_law", "sweep"] = Field(
        default="base",
        description="base: optimizer.learning_rate of base and size; stated: rates; kaplan: 0.003239 − "
        "0.0001395 ln N (Kaplan et al. 2020, arXiv 2001.08361, eq. D.1); step_law: 1.79 N^−0.713 D^0.307 (Li "
        "et al. 2025, arXiv 2503.04715, eq. 1); N excludes embeddings, and D is that of the longest run if "
        "runs share a trunk; sweep: the step law times the factor that the sweeps of a variant find.",
    )
    rates: dict[str, float | dict[str, float]] | None = Field(
        default=None,
        description="With rule=stated: the rate of each variant, one for all sizes or by size, as "
        "{mha: 4e-3, sas: {w48: 4e-3, w64: 3e-3}}.",
    )
    multiples: dict[str, float] | None = Field(
        default=None,
        description="With rule=step_law: a factor for each variant, such as those that a sweep in another "
        "study found; null: 1.",
    )
    factors: list[float] = Field(
        default=[0.25, 0.5, 1.0, 2.0, 4.0],
        description="Factors of a sweep, times optimizer.learning_rate of base and size.",
    )
    sweep_sizes: list[str] | None = Field(
        default=None, description="Sizes of the sweep of each variant; null: the two smallest."
    )
    sweep_budget: float | None = Field(
        default=None,
        description="Budget of the sweep, in the unit of budgets; the rates then follow the step law from "
        "this budget to that of a run, as they do without shared trunks. null: the smallest budget.",
    )
    sweep_seed: int | None = Field(
        default=None,
        description="training.seed of the sweep; null: that of the first results. Another seed keeps the "
        "choice of a rate independent of the losses that are compared.",
    )
    batch: Literal["base", "step_law"] = Field(
        default="base",
        description="base: training.global_batch_size of base and size; step_law: 0.58 D^0.571 tokens with "
        "D of the longest run, rounded to full microbatches of all ranks (the same paper).",
    )

    @model_validator(mode="after")
    def _check(self) -> LearningRateRule:
        if len(self.factors) < 3 or min(self.factors) <= 0 or sorted(set(self.factors)) != self.factors:
            raise self.problem(
                "factors", "must be three or more positive numbers in ascending order", "use [0.5, 1, 2]"
            )
        self.require_positive("sweep_budget")
        if self.sweep_seed is not None and not 0 <= self.sweep_seed < NUM_SEEDS:
            raise self.problem(
                "sweep_seed", f"must be at least 0 and below {NUM_SEEDS}", "use 1, for example"
            )
        for field in ("sweep_sizes", "sweep_budget", "sweep_seed"):
            if getattr(self, field) is not None and self.rule != "sweep":
                raise self.problem(field, "requires rule=sweep", "remove it, or set rule: sweep")
        if (self.rates is not None) != (self.rule == "stated"):
            raise self.problem(
                "rates", "must be given if and only if rule=stated", "give both of them, or neither"
            )
        if self.multiples is not None and self.rule != "step_law":
            raise self.problem("multiples", "requires rule=step_law", "remove it, or set rule: step_law")
        for field in ("rates", "multiples"):
            for variant, rate in (getattr(self, field) or {}).items():
                if min(rate.values() if isinstance(rate, dict) else [rate], default=1) <= 0:
                    raise FieldError(
                        f"learning_rate.{field}.{variant}", rate, "must be positive", "use 1e-3, for example"
                    )
        return self

    def check_names(self, *, variants: Collection[str], sizes: Collection[str]) -> None:
        """Check the variants and sizes that the rule names against those of the study.

        Raises:
            FieldError: A name is unknown, a variant or size has no stated rate, or a sweep has no sizes.
        """
        for field in ("rates", "multiples"):
            if getattr(self, field) is not None:
                _check_equal(f"learning_rate.{field}", getattr(self, field), variants, noun="variant")
        if self.rates is not None:
            for variant, rate in self.rates.items():
                if isinstance(rate, dict):
                    _check_equal(f"learning_rate.rates.{variant}", rate, sizes, noun="size")
        if self.sweep_sizes is not None:
            if not self.sweep_sizes or not set(self.sweep_sizes) <= set(sizes):
                raise self.problem(
                    "sweep_sizes", "must name sizes of the study", f"use some of {', '.join(sizes)}"
                )
        elif self.rule == "sweep" and len(sizes) < 2:
            raise FieldError(
                "learning_rate.rule",
                "sweep",
                "needs two sizes, since it sweeps the two smallest",
                f"name the size in learning_rate.sweep_sizes: [{next(iter(sizes))}], or use another rule",
            )

    def find_stated_rate(self, variant: str, size: str) -> float:
        """Return the stated rate of a variant at a size.

        Raises:
            KeyError: The rule is not "stated", or the names were not checked.
        """
        rate = (self.rates or {})[variant]
        return rate[size] if isinstance(rate, dict) else rate


def _check_equal(field: str, rates: Collection[str], names: Collection[str], *, noun: str) -> None:
    if set(rates) != set(names):
        raise FieldError(
            field,
            list(rates),
            f"must have a rate for every {noun}",
            f"give one for each of {', '.join(names)}",
        )
