"""The least time of a computation, and the plot of measurements under the roofline."""

from __future__ import annotations

from sas_megatron.benchmarks.roofline import Ceilings, Point, draw_roofline

CEILINGS = Ceilings(copied_bytes_per_second=4e12, matrix_flops_per_second=8e14)


def test_the_least_time_is_the_larger_of_memory_and_compute_time() -> None:
    assert CEILINGS.floor_seconds(num_bytes=8e9, flops=8e11) == 2e-3
    assert CEILINGS.floor_seconds(num_bytes=8e8, flops=8e11) == 1e-3


def test_equal_measurements_give_equal_plots_and_others_do_not() -> None:
    points = [Point("forward", flops=1e12, num_bytes=1e9, seconds=2e-3), Point("b", 1e9, 1e9, 1e-3)]
    picture = draw_roofline(points, CEILINGS, title="made up")
    assert picture.startswith(b"\x89PNG")
    assert picture == draw_roofline(points, CEILINGS, title="made up")
    slower = [Point("forward", flops=1e12, num_bytes=1e9, seconds=4e-3), points[1]]
    assert picture != draw_roofline(slower, CEILINGS, title="made up")
