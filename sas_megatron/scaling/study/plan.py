"""A study -> every run of it, with its config and costs, before anything starts.

sizes × axes -> base configs -> variants, matched -> learning rates -> seeds × [trunk -> branches]
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sas_megatron.checkpoint.manifest import checkpoint_name
from sas_megatron.config.attention import resolve_kind
from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import build_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.costs.parameters import count_parameters, without_embeddings
from sas_megatron.scaling.matching import match
from sas_megatron.scaling.study.layouts import Layouts
from sas_megatron.scaling.study.learning_rates import kaplan_rate, step_law_batch_tokens, step_law_rate
from sas_megatron.scaling.study.study_file import Overrides, Study
from sas_megatron.scaling.variants import model_attention

Role = Literal["run", "trunk", "branch", "sweep"]
# By variant and size.
Rates = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Cell:
    """What runs of one cell share: all but budget and seed."""

    variant: str
    size: str
    levels: Mapping[str, str]
    config: RunConfig
    parameters: int
    parameters_without_embeddings: int
    flops_per_token: int
    # Of the base at this size and these levels, which tokens_per_parameter refers to.
    base_parameters: int

    @property
    def name(self) -> str:
        """Part of the names of its runs."""
        return "-".join([self.variant, self.size, *self.levels.values()])

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.config.training.global_batch_size * self.config.data.sequence_length


@dataclass(frozen=True)
class PlannedRun:
    """One run, with all that decides it.

    A trunk is no result of the study; a branch can start when its trunk has saved what
    `config.checkpoint.branch_from` names. `own_steps` are those that are not the trunk's.
    """

    name: str
    role: Role
    cell: Cell
    budget: float
    seed: int
    config: RunConfig
    trunk: str | None
    own_steps: int
    # False while the sweep that decides its learning rate has not finished.
    is_ready: bool = True

    @property
    def tokens(self) -> int:
        """Of the whole run, the trunk's part included."""
        return self.config.training.num_steps * self.cell.step_tokens

    @property
    def own_flops(self) -> int:
        """Training FLOPs of its own steps."""
        return self.own_steps * self.cell.step_tokens * self.cell.flops_per_token

    @property
    def directory(self) -> Path:
        """Of the run."""
        return Path(self.config.logging.run_directory)


@dataclass(frozen=True)
class Plan:
    """All runs, each after the one that it branches off."""

    study: Study
    runs: tuple[PlannedRun, ...]
    cells: tuple[Cell, ...]
    layouts: Layouts

    @property
    def results(self) -> tuple[PlannedRun, ...]:
        """The runs whose losses are the study's."""
        return tuple(run for run in self.runs if run.role in ("run", "branch"))

    def hours(self, run: PlannedRun) -> float | None:
        """Hours of one rank, all ranks together: by the simulator's step, or by `machine.teraflops`."""
        machine, layout = self.study.machine, self.layouts.get(run.cell.name)
        if layout is not None:
            return run.own_steps * layout.step_seconds * machine.processes / 3600
        return None if machine.teraflops is None else run.own_flops / (machine.teraflops * 1e12) / 3600

    def price(self, run: PlannedRun) -> float | None:
        """In the currency of `machine.price_per_hour`."""
        hours, price = self.hours(run), self.study.machine.price_per_hour
        return None if hours is None or price is None else hours * price


def build_plan(
    study: Study, base: dict[str, Any], *, rates: Rates | None = None, layouts: Layouts | None = None
) -> Plan:
    """Every run of `study` around the run whose tree is `base`.

    Args:
        study: The study.
        base: The tree of its base config.
        rates: What a sweep found; None: it has not been run to its end, and only its runs are ready.
        layouts: What a search found, by the cell's name; the others have the base's.

    Raises:
        UserError: a run breaks a rule, or a variant cannot be matched; says which.
    """
    layouts = layouts or {}
    cells = [_laid_out(cell, layouts) for cell in _cells(study, base)]
    runs: list[PlannedRun] = []
    if study.learning_rate.rule == "sweep":
        runs += _sweep_runs(study, cells)
    for cell in cells:
        rate = None if rates is None else rates[cell.variant, cell.size]
        runs += _runs_of(study, cell, rate)
    (name, times), *_ = Counter(run.name for run in runs).most_common(1)
    if times > 1:
        raise UserError(
            f"{times} runs of the study are named {name}; make sizes, levels and budgets differ more"
        )
    return Plan(study, tuple(runs), tuple(cells), layouts)


