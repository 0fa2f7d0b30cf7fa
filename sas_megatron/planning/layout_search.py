"""Which layout of a model on so many devices takes the least time, of those that fit into their memory.

every combination of degrees -> the config's own rules -> weights that fit by count alone
  -> simulated with one and two layers a pipeline chunk, from which the depth follows on a line
  -> micro batches grow while they fit and pay -> ranked by tokens a second
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import build_run_config, flatten_tree
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.model.costs import count_parameters
from sas_megatron.planning.hardware_file import Hardware
from sas_megatron.planning.rank_simulation import RankReport, simulate_rank
from sas_megatron.planning.simulation import for_hardware, stage_ranks
from sas_megatron.planning.step_estimate import StepEstimate, estimate_step
from sas_megatron.planning.tally import Tally

# Depths, in layers a chunk, that the line is drawn through.
SHALLOW_LAYERS = (1, 2)
# Of the step's seconds: what a layout may take longer in a term without a word about it.
NEGLIGIBLE_SHARE = 1e-4


@dataclass(frozen=True)
class Layout:
    """One legal layout that fits, and its estimate."""

    # What it differs in from the config given, as the command line takes it.
    overrides: list[str]
    peak_bytes: int
    step: StepEstimate
    # Where it takes longer than the first, largest first; None: it is the first.
    loses_by: str | None = None


@dataclass(frozen=True)
class LayoutSearch:
    """What a search found."""

    hardware: Hardware
    # Fastest first.
    ranked: list[Layout]
    num_legal: int
    num_too_large: int


def search_layouts(config: RunConfig, *, world_size: int, hardware: Hardware) -> LayoutSearch:
    """Ranks the layouts of `config` on `world_size` devices; the layout that it states is not favoured.

    Raises:
        UserError: no layout is legal, or the hardware file lacks a figure.
    """
    families: dict[tuple[Any, ...], list[RunConfig]] = {}
    for candidate in legal_layouts(config, world_size=world_size, hardware=hardware):
        families.setdefault(_family(candidate), []).append(candidate)
    if not families:
        raise UserError(
            f"world size={world_size}: no layout of this model and batch is legal on so many ranks; "
            "use another number, or another training.global_batch_size"
        )
    num_legal = sum(len(family) for family in families.values())
    layouts: list[Layout] = []
    with concurrent.futures.ProcessPoolExecutor(
        min(len(families), os.cpu_count() or 1), multiprocessing.get_context("spawn"), initializer=_ready
    ) as pool:
        jobs = [
            pool.submit(_try_family, config, family, world_size, hardware) for family in families.values()
        ]
        results = [job.result() for job in jobs]
    for found, _ in results:
        layouts.extend(found)
    ranked = sorted(layouts, key=lambda layout: layout.step.seconds)
    return LayoutSearch(
        hardware=hardware,
        ranked=[replace(layout, loses_by=_loss(layout.step, ranked[0].step)) for layout in ranked],
        num_legal=num_legal,
        num_too_large=sum(too_large for _, too_large in results),
    )


def legal_layouts(config: RunConfig, *, world_size: int, hardware: Hardware) -> Iterator[RunConfig]:
    """Every combination of degrees that the config's rules allow; small micro batches before large ones.

    Sequence parallelism goes with tensor parallelism, and the distributed optimizer with data
    parallelism: each sends the same bytes and holds less. Tensor groups stay within a node.
    """
    degrees = _divisors(world_size)
    axes: dict[str, list[Any]] = {
        "parallel.tensor": [degree for degree in degrees if degree <= hardware.devices_per_node],
        "parallel.context": degrees,
        "training.micro_batch_size": _divisors(config.training.global_batch_size),
    }
    for place in itertools.product(*axes.values()):
        chosen = dict(zip(axes, place, strict=True))
        try:
            candidate = with_layout(config, chosen, world_size=world_size)
            candidate.check_world_size(world_size)
        except UserError:
            continue
        if _weights_fit(candidate, hardware):
            yield candidate


def with_layout(config: RunConfig, chosen: dict[str, Any], *, world_size: int) -> RunConfig:
    """The config at the degrees chosen, with what follows; raises `UserError` as the config does."""
    tree = config.model_dump(mode="json")
    for name, value in chosen.items():
        section, field = name.split(".")
        tree[section][field] = value
    tree["parallel"]["sequence"] = tree["parallel"]["tensor"] > 1
    layout = ParallelConfig(**tree["parallel"])
    tree["optimizer"]["distributed"] = world_size > layout.model_size
    return build_run_config(tree)


def simulate_shallow(config: RunConfig, *, rank: int, world_size: int) -> RankReport:
    """`simulate_rank` from one and two layers a pipeline chunk: all that is counted is a line in depth."""
    chunks = getattr(config.parallel, "pipeline", 1) * getattr(config.parallel, "virtual_pipeline", 1)
    depth = config.model.num_layers / chunks
    if depth <= max(SHALLOW_LAYERS):
        return simulate_rank(config, rank=rank, world_size=world_size)
    near, far = (
        simulate_rank(_at_depth(config, chunks * layers), rank=rank, world_size=world_size)
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
        if isinstance(first, Tally):
            values[field.name] = first + (second + first * -1) * beyond
        elif isinstance(first, int):
            values[field.name] = round(first + (second - first) * beyond)
        else:
            values[field.name] = first
    return RankReport(**values)


def _at_depth(config: RunConfig, num_layers: int) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"num_layers": num_layers})})


def _try_family(
    config: RunConfig, family: list[RunConfig], world_size: int, hardware: Hardware
) -> tuple[list[Layout], int]:
    """The layouts of equal degrees that fit, and how many do not; micro batches grow while that pays."""
    found: list[Layout] = []
    for index, candidate in enumerate(family):
        simulated = for_hardware(candidate, hardware)
        ends = {stage_ranks(candidate, world_size)[place] for place in (0, -1)}
        reports = [simulate_shallow(simulated, rank=rank, world_size=world_size) for rank in sorted(ends)]
        peak_bytes = max(report.peak_bytes for report in reports)
        if not hardware.fits(peak_bytes):
            return found, len(family) - index
        step = estimate_step(candidate, reports, hardware=hardware, world_size=world_size)
        if found and step.seconds > found[-1].step.seconds:
            break
        found.append(Layout(_overrides(config, candidate), peak_bytes, step))
    return found, 0


def _ready() -> None:
    from sas_megatron.platform.device import prepare_device

    prepare_device()


def _family(config: RunConfig) -> tuple[Any, ...]:
    """What layouts have in common that differ in their micro batch alone."""
    return tuple(config.parallel.model_dump().values())


def _weights_fit(config: RunConfig, hardware: Hardware) -> bool:
    """Whether parameters and float32 gradients alone fit, evenly shared; the rest is simulated."""
    parameters = sum(count_parameters(config).values())
    shared_by = config.parallel.tensor * getattr(config.parallel, "pipeline", 1)
    element_bytes = {"float32": 4, "bfloat16": 2}[config.training.precision]
    return hardware.fits(parameters / shared_by * (element_bytes + 4))


def _overrides(config: RunConfig, layout: RunConfig) -> list[str]:
    before, after = (flatten_tree(value.model_dump(mode="json")) for value in (config, layout))
    changed = [name for name, value in after.items() if before.get(name) != value]
    return [f"{name}={str(after[name]).lower()}" for name in changed] or [
        f"parallel.tensor={layout.parallel.tensor}"
    ]


def _loss(step: StepEstimate, first: StepEstimate) -> str | None:
    """The two terms in which a layout takes longest beyond the first, in milliseconds."""
    if step is first:
        return None
    names = dict.fromkeys([*step.terms_seconds, *first.terms_seconds])
    more = {name: step.terms_seconds.get(name, 0.0) - first.terms_seconds.get(name, 0.0) for name in names}
    visible = NEGLIGIBLE_SHARE * first.seconds
    worst = sorted((name for name in more if more[name] > visible), key=lambda name: -more[name])[:2]
    return ", ".join(f"{name} +{1e3 * more[name]:.3g} ms" for name in worst)


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
