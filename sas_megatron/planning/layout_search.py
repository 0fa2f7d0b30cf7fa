"""Find the fastest layouts of a model on a number of devices, among the layouts that fit into memory.

every combination of degrees -> the rules of the config -> weights that fit by their number alone
  -> in order of a rough cost (`layout_screening`), until it exceeds the time of the best layout found
  -> estimated with one and two layers per pipeline chunk, and extrapolated linearly to all layers
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

from sas_megatron.config.errors import FieldError
from sas_megatron.config.loading import find_differences
from sas_megatron.config.run import RunConfig
from sas_megatron.planning.hardware_file import Hardware
from sas_megatron.planning.layout_screening import (
    SingleDeviceCost,
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

# Layers per pipeline chunk of the two models from which the full depth is extrapolated.
SHALLOW_LAYERS = (1, 2)
# The search stops after this many families that fit, since the rough cost can be a loose bound.
MAX_FITTING_FAMILIES = 16
# A micro batch size is tried if its rough cost is within this factor of the lowest cost in its family.
LARGE_ENOUGH_FACTOR = 1.02
# Differences in a term below this share of the step time are not reported.
NEGLIGIBLE_SHARE = 1e-4

# Layouts that differ only in their micro batch, smallest first, with their rough seconds.
Family = list[tuple[RunConfig, float]]


@dataclass(frozen=True)
class Layout:
    """One legal layout that fits into memory, and its estimate."""

    config: RunConfig
    peak_bytes: int
    step: StepEstimate
    # Terms that take longer than in the fastest layout, largest first; None for the fastest layout.
    loses_by: str | None = None


@dataclass(frozen=True)
class LayoutSearch:
    """Result of a search."""

    # The config as given to the search.
    config: RunConfig
    hardware: Hardware
    # Fastest first.
    ranked: list[Layout]
    num_legal: int
    # The layouts of a family differ only in their micro batch. The most promising families are estimated.
    num_families: int
    num_estimated_families: int

    def overrides(self, layout: Layout) -> list[str]:
        """Return the fields of a layout that differ from the given config, as command-line overrides."""
        changed = find_differences([self.config, layout.config])
        return [f"{name}={str(value).lower()}" for name, (_, value) in changed.items()] or [
            f"parallel.tensor={layout.config.parallel.tensor}"
        ]


def search_layouts(
    config: RunConfig,
    *,
    world_size: int,
    hardware: Hardware,
    report_progress: Callable[[str], None] = lambda _text: None,
) -> LayoutSearch:
    """Rank the layouts of `config` on `world_size` devices. The layout in `config` gets no preference.

    Args:
        config: The run.
        world_size: Number of devices.
        hardware: Figures of the devices.
        report_progress: Called with a line of text after each batch of estimates.

    Raises:
        UserError: No layout is legal, or the hardware file lacks a figure.
    """
    legal = list(legal_layouts(config, world_size=world_size, hardware=hardware))
    if not legal:
        raise FieldError(
            "world size",
            world_size,
            "no layout of this model and batch is legal on this number of ranks",
            "use another number, or another training.global_batch_size",
        )
    families: dict[tuple[Any, ...], list[RunConfig]] = {}
    for candidate in legal:
        if weights_fit(candidate, hardware):
            families.setdefault(_family_key(candidate), []).append(candidate)
    rough = functools.partial(
        rough_seconds,
        single_device=_estimate_single_device(config, hardware),
        world_size=world_size,
        hardware=hardware,
    )
    promising = sorted(
        ([(candidate, rough(candidate)) for candidate in family] for family in families.values()),
        key=lambda family: min(seconds for _, seconds in family),
    )
    found, num_estimated = _estimate_families(
        promising, world_size=world_size, hardware=hardware, report_progress=report_progress
    )
    ranked = sorted(found, key=lambda layout: layout.step.seconds)
    return LayoutSearch(
        config=config,
        hardware=hardware,
        ranked=[replace(layout, loses_by=_slower_terms(layout.step, ranked[0].step)) for layout in ranked],
        num_legal=len(legal),
        num_families=len({_family_key(candidate) for candidate in legal}),
        num_estimated_families=num_estimated,
    )


def _estimate_single_device(config: RunConfig, hardware: Hardware) -> SingleDeviceCost:
    single = with_layout(
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
    report = extrapolate_rank(adapt_to_hardware(single, hardware), rank=0, world_size=1)
    step = estimate_step(single, [report], hardware=hardware, world_size=1)
    operations = sum(report.microbatches.operations.values())
    return SingleDeviceCost(step.terms_seconds["compute"] / step.tokens, operations)


def _estimate_families(
    families: list[Family],
    *,
    world_size: int,
    hardware: Hardware,
    report_progress: Callable[[str], None],
) -> tuple[list[Layout], int]:
    """Return the layouts of the families that may contain the fastest one, and the number of these families.

    The rough cost leaves out several terms, so a family whose rough cost exceeds the time of the best layout
    found so far cannot contain a faster one.
    """
    num_workers = max(1, min(len(families), os.cpu_count() or 1))
    found: list[Layout] = []
    num_estimated = num_fitting = 0
    with concurrent.futures.ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("spawn"),
        # Megatron-core may be imported only after the CPU replacements for CUDA calls are installed.
        initializer=prepare_device,
    ) as pool:
        while num_estimated < len(families) and num_fitting < MAX_FITTING_FAMILIES:
            best_seconds = min((layout.step.seconds for layout in found), default=math.inf)
            if min(seconds for _, seconds in families[num_estimated]) > best_seconds:
                break
            batch = families[num_estimated : num_estimated + num_workers]
            jobs = [pool.submit(_estimate_family, family, world_size, hardware) for family in batch]
            num_estimated += len(batch)
            for job in jobs:
                layouts = job.result()
                found.extend(layouts)
                num_fitting += bool(layouts)
            report_progress(f"estimated {num_estimated} families of layouts, {num_fitting} of them fit")
    return found, num_estimated


def extrapolate_rank(config: RunConfig, *, rank: int, world_size: int) -> RankReport:
    """Return the report of `estimate_rank`, extrapolated from one and two layers per pipeline chunk.

    All counts are linear in the number of layers.
    """
    chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    depth = config.model.num_layers / chunks
    if depth <= max(SHALLOW_LAYERS):
        return estimate_rank(config, rank=rank, world_size=world_size)
    first, second = (
        estimate_rank(_with_num_layers(config, chunks * layers), rank=rank, world_size=world_size)
        for layers in SHALLOW_LAYERS
    )
    factor = (depth - SHALLOW_LAYERS[0]) / (SHALLOW_LAYERS[1] - SHALLOW_LAYERS[0])
    return extrapolate_depth(first, second, factor=factor)


def extrapolate_depth(first: RankReport, second: RankReport, *, factor: float) -> RankReport:
    """Return first + factor · (second − first), field by field."""
    values: dict[str, Any] = {}
    for field in fields(RankReport):
        start, end = getattr(first, field.name), getattr(second, field.name)
        if isinstance(start, Workload):
            values[field.name] = start + (end + start * -1) * factor
        elif isinstance(start, int):
            values[field.name] = round(start + (end - start) * factor)
        else:
            values[field.name] = start
    return RankReport(**values)


def _with_num_layers(config: RunConfig, num_layers: int) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": num_layers})})


def _estimate_family(family: Family, world_size: int, hardware: Hardware) -> list[Layout]:
    """Estimate the smallest micro batch that is large enough and the next one; else the largest that fits."""
    least = min(seconds for _, seconds in family)
    large_enough = next(
        index for index, (_, seconds) in enumerate(family) if seconds <= LARGE_ENOUGH_FACTOR * least
    )
    found: list[Layout] = []
    for index in (large_enough, large_enough + 1):
        if index < len(family) and (layout := _estimate_layout(family[index][0], world_size, hardware)):
            found.append(layout)
    smaller = large_enough - 1
    while not found and smaller >= 0:
        if layout := _estimate_layout(family[smaller][0], world_size, hardware):
            found.append(layout)
        smaller -= 1
    return found


def _estimate_layout(candidate: RunConfig, world_size: int, hardware: Hardware) -> Layout | None:
    """Return the estimate of a layout, or None if it does not fit into memory."""
    adapted = adapt_to_hardware(candidate, hardware)
    end_ranks = {stage_ranks(candidate, world_size)[stage] for stage in (0, -1)}
    reports = [extrapolate_rank(adapted, rank=rank, world_size=world_size) for rank in sorted(end_ranks)]
    peak_bytes = max(report.peak_bytes for report in reports)
    if not hardware.fits(peak_bytes):
        return None
    step = estimate_step(candidate, reports, hardware=hardware, world_size=world_size)
    return Layout(candidate, peak_bytes, step)


def _family_key(config: RunConfig) -> tuple[Any, ...]:
    """Return the fields that layouts which differ only in their micro batch have in common."""
    return (*config.parallel.model_dump().values(), config.training.recompute)


def _slower_terms(step: StepEstimate, fastest: StepEstimate) -> str | None:
    """Return the two terms that exceed the fastest layout's by most, in milliseconds."""
    if step is fastest:
        return None
    names = dict.fromkeys([*step.terms_seconds, *fastest.terms_seconds])
    excess = {
        name: step.terms_seconds.get(name, 0.0) - fastest.terms_seconds.get(name, 0.0) for name in names
    }
    visible = NEGLIGIBLE_SHARE * fastest.seconds
    worst = sorted((name for name in excess if excess[name] > visible), key=lambda name: -excess[name])[:2]
    return ", ".join(f"{name} +{1e3 * excess[name]:.3g} ms" for name in worst)