def _laid_out(cell: Cell, layouts: Layouts) -> Cell:
    if cell.name not in layouts:
        return cell
    return dataclasses.replace(cell, config=cell.config.replaced(dict(layouts[cell.name].changes)))


def _cells(study: Study, base: dict[str, Any]) -> Iterator[Cell]:
    for variant, size in itertools.product(study.variants, study.sizes):
        axes = [axis for axis, levels in study.axes.items() if _has_fields(study, variant, levels)]
        for chosen in itertools.product(*(study.axes[axis] for axis in axes)):
            levels = dict(zip(axes, chosen, strict=True))
            try:
                yield _build_cell(study, base, variant=variant, size=size, levels=levels)
            except UserError as error:
                place = ", ".join([f"variants.{variant}", f"sizes.{size}", *levels.values()])
                raise UserError(f"{place}: {error}") from None


def _build_cell(
    study: Study, base: dict[str, Any], *, variant: str, size: str, levels: Mapping[str, str]
) -> Cell:
    chosen = [study.axes[axis][level] for axis, level in levels.items()]
    of_attention = {name: value for fields in chosen for name, value in fields.items() if _is_attention(name)}
    others = {name: value for fields in chosen for name, value in fields.items() if not _is_attention(name)}
    tree = _overridden(base, study.sizes[size] | others)
    reference = build_run_config(tree)
    stated = study.variants[variant] | {
        name.removeprefix("attention."): value for name, value in of_attention.items()
    }
    tree["attention"] = model_attention(reference, _kind_of(study, variant)) | stated
    config = build_run_config(tree)
    if study.match != "none" and config != reference:
        solved = match(reference, config, axis=study.match, free=tuple(study.free), tolerance=study.tolerance)
        config = solved.config
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
    return cell if study.learning_rate.batch == "base" else _with_lawful_batch(study, cell)


def _with_lawful_batch(study: Study, cell: Cell) -> Cell:
    tokens = step_law_batch_tokens(wanted_tokens(study, cell, study.budgets.values[-1]))
    # Every rank takes whole micro batches.
    multiple = cell.config.training.micro_batch_size * study.machine.processes
    samples = max(1, round(tokens / cell.config.data.sequence_length / multiple)) * multiple
    return dataclasses.replace(cell, config=cell.config.replaced({"training.global_batch_size": samples}))


def _is_attention(name: str) -> bool:
    return name.startswith("attention.")


def _kind_of(study: Study, variant: str) -> str:
    return str(study.variants[variant].get("kind", variant))


def _has_fields(study: Study, variant: str, levels: Mapping[str, Overrides]) -> bool:
    known = resolve_kind(_kind_of(study, variant)).model_fields
    fields = {name for overrides in levels.values() for name in overrides if _is_attention(name)}
    return all(name.removeprefix("attention.") in known for name in fields)


