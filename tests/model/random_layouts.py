"""Small runs of each attention on random layouts that it supports, drawn by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from sas_megatron.config.attention import AttentionConfig, parse_attention
from sas_megatron.config.errors import UserError
from sas_megatron.config.head_layout import check_context_parallel, check_tensor_parallel
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.attention import build_attention_costs
from tests.model.small_runs import bias_of_queries, modified_attentions
from tests.run_configs import small_config


def _models(num_layers: st.SearchStrategy[int], *, multiple: int = 1) -> st.SearchStrategy[dict[str, Any]]:
    """Draw the `model` section; sizes that tensor ranks share are multiples of `multiple`."""
    return st.fixed_dictionaries(
        {
            "num_layers": num_layers,
            "hidden_size": st.integers(3, 17),
            "ffn_hidden_size": st.integers(1, 19 // multiple).map(lambda width: width * multiple),
            "vocab_size": st.integers(1, 40),
            "vocab_multiple": st.integers(1, 9 // multiple).map(lambda rows: rows * multiple),
            "activation": st.sampled_from(["swiglu", "gelu"]),
            "normalization": st.sampled_from(["rmsnorm", "layernorm"]),
            "linear_bias": st.booleans(),
            "parallel_residual": st.booleans(),
            "tie_embeddings": st.booleans(),
        }
    )


@st.composite
def runs_with_layouts(draw: st.DrawFn) -> tuple[RunConfig, int, int]:
    """Draw a run with any attention and a layout that it supports, its world size and a pipeline stage."""
    attention = draw(modified_attentions())
    parsed = parse_attention(attention)
    parallel, num_layers = draw(_layouts(parsed))
    tensor, context = parallel["tensor"], parallel["context"]
    distributed = draw(st.booleans())
    if parallel["overlap_gradient_reduce"] and distributed:
        parallel["overlap_parameter_gather"] = draw(st.booleans())
    micro_batch_size, data_parallel = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    round_size = parallel["pipeline"] if parallel["virtual_pipeline"] > 1 else 1
    num_microbatches = round_size * draw(st.integers(1, 3))
    model = draw(_models(st.just(num_layers), multiple=tensor))
    attention |= draw(bias_of_queries(attention, linear_bias=model["linear_bias"]))
    chunk = math.lcm(2 * context if context > 1 else 1, tensor * context if parallel["sequence"] else 1)
    config = small_config(
        attention=attention,
        model=model,
        parallel=parallel,
        data={"sequence_length": chunk * draw(st.integers(1, 3))},
        optimizer={"learning_rate": 0.01, "distributed": distributed},
        training={
            "micro_batch_size": micro_batch_size,
            "global_batch_size": micro_batch_size * num_microbatches * data_parallel,
            "precision": draw(st.sampled_from(["float32", "bfloat16"])),
            **draw(_recomputations([*parsed.recomputable, "mlp"])),
        },
    )
    stage = draw(st.integers(0, parallel["pipeline"] - 1))
    return config, data_parallel * config.parallel.model_size, stage


@st.composite
def _layouts(draw: st.DrawFn, attention: AttentionConfig) -> tuple[dict[str, Any], int]:
    """Draw the `parallel` section, and a number of layers that its stages can share."""
    tensor = draw(st.sampled_from([ranks for ranks in (1, 2, 3, 4) if _can_share(attention, ranks)]))
    fitting = [ranks for ranks in (1, 2, 3, 4) if _passes(check_context_parallel, attention, tensor, ranks)]
    pipeline = draw(st.integers(1, 3))
    num_chunks = draw(st.integers(1, 2)) if pipeline > 1 else 1
    first, last = (num_chunks * draw(st.integers(1, 2)) for _ in range(2))
    parallel = {
        "tensor": tensor,
        "context": draw(st.sampled_from(fitting)),
        "pipeline": pipeline,
        "virtual_pipeline": num_chunks,
        "sequence": tensor > 1 and draw(st.booleans()),
        "overlap_gradient_reduce": draw(st.booleans()),
    }
    if pipeline == 1:
        return parallel, first
    parallel["first_stage_layers"] = first
    if (
        pipeline > 2
    ):  # Megatron-core 0.16.1 divides by zero if the layers of both interleaved stages are given.
        parallel["last_stage_layers"] = last
    return parallel, first + last + num_chunks * (pipeline - 2)


def _recomputations(modules: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw `training.recompute*` for these modules."""
    some = st.none() | st.lists(st.sampled_from(modules), min_size=1, unique=True)
    return st.one_of(
        st.just({"recompute": "none"}),
        st.fixed_dictionaries({"recompute": st.just("selective"), "recompute_modules": some}),
        st.fixed_dictionaries({"recompute": st.just("full"), "recompute_layers": st.sampled_from([None, 1])}),
    )


def _can_share(attention: AttentionConfig, tensor: int) -> bool:
    """Return whether Megatron-core can shard the heads and all columns evenly over `tensor` ranks."""
    sharded = [
        weight for weight in build_attention_costs(attention).weights(1, linear_bias=True) if weight.sharded
    ]
    return _passes(check_tensor_parallel, attention, tensor) and not any(
        weight.elements % tensor for weight in sharded
    )


def _passes(check: Callable[..., None], *degrees: int) -> bool:
    try:
        check(*degrees)
    except UserError:
        return False
    return True
