"""Settings of CUDA, NCCL and torch follow from the config, in whatever way the process was started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sas_megatron.config.errors import FieldError
from sas_megatron.platform.gpu_settings import apply_gpu_settings
from sas_megatron.preflight.finding import Severity
from sas_megatron.preflight.node import check_environment
from tests.run_configs import small_config

VARIABLES = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture(autouse=True)
def unset_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start without the variables, and undo the settings afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def applied(**training: Any) -> dict[str, str]:
    apply_gpu_settings(small_config(training=training).training)
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_only_megatrons_engine_uses_a_single_hardware_queue() -> None:
    assert applied(engine="deepspeed") == {}
    assert applied(engine="megatron") == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_variables_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "NCCL_ALGO": "Tree",
    }
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert applied(deterministic=True) == chosen


def test_deterministic_training_sets_torch_cublas_and_nccl() -> None:
    found = applied(deterministic=True, engine="deepspeed")
    assert found == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "^NVLS"}
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    applied(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("algorithm", ["NVLS", "NVLSTree", "Ring,NVLS"])
def test_an_algorithm_without_a_fixed_order_is_refused(
    monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    monkeypatch.setenv("NCCL_ALGO", algorithm)
    assert "NCCL_ALGO" in applied(deterministic=False)
    with pytest.raises(FieldError, match=f"NCCL_ALGO={algorithm}: .*training.deterministic=true; unset it"):
        applied(deterministic=True)


@pytest.mark.parametrize(
    ("engine", "value", "remedy"),
    [
        ("megatron", None, None),
        ("megatron", "1", None),
        ("megatron", "8", "unset it, or set it to 1"),
        ("deepspeed", None, None),
        ("deepspeed", "1", "unset it: a single hardware queue serializes"),
        ("deepspeed", "8", None),
        (None, "8", None),
    ],
)
def test_the_doctor_reports_a_number_of_queues_that_does_not_suit_the_engine(
    engine: str | None, value: str | None, remedy: str | None
) -> None:
    environment = {"OMP_NUM_THREADS": "1"} | ({} if value is None else {VARIABLES[0]: value})
    warnings = [
        finding
        for finding in check_environment(environment, engine=engine, uses_gpus=True)
        if finding.verdict != Severity.FINE
    ]
    assert [warning.remedy.startswith(remedy or "") for warning in warnings] == [True] * (remedy is not None)
