"""The benchmark of the simulation times the same function in both forms, against the least of work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fork_server import run_command
from tests.rank_pool import in_layout
from tests.tolerances import assert_near

SIZES = {"num_heads": 3, "head_dim": 8, "simulated_head_dim": 14, "sequence_length": 5, "batch_size": 2}


def both_forms() -> Any:
    """Results and gradients of the plain and the fused form; turned features by their own order."""
    from sas_megatron.attention.sas.fused.features import pair_order
    from sas_megatron.attention.sas.simulation_kernels import FusedKernels, PlainKernels
    from sas_megatron.benchmarks.block_shape import BlockShape
    from sas_megatron.benchmarks.simulation import SimulationCase
    from sas_megatron.config.parallel import ParallelConfig

    in_layout(ParallelConfig())
    case = SimulationCase(BlockShape(**SIZES), device=torch.device("cpu"), dtype=torch.float32)
    order = pair_order(14, 14)
    found = []
    for kernels in (PlainKernels(case.attention), FusedKernels(case.attention)):
        gradients = list(case.gradients)
        if kernels.applies_rope:
            gradients[:2] = [gradient[..., order] for gradient in gradients[:2]]
        results = case.run(kernels)
        found.append([[*results], [*torch.autograd.grad(results, case.leaves, gradients)]])
    found[0][0][:2] = [result[..., order] for result in found[0][0][:2]]
    return [[tensor.detach() for tensor in [*results, *gradients]] for results, gradients in found]


def test_both_forms_compute_the_same(ranks: Any) -> None:
    [(plain, fused)] = ranks(1).run(both_forms)
    assert len(plain) == len(fused) == 3 + 1 + 3 * 4 + 2 * 4
    for place, (mine, theirs) in enumerate(zip(fused, plain, strict=True)):
        assert_near(mine, theirs, torch.float32, str(place))


def least_work() -> Any:
    from sas_megatron.benchmarks.block_shape import BlockShape
    from sas_megatron.benchmarks.simulation import SimulationCase
    from sas_megatron.config.parallel import ParallelConfig

    in_layout(ParallelConfig())
    return SimulationCase(BlockShape(**SIZES), device=torch.device("cpu"), dtype=torch.float32).least_work()


def test_the_least_of_work_is_each_byte_once_and_each_product_once(ranks: Any) -> None:
    [work] = ranks(1).run(least_work)
    tokens, columns, made = 10, 9 * 8, 9 * (14 + 14 + 8)
    heads = 3 * 2 * 3 * 9 * (3 + 9) * 8
    features = 2 * 2 * 9 * 14 * (8 + 14)
    assert work["forward"] == (4 * tokens * (columns + made), tokens * (heads + features))
    assert work["backward"] == (4 * tokens * (2 * columns + made), 2 * tokens * (heads + features))


def swept() -> Any:
    """A sweep that warms nothing up, since the interpreter takes as long each time."""
    from sas_megatron.attention.sas.fused.tiling import Tile
    from sas_megatron.benchmarks import timing
    from sas_megatron.benchmarks.block_shape import BlockShape
    from sas_megatron.benchmarks.tile_sweep import sweep_tiles
    from sas_megatron.config.parallel import ParallelConfig

    in_layout(ParallelConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "WARM_UP_ROUNDS", 0)
        return sweep_tiles(
            BlockShape(**SIZES),
            device=torch.device("cpu"),
            dtype=torch.float32,
            repeats=1,
            kernels=["head_forward", "feature_refine_gradient"],
            tiles=[Tile(), Tile(rows=64)],
        )


def test_a_sweep_times_each_kernel_with_each_tile(ranks: Any) -> None:
    [rows] = ranks(1).run(swept)
    assert [(row["kernel"], row["rows"]) for row in rows] == [
        ("head_forward", 128),
        ("head_forward", 64),
        ("feature_refine_gradient", 128),
        ("feature_refine_gradient", 64),
    ]
    assert all(row["seconds"] > 0 for row in rows)


def refused_by_the_compiler() -> Any:
    """A sweep with a kernel that no tile can be compiled for, and what the command makes of it."""
    from sas_megatron.attention.sas.fused import feature_kernels
    from sas_megatron.cli.measurements import best_tiles

    class Refusing:
        arg_names = ()

        def __getitem__(self, grid: object) -> Any:
            raise RuntimeError("too many registers")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_kernels, "refine_gradient", Refusing())
        rows = swept()
    return rows, best_tiles(rows)


def test_a_tile_that_cannot_be_compiled_takes_no_other_s_seconds_along(ranks: Any) -> None:
    [(rows, shown)] = ranks(1).run(refused_by_the_compiler)
    problem = "RuntimeError: too many registers"
    assert [row.get("problem") for row in rows] == [None, None, problem, problem]
    assert shown[0][1].endswith("programs")
    assert shown[1] == ("feature_refine_gradient", f"no tile could be timed: {problem}")


def test_tiles_of_heads_that_cut_alike_are_timed_once() -> None:
    from sas_megatron.attention.sas.fused.tiling import Tile
    from sas_megatron.benchmarks.block_shape import BlockShape
    from sas_megatron.benchmarks.tile_sweep import candidate_tiles, unlike_tiles

    tiles = [Tile(programs=2), *candidate_tiles()]
    wide = BlockShape(num_heads=16, head_dim=128, simulated_head_dim=192, sequence_length=17, batch_size=2)
    # A tile of 64 rows would hold half of a token's 128 features, so it holds all of them, as one of 128.
    assert len(unlike_tiles("head_forward", wide, tiles)) == 8
    assert len(unlike_tiles("feature_forward", wide, tiles)) == 16


def test_the_command_prints_floors_and_draws_them(tmp_path: Path) -> None:
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]
    done = run_command(
        "bench", "simulation", *sizes, "--repeats", "1", "--output", "roofline.png", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["rows"]) == {"plain forward", "plain backward"}
    rates = result["ceilings"]
    for row in result["rows"].values():
        floor = max(
            row["bytes"] / rates["copied_bytes_per_second"], row["flops"] / rates["matrix_flops_per_second"]
        )
        assert row["over_floor"] == pytest.approx(row["seconds"] / floor)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_without_a_gpu_is_refused(tmp_path: Path) -> None:
    done = run_command("bench", "simulation", "--sweep", cwd=tmp_path)
    assert done.returncode == 2
    assert "--sweep: the fused kernels need a CUDA device; leave it out" in done.stderr
