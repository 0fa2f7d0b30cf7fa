"""Which layout of a model on so many devices takes the least time, of those that fit into their memory.

every combination of degrees -> the config's own rules -> weights that fit by count alone
  -> by a rough cost (`layout_screening`), until that alone exceeds the best found
  -> simulated with one and two layers a pipeline chunk, from which the depth follows on a line
  -> ranked by time
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from sas_megatron.config.differences import find_differences
from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.planning.hardware_file import Hardware
from sas_megatron.planning.layout_screening import (
    AloneCost,
    legal_layouts,
    rough_seconds,
    weights_fit,
    with_layout,
)
from sas_megatron.planning.rank_estimate import RankReport, estimate_rank
from sas_megatron.planning.run_estimate import adapt_to_hardware, stage_ranks
from sas_megatron.planning.step_estimate import StepEstimate, estimate_step
from sas_megatron.planning.workload import Workload
from sas_megatron.platform.device import prepare_device

# Depths, in layers a chunk, that the line is drawn through.
SHALLOW_LAYERS = (1, 2)
# Where the rough cost is a poor bound.
MOST_FAMILIES_THAT_FIT = 16
# A micro batch whose rough cost is so near to its family's least is large enough.
ENOUGH = 1.02
# Of the step's seconds: what a layout may take longer in a term without a word about it.
NEGLIGIBLE_SHARE = 1e-4


# Layouts that differ in their micro batch alone, smallest first, with their rough seconds.
Family = list[tuple[RunConfig, float]]


@dataclass(frozen=True)
class Layout:
    """One legal layout that fits, and its estimate."""

    config: RunConfig
    peak_bytes: int
    step: StepEstimate
    # Where it takes longer than the first, largest first; None: it is the first.
    loses_by: str | None = None


@dataclass(frozen=True)
class LayoutSearch:
    """What a search found."""

    # As it was given.
    config: RunConfig
    hardware: Hardware
    # Fastest first.
    ranked: list[Layout]
    num_legal: int
    # Families differ in more than their micro batch; the most promising ones were simulated.
    num_families: int
    num_simulated_families: int

    def overrides(self, layout: Layout) -> list[str]:
        """What a layout differs in from the config given, as the command line takes it."""
        changed = find_differences([self.config, layout.config])
        return [f"{name}={str(value).lower()}" for name, (_, value) in changed.items()] or [
            f"parallel.tensor={layout.config.parallel.tensor}"
        ]


def search_layouts(
    config: RunConfig,
    *,
    world_size: int,
    hardware: Hardware,
    announce: Callable[[str], None] = lambda _text: None,
) -> LayoutSearch:
    """Ranks the layouts of `config` on `world_size` devices; the layout that it states is not favoured.

    Args:
        config: the run.
        world_size: number of devices.
        hardware: what they are.
        announce: is told how far the search is, now and then.

    Raises:
        UserError: no layout is legal, or the hardware file lacks a figure.
    """
    legal = list(legal_layouts(config, world_size=world_size, hardware=hardware))
    if not legal:
        raise UserError(
            f"world size={world_size}: no layout of this model and batch is legal on so many ranks; "
            "use another number, or another training.global_batch_size"
        )
    families: dict[tuple[Any, ...], list[RunConfig]] = {}
    for candidate in legal:
        if weights_fit(candidate, hardware):
            families.setdefault(_family(candidate), []).append(candidate)
    rough = functools.partial(
        rough_seconds,
        alone=_alone_cost(config, hardware),
        world_size=world_size,
        hardware=hardware,
    )
    promising = sorted(
        ([(candidate, rough(candidate)) for candidate in family] for family in families.values()),
        key=lambda family: min(seconds for _, seconds in family),
    )
    found, num_simulated = _simulate_families(
        promising, world_size=world_size, hardware=hardware, announce=announce
    )
    ranked = sorted(found, key=lambda layout: layout.step.seconds)
    return LayoutSearch(
        config=config,
        hardware=hardware,
        ranked=[replace(layout, loses_by=_loss(layout.step, ranked[0].step)) for layout in ranked],
        num_legal=len(legal),
        num_families=len({_family(candidate) for candidate in legal}),
        num_simulated_families=num_simulated,
    )


def _alone_cost(config: RunConfig, hardware: Hardware) -> AloneCost:
    alone = with_layout(
        config,
        {
            "parallel.tensor": 1,
            "parallel.context": 1,
            "parallel.pipeline": 1,
            "parallel.virtual_pipeline": 1,
            "training.recompute": "none",
            "training.global_batch_size": config.training.micro_batch_size,
        },
        world_size=1,
    )
    report = extrapolate_rank(adapt_to_hardware(alone, hardware), rank=0, world_size=1)
    step = estimate_step(alone, [report], hardware=hardware, world_size=1)
    operations = sum(report.microbatches.operations.values())
    return AloneCost(step.terms_seconds["compute"] / step.tokens, operations)


def _simulate_families(
    families: list[Family],
    *,
    world_size: int,
    hardware: Hardware,
    announce: Callable[[str], None],
) -> tuple[list[Layout], int]:
    """Layouts of the families that may hold the fastest, and how many families were tried.

    The rough cost leaves much out, so a family with more of it than the best layout found cannot win.
    """
    workers = max(1, min(len(families), os.cpu_count() or 1))
    found: list[Layout] = []
    num_tried = num_fitting = 0
    with concurrent.futures.ProcessPoolExecutor(
        # By itself the first thing that a worker imports: Megatron-core must find the CPU's stand-in.
        workers,
        multiprocessing.get_context("spawn"),
        initializer=prepare_device,
    ) as pool:
        while num_tried < len(families) and num_fitting < MOST_FAMILIES_THAT_FIT:
            best_seconds = min((layout.step.seconds for layout in found), default=math.inf)
            if min(seconds for _, seconds in families[num_tried]) > best_seconds:
                break
            batch = families[num_tried : num_tried + workers]
            jobs = [pool.submit(_try_family, family, world_size, hardware) for family in batch]
            num_tried += len(batch)
            for job in jobs:
                layouts = job.result()
                found.extend(layouts)
                num_fitting += bool(layouts)
            announce(f"simulated {num_tried} kinds of layouts, {num_fitting} of them fit")
    return found, num_tried


def extrapolate_rank(config: RunConfig, *, rank: int, world_size: int) -> RankReport:
    """`estimate_rank` from one and two layers a pipeline chunk: all that is counted is a line in depth."""
    chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    depth = config.model.num_layers / chunks
    if depth <= max(SHALLOW_LAYERS):
        return estimate_rank(config, rank=rank, world_size=world_size)
    near, far = (
        estimate_rank(_at_depth(config, chunks * layers), rank=rank, world_size=world_size)
        for layers in SHALLOW_LAYERS
    )
    return extrapolate_depth(
        near, far, beyond=(depth - SHALLOW_LAYERS[0]) / (SHALLOW_LAYERS[1] - SHALLOW_LAYERS[0])
    )


def extrapolate_depth(near: RankReport, far: RankReport, *, beyond: float) -> RankReport:
    """The report `beyond` times the difference of the two from the first."""
    values: dict[str, Any] = {}
    for field in fields(RankReport):
        first, second = getattr(near, field.name), getattr(far, field.name)
        if isinstance(first, Workload):
            values[field.name] = first + (second + first * -1) * beyond
        elif isinstance(first, int):
            values[field.name] = round(first + (second - first) * beyond)
        else:
            values[field.name] = first
    return RankReport(**values)


def _at_depth(config: RunConfig, num_layers: int) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": num_layers})})


def _try_family(family: Family, world_size: int, hardware: Hardware) -> list[Layout]:
    """Of equal degrees: the micro batch that should be large enough, and the next, or one that fits."""
    least = min(seconds for _, seconds in family)
    enough = next(place for place, (_, seconds) in enumerate(family) if seconds <= ENOUGH * least)
    found: list[Layout] = []
    for place in (enough, enough + 1):
        if place < len(family) and (layout := _try(family[place][0], world_size, hardware)):
            found.append(layout)
    smaller = enough - 1
    while not found and smaller >= 0:
        if layout := _try(family[smaller][0], world_size, hardware):
            found.append(layout)
        smaller -= 1
    return found


def _try(candidate: RunConfig, world_size: int, hardware: Hardware) -> Layout | None:
    """The layout simulated, or None where it does not fit."""
    simulated = adapt_to_hardware(candidate, hardware)
    ends = {stage_ranks(candidate, world_size)[place] for place in (0, -1)}
    reports = [extrapolate_rank(simulated, rank=rank, world_size=world_size) for rank in sorted(ends)]
    peak_bytes = max(report.peak_bytes for report in reports)
    if not hardware.fits(peak_bytes):
        return None
    step = estimate_step(candidate, reports, hardware=hardware, world_size=world_size)
    return Layout(candidate, peak_bytes, step)


def _family(config: RunConfig) -> tuple[Any, ...]:
    """What layouts have in common that differ in their micro batch alone."""
    return (*config.parallel.model_dump().values(), config.training.recompute)


def _loss(step: StepEstimate, first: StepEstimate) -> str | None:
    """The two terms in which a layout takes longest beyond the first, in milliseconds."""
    if step is first:
        return None
    names = dict.fromkeys([*step.terms_seconds, *first.terms_seconds])
    more = {name: step.terms_seconds.get(name, 0.0) - first.terms_seconds.get(name, 0.0) for name in names}
    visible = NEGLIGIBLE_SHARE * first.seconds
    worst = sorted((name for name in more if more[name] > visible), key=lambda name: -more[name])[:2]
    return ", ".join(f"{name} +{1e3 * more[name]:.3g} ms" for name in worst)
