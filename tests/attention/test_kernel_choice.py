"""`attention.kernel=auto` selects the kernels that hardware and sizes allow, and logs the reason."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sas_megatron.attention.sas import simulation_kernels
from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.costs import find_misfit, find_unfused_reason
from sas_megatron.attention.sas.layer import SimulatedSelfAttention
from sas_megatron.attention.sas.simulation_kernels import (
    FusedKernels,
    PlainKernels,
    build_simulation_kernels,
    check_kernel,
)
from sas_megatron.config.errors import FieldError
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.shipped_configs import shipped_configs


def sas(**fields: Any) -> SimulatedAttentionConfig:
    return SimulatedAttentionConfig(**{"num_heads": 16, "head_dim": 128, **fields})


@pytest.fixture(autouse=True)
def _forget_logged_choices() -> Iterator[None]:
    simulation_kernels._log_once.cache_clear()
    yield
    simulation_kernels._log_once.cache_clear()


def test_auto_selects_fused_kernels_only_in_bfloat16_on_a_gpu() -> None:
    assert find_unfused_reason(sas(), device="gpu", element_bytes=2) is None
    assert find_unfused_reason(sas(), device="cpu", element_bytes=2) == "the fused kernels need a CUDA device"
    assert (
        find_unfused_reason(sas(), device="gpu", element_bytes=4) == "the fused kernels are made for bfloat16"
    )


def test_shipped_configs_fit_in_shared_memory() -> None:
    shipped = [load_run_config(path).attention for path in sorted(shipped_configs().rglob("sas*.yaml"))]
    assert len(shipped) > 4
    for attention in shipped:
        assert isinstance(attention, SimulatedAttentionConfig)
        assert find_misfit(attention) is None, attention


@pytest.mark.parametrize(
    ("fields", "kernel"),
    [
        ({"num_heads": 64, "head_expansion": 3}, "head simulation"),
        ({"head_dim": 256, "simulated_head_dim": 256}, "feature simulation"),
    ],
)
def test_sizes_that_exceed_shared_memory_run_in_torch(fields: dict[str, Any], kernel: str) -> None:
    reason = find_unfused_reason(sas(**fields), device="gpu", element_bytes=2)
    assert reason is not None
    assert re.fullmatch(f"the fused {kernel} needs \\d+ KiB of shared memory, of which there are 227", reason)
    with pytest.raises(
        FieldError, match=f"^attention.kernel=fused: cannot run here, since the fused {kernel}"
    ):
        check_kernel(sas(kernel="fused", **fields))


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "attention.rotary=before": {"rotary": "before"},
    "attention.head_activation=gelu": {"head_activation": "gelu"},
    "attention.feature_activation=none": {"feature_activation": "none"},
}


@pytest.mark.parametrize("named", UNSUPPORTED)
def test_fused_kernels_refuse_what_they_do_not_support_by_name(named: str) -> None:
    fields = UNSUPPORTED[named]
    reason = find_unfused_reason(sas(**fields), device="gpu", element_bytes=2)
    assert reason == f"the fused kernels do not support {named}"
    with pytest.raises(FieldError) as raised:
        sas(kernel="fused", **fields)
    assert str(raised.value) == f"attention.kernel=fused: does not support {named}; use auto or plain"


def test_fused_kernels_support_activations_of_simulations_that_are_off() -> None:
    features = sas(kernel="fused", simulate_features=False, feature_activation="gelu")
    off = dict.fromkeys(("simulate_query_heads", "simulate_key_heads", "simulate_value_heads"), False)
    heads = sas(kernel="fused", head_activation="none", **off)
    assert features.unfusable_field is None
    assert heads.unfusable_field is None


def test_the_choice_and_its_reason_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _layer in range(3):
            kernels = build_simulation_kernels(sas(), dtype=torch.float32)
            assert isinstance(kernels, PlainKernels)
    (record,) = caplog.records
    assert record.getMessage() == "attention.kernel=auto: plain, since the fused kernels need a CUDA device"


def test_a_configured_kernel_is_used_without_a_log_line_or_rejected(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    with caplog.at_level(logging.INFO):
        plain = build_simulation_kernels(sas(kernel="plain"), dtype=torch.float32)
        assert isinstance(plain, PlainKernels)
        with monkeypatch.context() as patch:
            patch.setattr(triton.knobs.runtime, "interpret", True)
            fused = build_simulation_kernels(sas(kernel="fused"), dtype=torch.float32)
            assert isinstance(fused, FusedKernels)
    assert not caplog.records
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(FieldError, match=r"since the fused kernels need a CUDA device; use auto or plain$"):
        SimulatedSelfAttention.build_spec(sas(kernel="fused"))


def test_fused_kernels_reject_float64() -> None:
    with pytest.raises(NotImplementedError, match="accumulate in float32"):
        build_simulation_kernels(sas(kernel="fused"), dtype=torch.float64)
