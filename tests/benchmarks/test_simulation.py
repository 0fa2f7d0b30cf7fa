"""The simulation benchmark times equal functions of plain and fused kernels, against the least work."""

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
    """Return results and gradients of plain and fused kernels. Query and key features are in pair order."""
    from sas_megatron.attention.sas.fused.features import pair_order
    from sas_megatron.attention.sas.simulation_kernels import FusedKernels, PlainKernels
    from sas_megatron.benchmarks.attention_blocks import BlockShape
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


def test_plain_and_fused_kernels_compute_the_same_function(ranks: Any) -> None:
    [(plain, fused)] = ranks(1).run(both_forms)
    assert len(plain) == len(fused) == 3 + 1 + 3 * 4 + 2 * 4
    for index, (actual, expected) in enumerate(zip(fused, plain, strict=True)):
        assert_near(actual, expected, torch.float32, str(index))


def least_work() -> Any:
    from sas_megatron.benchmarks.attention_blocks import BlockShape
    from sas_megatron.benchmarks.simulation import SimulationCase
    from sas_megatron.config.parallel import ParallelConfig

    in_layout(ParallelConfig())
    return SimulationCase(BlockShape(**SIZES), device=torch.device("cpu"), dtype=torch.float32).least_work()


def test_the_least_work_counts_each_byte_and_each_product_once(ranks: Any) -> None:
    [work] = ranks(1).run(least_work)
    tokens, columns, outputs = 10, 9 * 8, 9 * (14 + 14 + 8)
    heads = 3 * 2 * 3 * 9 * (3 + 9) * 8
    features = 2 * 2 * 9 * 14 * (8 + 14)
    assert work["forward"] == (4 * tokens * (columns + outputs), tokens * (heads + features))
    assert work["backward"] == (4 * tokens * (2 * columns + outputs), 2 * tokens * (heads + features))


def sweep() -> Any:
    """Sweep without warm-up rounds, which do not make Triton's interpreter faster."""
    from sas_megatron.attention.sas.fused.features import Tile
    from sas_megatron.benchmarks import timing
    from sas_megatron.benchmarks.attention_blocks import BlockShape
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
    [rows] = ranks(1).run(sweep)
    assert [(row["kernel"], row["rows"]) for row in rows] == [
        ("head_forward", 128),
        ("head_forward", 64),
        ("feature_refine_gradient", 128),
        ("feature_refine_gradient", 64),
    ]
    assert all(row["seconds"] > 0 for row in rows)


def sweep_with_compiler_errors() -> Any:
    """Sweep a kernel that cannot be compiled with any tile, and return the rows that the command prints."""
    from sas_megatron.attention.sas.fused import feature_kernels
    from sas_megatron.cli.bench_tables import tile_rows

    class FailingKernel:
        arg_names = ()

        def __getitem__(self, grid: object) -> Any:
            raise RuntimeError("too many registers")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_kernels, "refine_gradient", FailingKernel())
        rows = sweep()
    return rows, tile_rows(rows)


def test_a_tile_that_cannot_be_compiled_does_not_discard_other_times(ranks: Any) -> None:
    [(rows, shown)] = ranks(1).run(sweep_with_compiler_errors)
    problem = "RuntimeError: too many registers"
    assert [row.get("problem") for row in rows] == [None, None, problem, problem]
    assert shown[1][1].endswith("programs")
    assert shown[2] == ("feature_refine_gradient", f"no tile could be timed: {problem}")


def test_head_tiles_that_divide_the_work_equally_are_timed_once() -> None:
    from sas_megatron.attention.sas.fused.features import Tile
    from sas_megatron.benchmarks.attention_blocks import BlockShape
    from sas_megatron.benchmarks.tile_sweep import candidate_tiles, distinct_tiles

    tiles = [Tile(programs=2), *candidate_tiles()]
    wide = BlockShape(num_heads=16, head_dim=128, simulated_head_dim=192, sequence_length=17, batch_size=2)
    # A tile of 64 rows would contain half of the 128 features of a token, so it is enlarged to 128 rows.
    assert len(distinct_tiles("head_forward", wide, tiles)) == 8
    assert len(distinct_tiles("feature_forward", wide, tiles)) == 16


def test_the_command_prints_least_times_and_draws_the_roofline(tmp_path: Path) -> None:
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


def test_a_sweep_without_a_gpu_is_an_error(tmp_path: Path) -> None:
    done = run_command("bench", "simulation", "--sweep", cwd=tmp_path)
    assert done.returncode == 2
    assert "--sweep: the fused kernels need a CUDA device; leave it out" in done.stderr
