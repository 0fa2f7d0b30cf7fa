"""Builder of a study's plan.

sizes × axes -> base configs -> variants, matched -> learning rates -> seeds × (trunk -> branches)
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sas_megatron.checkpoint.manifest import checkpoint_name
from sas_megatron.config.attention import resolve_kind
from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import build_run_config, set_field
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.costs.parameters import count_parameters, without_embeddings
from sas_megatron.scaling.matching import match
from sas_megatron.scaling.study.layouts import Layouts
from sas_megatron.scaling.study.learning_rates import (
    kaplan_rate,
    step_law_batch_tokens,
    step_law_rate,
    timescale_weight_decay,
)
from sas_megatron.scaling.study.plan import Cell, Plan, PlannedRun, Role, count_budget_tokens
from sas_megatron.scaling.study.study_file import Overrides, Study
from sas_megatron.scaling.variants import default_attention, scale_fields

# Learning rates by variant and size.
Rates = Mapping[tuple[str, str], float]
ATTENTION = "attention."
# Validation windows on which the runs of a study measure what happens inside the model.
PROBE_SEQUENCES = 2


def build_plan(
    study: Study, base: dict[str, Any], *, rates: Rates | None = None, layouts: Layouts | None = None
) -> Plan:
    """Return the plan of a study.

    Args:
        study: The study.
        base: The tree of its base config.
        rates: Learning rates found by the sweep; None if it has not finished, so that only its runs are
            ready.
        layouts: Layouts found by a search, by the name of the cell; other cells have the base's layout.

    Raises:
        UserError: A run breaks a rule, or a variant cannot be matched.
    """
    return _PlanBuilder(study, base, rates=rates, layouts=layouts or {}).build()


class _PlanBuilder:
    """Builds the cells of a study, then the runs of each cell."""

    def __init__(self, study: Study, base: dict[str, Any], *, rates: Rates | None, layouts: Layouts) -> None:
        self.study, self.base, self.rates, self.layouts = study, base, rates, layouts
        self.budgets = study.budgets.values
        self.cells: tuple[Cell, ...] = ()

    def build(self) -> Plan:
        """Build the cells and their runs.

        Raises:
            UserError: As for `build_plan`.
        """
        self.cells = tuple(self._build_cells())
        runs: list[PlannedRun] = []
        if self.study.learning_rate.rule == "sweep":
            runs += self._sweep_runs()
        for cell in self.cells:
            runs += self._cell_runs(cell)
        (name, count), *_ = Counter(run.name for run in runs).most_common(1)
        if count > 1:
            raise UserError(
                f"{count} runs of the study are named {name}; make sizes, levels and budgets differ more"
            )
        return Plan(self.study, tuple(runs), self.cells, self.layouts)

    # Cells

    def _build_cells(self) -> Iterator[Cell]:
        axes = self.study.axes
        for variant, size in itertools.product(self.study.variants, self.study.sizes):
            names = [axis for axis, levels in axes.items() if self._has_fields(variant, levels)]
            for chosen in itertools.product(*(axes[axis] for axis in names)):
                levels = dict(zip(names, chosen, strict=True))
                try:
                    yield self._build_cell(variant, size, levels)
                except UserError as error:
                    cell_name = ", ".join([f"variants.{variant}", f"sizes.{size}", *levels.values()])
                    raise UserError(f"{cell_name}: {error}") from None

    def _has_fields(self, variant: str, levels: Mapping[str, Overrides]) -> bool:
        """Return whether the variant has the attention fields that an axis varies."""
        known = resolve_kind(self._kind(variant)).model_fields
        fields = {name for overrides in levels.values() for name in overrides if name.startswith(ATTENTION)}
        return all(name.removeprefix(ATTENTION) in known for name in fields)

    def _kind(self, variant: str) -> str:
        return str(self.study.variants[variant].get("kind", variant))

    def _build_cell(self, variant: str, size: str, levels: Mapping[str, str]) -> Cell:
        study = self.study
        overrides = [item for axis, level in levels.items() for item in study.axes[axis][level].items()]
        attention = {
            name.removeprefix(ATTENTION): value for name, value in overrides if name.startswith(ATTENTION)
        }
        others = {name: value for name, value in overrides if not name.startswith(ATTENTION)}
        tree = _override(self.base, study.sizes[size] | others)
        reference = _with_probes(build_run_config(tree))
        defaults = default_attention(reference, self._kind(variant))
        fields = defaults | study.variants[variant] | attention
        tree["attention"] = scale_fields(fields, fields.pop("times", {}))
        config = _with_probes(build_run_config(tree))
        if study.match != "none" and config != reference:
            config = match(
                reference, config, axis=study.match, free=tuple(study.free), tolerance=study.tolerance
            ).config
        terms = count_parameters(config)
        cell = Cell(
            variant=variant,
            size=size,
            levels=dict(levels),
            config=config,
            parameters=sum(terms.values()),
            parameters_without_embeddings=sum(without_embeddings(terms).values()),
            flops_per_token=sum(count_training_flops(config).values()),
            base_parameters=sum(count_parameters(reference).values()),
        )
        if study.learning_rate.batch == "step_law":
            config = config.replaced({"training.global_batch_size": self._step_law_batch_size(cell)})
        if cell.name in self.layouts:
            config = config.replaced(dict(self.layouts[cell.name].changes))
        return dataclasses.replace(cell, config=config)

    def _step_law_batch_size(self, cell: Cell) -> int:
        """Return the samples per step of the step law, rounded to full microbatches of all ranks."""
        tokens = step_law_batch_tokens(count_budget_tokens(self.study, cell, self.budgets[-1]))
        multiple = cell.config.training.micro_batch_size * self.study.machine.processes
        return max(1, round(tokens / cell.config.data.sequence_length / multiple)) * multiple

    # Runs

    def _sweep_runs(self) -> Iterator[PlannedRun]:
        """Yield one run per factor for each swept cell."""
        rule, budget = self.study.learning_rate, self.study.sweep_budget
        for cell in self._swept_cells():
            steps = self._num_steps(cell, budget)
            for factor in rule.factors:
                rate = cell.config.optimizer.learning_rate * factor
                settings = {
                    **self._decayed(cell, rate, steps),
                    **({} if rule.sweep_seed is None else {"training.seed": rule.sweep_seed}),
                    "training.num_steps": steps,
                    **(self._decay_settings(steps) if self.study.trunks == "shared" else {}),
                }
                config = self._build_config(cell, f"{cell.name}-sweep-x{factor:g}", settings)
                yield _plan_run("sweep", cell, budget, config)

    def _swept_cells(self) -> list[Cell]:
        """Return the cells of each variant at the swept sizes, at the first level of every axis."""
        sizes = {
            size: min(cell.base_parameters for cell in self.cells if cell.size == size)
            for size in self.study.sizes
        }
        swept = self.study.learning_rate.sweep_sizes or sorted(sizes, key=sizes.__getitem__)[:2]
        chosen: dict[tuple[str, str], Cell] = {}
        for cell in self.cells:
            if cell.size in swept:
                chosen.setdefault((cell.variant, cell.size), cell)
        return list(chosen.values())

    def _cell_runs(self, cell: Cell) -> Iterator[PlannedRun]:
        is_ready = self.study.learning_rate.rule != "sweep" or self.rates is not None
        for index in range(self.study.num_seeds(cell.variant)):
            seed = cell.config.training.seed + index
            if self.study.trunks == "shared" and len(self.budgets) > 1:
                runs = self._trunk_and_branches(cell, seed)
            else:
                runs = (self._single_run(cell, seed, budget) for budget in self.budgets)
            yield from (dataclasses.replace(run, is_ready=is_ready) for run in runs)

    def _single_run(self, cell: Cell, seed: int, budget: float) -> PlannedRun:
        steps = self._num_steps(cell, budget)
        settings = self._common_settings(cell, seed, steps) | {"training.num_steps": steps}
        if self.study.trunks == "shared":
            settings |= self._decay_settings(steps)
        return _plan_run("run", cell, budget, self._build_config(cell, _name(cell, budget, seed), settings))

    def _trunk_and_branches(self, cell: Cell, seed: int) -> Iterator[PlannedRun]:
        steps = {budget: self._num_steps(cell, budget) for budget in self.budgets}
        longest = max(steps.values())
        common = self._common_settings(cell, seed, longest) | {"training.order_steps": longest}
        branch_points = {budget: count - self._decay_steps(count) for budget, count in steps.items()}
        trunk = f"{cell.name}-trunk-s{seed}"
        constant = {
            "schedule.kind": "constant",
            "schedule.decay_steps": None,
            "training.num_steps": max(branch_points.values()),
            "checkpoint.at_steps": sorted(set(branch_points.values())),
        }
        config = self._build_config(cell, trunk, common | constant)
        yield _plan_run("trunk", cell, self.budgets[-1], config)
        for budget in self.budgets:
            checkpoint = checkpoint_name(branch_points[budget])
            settings = {
                **common,
                **self._decay_settings(steps[budget]),
                "training.num_steps": steps[budget],
                "checkpoint.branch_from": f"{config.logging.run_directory}/checkpoints/{checkpoint}",
            }
            branch = self._build_config(cell, _name(cell, budget, seed), settings)
            yield _plan_run("branch", cell, budget, branch, trunk=trunk, trunk_steps=branch_points[budget])

    # Settings

    def _common_settings(self, cell: Cell, seed: int, longest: int) -> dict[str, Any]:
        """Return the seed, the learning rate and the weight decay of runs of up to `longest` steps."""
        rule, parameters = self.study.learning_rate.rule, cell.parameters_without_embeddings
        rate = cell.config.optimizer.learning_rate
        if rule == "kaplan":
            rate = kaplan_rate(parameters)
        elif rule == "step_law":
            multiple = (self.study.learning_rate.multiples or {}).get(cell.variant, 1.0)
            rate = multiple * step_law_rate(parameters, longest * cell.step_tokens)
        elif rule == "stated":
            rate = self.study.learning_rate.find_stated_rate(cell.variant, cell.size)
        elif rule == "sweep" and self.rates is not None:
            rate = self.rates[cell.variant, cell.size]
            if self.study.trunks == "none" or self.study.learning_rate.sweep_budget is not None:
                # The found rates are those of the sweep's budget.
                swept_tokens = count_budget_tokens(self.study, cell, self.study.sweep_budget)
                rate *= step_law_rate(parameters, longest * cell.step_tokens)
                rate /= step_law_rate(parameters, swept_tokens)
        return {"training.seed": seed, **self._decayed(cell, rate, longest)}

    def _decayed(self, cell: Cell, rate: float, steps: int) -> dict[str, float]:
        """Return a learning rate and the weight decay that belongs to it, for a run of some steps."""
        if self.study.weight_decay == "base":
            return {"optimizer.learning_rate": rate}
        ratio = steps * cell.step_tokens / cell.parameters
        return {
            "optimizer.learning_rate": rate,
            "optimizer.weight_decay": timescale_weight_decay(rate, steps, tokens_per_parameter=ratio),
        }

    def _decay_settings(self, steps: int) -> dict[str, Any]:
        return {
            "schedule.kind": "warmup_stable_decay",
            "schedule.decay_steps": self._decay_steps(steps),
            "schedule.final_fraction": 0.0,
        }

    def _decay_steps(self, steps: int) -> int:
        return max(1, round(self.study.decay_fraction * steps))

    def _num_steps(self, cell: Cell, budget: float) -> int:
        """Return the number of steps nearest to the budget."""
        return max(1, round(count_budget_tokens(self.study, cell, budget) / cell.step_tokens))

    def _build_config(self, cell: Cell, name: str, settings: Mapping[str, Any]) -> RunConfig:
        directory = Path(self.study.directory) / "runs" / name
        try:
            return cell.config.replaced(
                {
                    **settings,
                    "logging.run_directory": str(directory),
                    "checkpoint.resume": "auto",
                    "checkpoint.keep_last": 1,
                    **self._tracker_settings(cell),
                }
            )
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def _tracker_settings(self, cell: Cell) -> dict[str, Any]:
        """Return the group and the tags of a run, if a tracker shows them."""
        logging = cell.config.logging
        if set(logging.trackers) <= {"tensorboard"}:
            return {}
        tags = [*logging.tracker_tags, cell.variant, cell.size, *cell.levels.values()]
        group = logging.tracker_group or Path(self.study.directory).name
        return {"logging.tracker_group": group, "logging.tracker_tags": list(dict.fromkeys(tags))}


def _plan_run(
    role: Role,
    cell: Cell,
    budget: float,
    config: RunConfig,
    *,
    trunk: str | None = None,
    trunk_steps: int = 0,
) -> PlannedRun:
    return PlannedRun(
        name=Path(config.logging.run_directory).name,
        role=role,
        cell=cell,
        budget=budget,
        seed=config.training.seed,
        config=config,
        trunk=trunk,
        trained_steps=config.training.num_steps - trunk_steps,
    )


def _with_probes(config: RunConfig) -> RunConfig:
    """Return the config with measurements inside the model, unless it states `evaluation.probe_sequences`."""
    if "probe_sequences" in config.evaluation.model_fields_set:
        return config
    number = min(PROBE_SEQUENCES, config.evaluation.num_sequences)
    return config.replaced({"evaluation.probe_sequences": number})


def _name(cell: Cell, budget: float, seed: int) -> str:
    return f"{cell.name}-{budget:g}-s{seed}"


def _override(base: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """Return a copy of a config tree with dotted fields set."""
    tree = copy.deepcopy(base)
    for name, value in overrides.items():
        if not all(name.split(".")) or "." not in name:
            raise UserError(
                f"{name}={value}: must have the form section.field; write model.hidden_size: 256, for example"
            )
        set_field(tree, name, value)
    return tree