def _overridden(base: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    tree = copy.deepcopy(base)
    for name, value in overrides.items():
        section, _, field = name.partition(".")
        if not field:
            raise UserError(f"{name}={value}: must read section.field, such as model.hidden_size: 256")
        tree.setdefault(section, {})[field] = value
    return tree


def _sweep_runs(study: Study, cells: Sequence[Cell]) -> Iterator[PlannedRun]:
    """Of each variant at the two smallest sizes: each factor, at the smallest budget and the first levels."""
    for cell in sweep_cells(study, cells):
        steps = _num_steps(study, cell, study.budgets.values[0])
        for factor in study.learning_rate.factors:
            name = f"{cell.name}-sweep-x{factor:g}"
            settings = {
                "optimizer.learning_rate": cell.config.optimizer.learning_rate * factor,
                "training.num_steps": steps,
                **(_decaying(study, steps) if study.trunks == "shared" else {}),
            }
            yield _planned("sweep", cell, study.budgets.values[0], _config(study, cell, name, settings))


def sweep_cells(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """Those in which a sweep tries learning rates."""
    smallest = sorted(study.sizes, key=lambda size: _base_parameters(cells, size))[:2]
    chosen: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        if cell.size in smallest:
            chosen.setdefault((cell.variant, cell.size), cell)
    return list(chosen.values())


def _base_parameters(cells: Sequence[Cell], size: str) -> int:
    return min(cell.base_parameters for cell in cells if cell.size == size)


def _runs_of(study: Study, cell: Cell, swept_rate: float | None) -> Iterator[PlannedRun]:
    is_ready = study.learning_rate.rule != "sweep" or swept_rate is not None
    budgets = study.budgets.values
    for index in range(study.num_seeds(cell.variant)):
        seed = cell.config.training.seed + index
        if study.trunks == "shared" and len(budgets) > 1:
            runs = _trunk_and_branches(study, cell, seed, swept_rate)
        else:
            runs = (_lone_run(study, cell, seed, swept_rate, budget) for budget in budgets)
        yield from (dataclasses.replace(run, is_ready=is_ready) for run in runs)


def _lone_run(study: Study, cell: Cell, seed: int, swept_rate: float | None, budget: float) -> PlannedRun:
    steps = _num_steps(study, cell, budget)
    settings = _settings(study, cell, seed, swept_rate, longest=steps) | {"training.num_steps": steps}
    if study.trunks == "shared":
        settings |= _decaying(study, steps)
    return _planned("run", cell, budget, _config(study, cell, _name(cell, budget, seed), settings))


def _trunk_and_branches(
    study: Study, cell: Cell, seed: int, swept_rate: float | None
) -> Iterator[PlannedRun]:
    steps = {budget: _num_steps(study, cell, budget) for budget in study.budgets.values}
    longest = max(steps.values())
    common = _settings(study, cell, seed, swept_rate, longest=longest) | {"training.order_steps": longest}
    parts = {budget: count - _decay_steps(study, count) for budget, count in steps.items()}
    trunk = f"{cell.name}-trunk-s{seed}"
    constant = {
        "schedule.kind": "constant",
        "schedule.decay_steps": None,
        "training.num_steps": max(parts.values()),
        "checkpoint.at_steps": sorted(set(parts.values())),
    }
    config = _config(study, cell, trunk, common | constant)
    budgets = study.budgets.values
    yield _planned("trunk", cell, budgets[-1], config)
    for budget in budgets:
        place = config.logging.run_directory + f"/checkpoints/{checkpoint_name(parts[budget])}"
        branching = {
            **_decaying(study, steps[budget]),
            "training.num_steps": steps[budget],
            "checkpoint.branch_from": place,
        }
        branch = _config(study, cell, _name(cell, budget, seed), common | branching)
        yield _planned("branch", cell, budget, branch, trunk=trunk, trunk_steps=parts[budget])


def _name(cell: Cell, budget: float, seed: int) -> str:
    return f"{cell.name}-{budget:g}-s{seed}"


def _planned(
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
        own_steps=config.training.num_steps - trunk_steps,
    )


def _settings(
    study: Study, cell: Cell, seed: int, swept_rate: float | None, *, longest: int
) -> dict[str, Any]:
    """Seed, batch and learning rate, for runs of up to `longest` steps of the base's batch."""
    rule, count = study.learning_rate, cell.parameters_without_embeddings
    rate = cell.config.optimizer.learning_rate
    if rule.rule == "kaplan":
        rate = kaplan_rate(count)
    elif rule.rule == "step_law":
        rate = step_law_rate(count, longest * cell.step_tokens)
    elif rule.rule == "sweep" and swept_rate is not None:
        rate = swept_rate
    return {"training.seed": seed, "optimizer.learning_rate": rate}


def _decay_steps(study: Study, steps: int) -> int:
    return max(1, round(study.decay_fraction * steps))


def _decaying(study: Study, steps: int) -> dict[str, Any]:
    return {
        "schedule.kind": "warmup_stable_decay",
        "schedule.decay_steps": _decay_steps(study, steps),
        "schedule.final_fraction": 0.0,
    }


def _num_steps(study: Study, cell: Cell, budget: float) -> int:
    """Whole steps that come nearest to the budget."""
    return max(1, round(wanted_tokens(study, cell, budget) / cell.step_tokens))


def wanted_tokens(study: Study, cell: Cell, budget: float) -> float:
    """Tokens of a budget, before they are rounded to whole steps."""
    return {
        "tokens": budget,
        "tokens_per_parameter": budget * cell.base_parameters,
        "flops": budget / cell.flops_per_token,
    }[study.budgets.rule]


def _config(study: Study, cell: Cell, name: str, settings: Mapping[str, Any]) -> RunConfig:
    directory = Path(study.directory) / "runs" / name
    try:
        return cell.config.replaced(
            {
                **settings,
                "logging.run_directory": str(directory),
                "checkpoint.resume": True,
                "checkpoint.keep_last": 1,
            }
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
