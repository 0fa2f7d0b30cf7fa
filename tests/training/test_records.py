"""Console lines have Megatron's form, with a timestamp, peak memory, FLOP convention, and MFU if known."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.planning.hardware_file import find_peak_flops
from tests.run_configs import small_config

SECONDS = 0.5
TIMESTAMP = r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "


def log_one_step(config: RunConfig, *, is_rank0: bool = True, peak_flops: float | None = None) -> None:
    """Log a step of `SECONDS` on two ranks, without writing files."""
    from sas_megatron.training.metrics import Progress
    from sas_megatron.training.records import Recorder
    from sas_megatron.training.step import StepResult

    topology: Any = SimpleNamespace(is_rank0=is_rank0, world_size=2, device=torch.device("cpu"))
    recorder = Recorder(config, topology, peak_flops=peak_flops)
    recorder._files = None
    result = StepResult(
        loss=2.5,
        gradient_norm=0.75,
        learning_rate=0.01,
        is_applied=True,
        findings=[],
        non_finite_losses=[],
        stop_requested=False,
    )
    recorder.log_step(Progress(step=3, consumed_samples=12), result, SECONDS)
    recorder.log("a message")


def flops_per_second_and_rank(config: RunConfig) -> float:
    tokens = config.training.global_batch_size * config.data.sequence_length
    return tokens * sum(count_training_flops(config).values()) / SECONDS / 2


def test_a_step_is_logged_in_megatrons_form(capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config()
    log_one_step(config)
    step, message = capsys.readouterr().out.splitlines()
    teraflops = flops_per_second_and_rank(config) / 1e12
    expected = (
        "iteration        3/       9 | consumed samples:           12 | "
        "elapsed time per iteration (ms): 500.0 | "
        f"throughput per GPU (TFLOP/s/GPU, model FLOPs, full attention matrix): {teraflops:.3f} | "
        "peak memory of rank 0 (GiB): MEMORY | learning rate: 1.000000E-02 | global batch size:     4 | "
        "lm loss: 2.500000E+00 | grad norm: 0.750 |"
    )
    pattern = re.escape(expected).replace("MEMORY", r"(\d+\.\d\d)")
    matched = re.fullmatch(TIMESTAMP + pattern, step)
    assert matched, step
    assert 0.05 < float(matched[1]) < 100
    assert re.fullmatch(TIMESTAMP + "a message", message)


def test_the_mfu_is_logged_if_the_peak_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config()
    log_one_step(config, peak_flops=4 * flops_per_second_and_rank(config))
    assert "full attention matrix): 0.000 | MFU: 25.0% | peak memory" in capsys.readouterr().out


def test_only_rank_0_logs(capsys: pytest.CaptureFixture[str]) -> None:
    log_one_step(small_config(), is_rank0=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA H100 80GB HBM3", "float8", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", None),
    ],
)
def test_the_peak_is_that_of_the_gpus_hardware_file(gpu: str, dtype: str, peak: float | None) -> None:
    assert find_peak_flops(gpu, dtype) == peak
