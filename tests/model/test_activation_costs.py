"""The counted bytes of activations equal the bytes that autograd saves, term by term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

from sas_megatron.attention.gqa.config import GroupedQueryAttentionConfig
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.attention_kinds import KINDS, VariantNames
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.activations import (
    count_activation_bytes,
    count_peak_activation_bytes,
    microbatches_in_flight,
)
from tests.model.kept_activations import kept_bytes, simulated_kept_bytes, simulated_peak_bytes
from tests.model.small_runs import shared_runs, sweep
from tests.run_configs import small_config
from tests.selection import cases, exhaustive
from tests.training.layouts import ATTENTIONS


@pytest.mark.parametrize("backend", ["unfused", "fused", "auto"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_count_equals_the_bytes_that_a_rank_saves(ranks: Any, name: str, backend: str) -> None:
    config = small_config(attention={**ATTENTIONS[name], "backend": backend})
    assert ranks(1).run(kept_bytes, config) == [count_activation_bytes(config, device="cpu")]


TENSOR_CASES = {
    f"{name}{', sequence' * sequence}": (name, sequence) for name in ATTENTIONS for sequence in (False, True)
}


@pytest.mark.parametrize(
    "case",
    cases(
        TENSOR_CASES,
        default=("mla, sequence", "sas-gather", "sas-all_to_all, sequence", "mfa, sequence", "tpa"),
    ),
)
def test_the_count_equals_the_bytes_that_two_tensor_ranks_save(ranks: Any, case: str) -> None:
    name, sequence = TENSOR_CASES[case]
    config = small_config(
        attention={**ATTENTIONS[name], "backend": "fused"}, parallel={"tensor": 2, "sequence": sequence}
    )
    assert ranks(2).run(kept_bytes, config) == 2 * [count_activation_bytes(config, device="cpu")]


RECOMPUTED: dict[str, Any] = {"recompute": "selective", "recompute_modules": ["simulation"]}
KERNEL_CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    f"{name}, tensor {tensor}{', recomputed' * bool(recompute)}": (name, tensor, recompute)
    for name in ("sas-gather", "sas-all_to_all")
    for tensor in (1, 2)
    for recompute in ({}, RECOMPUTED)
}


@pytest.mark.parametrize(
    "case",
    cases(
        KERNEL_CASES,
        default=("sas-gather, tensor 1, recomputed", "sas-all_to_all, tensor 1", "sas-all_to_all, tensor 2"),
    ),
)
def test_the_count_equals_the_bytes_that_fused_kernels_save(ranks: Any, case: str) -> None:
    name, tensor, recompute = KERNEL_CASES[case]
    config = small_config(
        attention={**ATTENTIONS[name], "backend": "fused", "kernel": "fused"},
        parallel={"tensor": tensor},
        training={"num_steps": 9, "global_batch_size": 4, "micro_batch_size": 2, **recompute},
    )
    assert ranks(tensor).run(kept_bytes, config) == tensor * [count_activation_bytes(config, device="cpu")]


def test_fused_kernels_are_counted_if_auto_selects_them() -> None:
    by_kernel = {
        (kernel, precision): count_activation_bytes(
            small_config(
                attention={**ATTENTIONS["sas-gather"], "kernel": kernel}, training={"precision": precision}
            ),
            device="gpu",
        )
        for kernel in ("auto", "plain", "fused")
        for precision in ("float32", "bfloat16")
    }
    assert by_kernel["auto", "bfloat16"] == by_kernel["fused", "bfloat16"] != by_kernel["plain", "bfloat16"]
    assert by_kernel["auto", "float32"] == by_kernel["plain", "float32"] != by_kernel["fused", "float32"]


@sweep(40)
@given(config=shared_runs())
def test_the_count_equals_the_bytes_that_a_rank_of_any_layout_saves(
    separate_process: Any, config: RunConfig
) -> None:
    assert separate_process(simulated_kept_bytes, config) == count_activation_bytes(config, device="cpu")


@pytest.mark.parametrize(
    ("parallel", "num_microbatches"),
    [
        pytest.param({}, 3, marks=exhaustive),
        ({"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3}, 5),
        pytest.param({"pipeline": 4}, 6, marks=exhaustive),
        ({"pipeline": 2, "virtual_pipeline": 2}, 2),
        ({"pipeline": 2, "virtual_pipeline": 2}, 6),
        ({"pipeline": 2, "tensor": 2, "sequence": True}, 4),
    ],
    ids=str,
)
def test_the_peak_of_a_step_is_reached_by_the_microbatches_in_flight(
    separate_process: Any, parallel: dict[str, int], num_microbatches: int
) -> None:
    config = small_config(attention=ATTENTIONS["gqa"], model={"num_layers": 4}, parallel=parallel)
    for stage in range(config.parallel.pipeline):
        rank = stage * config.parallel.tensor
        kept = _peak(separate_process, config, rank, num_microbatches)
        counted = count_peak_activation_bytes(
            config, device="cpu", num_microbatches=num_microbatches, stage=stage
        )
        assert kept == counted, f"stage {stage}"


def _peak(separate_process: Any, config: RunConfig, rank: int, num_microbatches: int) -> dict[str, int]:
    kept: dict[str, int] = separate_process(simulated_peak_bytes, config, rank, num_microbatches)
    # The factor of the summed loss.
    assert kept.pop("loss", 0) <= 4
    return kept


def test_a_stage_is_ahead_by_the_number_of_later_stages() -> None:
    plain = small_config(model={"num_layers": 4}, parallel={"pipeline": 4})
    assert [_most_in_flight(plain, stage, 9) for stage in range(4)] == [4, 3, 2, 1]
    assert [_most_in_flight(plain, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    interleaved = small_config(model={"num_layers": 8}, parallel={"pipeline": 4, "virtual_pipeline": 2})
    # Model chunks, each with half of a stage's layers: (v-1)·p + 2·(p-1-s) + 1.
    assert [_most_in_flight(interleaved, stage, 12) for stage in range(4)] == [11, 9, 7, 5]


def _most_in_flight(config: RunConfig, stage: int, num_microbatches: int) -> int:
    held = microbatches_in_flight(config, num_microbatches=num_microbatches, stage=stage)
    return max(sum(counts) for counts in held)


def test_a_stage_outside_of_the_pipeline_is_rejected() -> None:
    config = small_config(parallel={"pipeline": 2})
    with pytest.raises(FieldError, match=r"^stage=-1: must be one of parallel.pipeline=2; use 0 to 1$"):
        count_activation_bytes(config, device="gpu", stage=-1)


class _OutsideAttention(AttentionConfig):
    """A variant from outside the package, with the default costs."""

    kind: str = "outside"


def test_a_variant_with_default_costs_saves_the_same_as_plain_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = VariantNames("", "sas_megatron.costs.attention:AttentionCosts", "")
    monkeypatch.setitem(KINDS, "outside", names)
    fields = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    outside = small_config(attention=_OutsideAttention(**fields))
    plain = small_config(attention=GroupedQueryAttentionConfig(**fields))
    assert count_activation_bytes(outside, device="cpu") == count_activation_bytes(plain, device="cpu")


@pytest.mark.parametrize("linear_bias", [False, True])
def test_a_gpu_saves_less_for_norms_and_the_mlp(linear_bias: bool) -> None:
    """24 tokens of 20 columns, and 28 in the MLP, in float32, by the definitions of the fused functions."""
    config = small_config(
        attention={"kind": "mha", "num_heads": 4, "head_dim": 6, "backend": "unfused"},
        model={"num_layers": 1, "linear_bias": linear_bias},
    )
    on_cpu, on_gpu = (count_activation_bytes(config, device=device) for device in ("cpu", "gpu"))
    normalized, gate_and_half = 3 * 4 * 24 * 20, 2 * 4 * 24 * 28
    assert on_gpu == {
        **on_cpu,
        "norms": on_cpu["norms"] - normalized,
        "mlp": on_cpu["mlp"] - gate_and_half,
        # Megatron-core's loss saves the label's column of each token, an int64, and a mask of one byte.
        "head": on_cpu["head"] + 24 * (8 + 1),
    }


def test_the_count_equals_the_bytes_that_cudnn_saves_without_padding() -> None:
    """24 tokens, eight heads of 16 query/key and eight value features, on torch's meta device."""
    fields = {"kind": "sas", "num_heads": 4, "head_dim": 8, "simulated_head_dim": 16, "head_expansion": 2}
    config = small_config(
        attention={**fields, "backend": "cudnn"},
        model={"num_layers": 1},
        training={"precision": "bfloat16"},
    )
    query, key, value = (
        torch.empty(12, 2, 8, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for width in (16, 16, 8)
    )
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.nbytes if tensor.dim() else 0), lambda _: None
    ):
        # The kernel that runs on a GPU. Its random state, two scalars, is not counted.
        torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(heads.permute(1, 2, 0, 3) for heads in (query, key, value)), None, True, 0.0, True, False
        )
    assert count_activation_bytes(config, device="gpu")["attention"] == sum(saved)
    fused = config.model_copy(update={"attention": config.attention.model_copy(update={"backend": "fused"})})
    assert count_activation_bytes(fused, device="gpu")["attention"] > sum(saved)
