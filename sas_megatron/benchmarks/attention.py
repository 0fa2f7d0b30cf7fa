"""Time and memory of self-attention blocks, forward and backward: SAS, literal SAS, and multi-head."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from sas_megatron.attention.layer import resolve_layer
from sas_megatron.benchmarks.attention_blocks import BlockShape, LiteralSimulatedAttention
from sas_megatron.benchmarks.roofline import Point, measure_ceilings
from sas_megatron.benchmarks.timing import Preparation, median_ratio, time_alternately
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.costs.flops import TRAINING_FACTOR, causal_half
from sas_megatron.distributed.topology import Topology

# Bound of the relative difference (norm over norm) between the SAS block and its literal form, above all
# rounding errors.
MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

Block = Callable[[torch.Tensor], torch.Tensor]


def measure_attention(
    shape: BlockShape,
    topology: Topology,
    *,
    dtype: torch.dtype,
    repeats: int,
    compiled: bool = False,
    backend: str = "auto",
) -> dict[str, Any]:
    """Time the blocks in alternation, forward and backward.

    Args:
        shape: Sizes of the blocks.
        topology: A world of one process.
        dtype: Dtype of weights and activations.
        repeats: Number of rounds after the warm-up rounds.
        compiled: Whether to time the literal block under torch.compile as well.
        backend: `attention.backend` of the SAS block and of the multi-head block.

    Returns:
        Median seconds by block, the medians of the ratios within rounds, and the fused attention of torch
        that each block called. Bytes that each block saves for the backward pass and, on a GPU, its peak
        memory without input and weights.

    Raises:
        RuntimeError: The SAS block and its literal form differ by more than rounding.
    """
    blocks, hidden, static_storages = _build_blocks(
        shape, topology, dtype, compiled=compiled, backend=backend
    )
    difference = _check_difference(blocks["sas"](hidden), blocks["literal"](hidden), dtype)
    preparations = {name: _preparation(block, hidden) for name, block in blocks.items()}
    seconds = time_alternately(preparations, device=topology.device, rounds=repeats)
    kept = {
        name: _saved_bytes(block, hidden, static_storages)
        for name, block in blocks.items()
        if name != "literal_compiled"
    }
    peak = None
    if topology.device.type == "cuda":
        peak = {name: _peak_bytes(prepare) for name, prepare in preparations.items()}
    return {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "literal_over_sas": median_ratio(seconds["literal"], seconds["sas"]),
        "literal_compiled_over_sas": median_ratio(seconds["literal_compiled"], seconds["sas"])
        if compiled
        else None,
        "sas_over_multi_head": median_ratio(seconds["sas"], seconds["multi_head"]),
        "fused_attention": {name: _fused_attention(block, hidden) for name, block in blocks.items()},
        "kept_bytes": kept,
        "peak_bytes": peak,
        "kept_share_of_literal": kept["sas"] / kept["literal"],
        "peak_share_of_literal": None if peak is None else peak["sas"] / peak["literal"],
        "ceilings": dataclasses.asdict(measure_ceilings(topology.device, dtype)),
        "least_work": _least_work(shape, hidden.element_size()),
        "relative_difference": difference,
        "repeats": repeats,
    }


def _fused_attention(block: Block, hidden: torch.Tensor) -> str | None:
    """Return the fused attention that torch chose, or None if the block does not call it."""
    with torch.profiler.profile() as profile:
        block(hidden)
    prefix = "aten::_scaled_dot_product_"
    chosen = [event.key.removeprefix(prefix) for event in profile.key_averages() if prefix in event.key]
    return chosen[0] if chosen else None


def roofline_points(result: dict[str, Any]) -> list[Point]:
    """Return the measured blocks as points of the roofline plot."""
    return [
        Point(name, **result["least_work"]["multi_head" if name == "multi_head" else "sas"], seconds=seconds)
        for name, seconds in result["seconds"].items()
    ]


def _least_work(shape: BlockShape, element_bytes: int) -> dict[str, dict[str, float]]:
    """Return the least FLOPs and bytes of each block, forward and backward.

    The FLOPs contain the causal half of the scores. The bytes contain the input, the output and the weights
    of the block, and their gradients, each once.
    """
    work = {}
    for name, attention in (("sas", shape.simulated()), ("multi_head", shape.multi_head())):
        terms = build_attention_costs(attention).count_forward_flops(
            shape.hidden_size, sequence_length=shape.sequence_length
        )
        flops = sum(causal_half(terms, sequence_length=shape.sequence_length).values())
        parameters = sum(
            build_attention_costs(attention).count_parameters(shape.hidden_size, linear_bias=False).values()
        )
        activations = 4 * shape.num_tokens * shape.hidden_size
        work[name] = {
            "flops": TRAINING_FACTOR * shape.num_tokens * flops,
            "num_bytes": element_bytes * (activations + 2 * parameters),
        }
    return work


def _build_blocks(
    shape: BlockShape, topology: Topology, dtype: torch.dtype, *, compiled: bool, backend: str
) -> tuple[dict[str, Block], torch.Tensor, set[int]]:
    """Return the blocks by name, their input, and the addresses of storages that exist before any pass."""
    torch.manual_seed(1)
    sas = _build_block(shape.simulated(backend=backend), shape, dtype)
    literal = LiteralSimulatedAttention(shape.hidden_size, shape.simulated()).to(topology.device, dtype)
    _copy_weights(literal, sas)
    multi_head = _build_block(shape.multi_head(backend=backend), shape, dtype)
    hidden = torch.randn(
        shape.sequence_length, shape.batch_size, shape.hidden_size, device=topology.device, dtype=dtype
    )
    rotary = RotaryEmbedding(shape.simulated_head_dim, 1.0)(shape.sequence_length)
    rotary_multi_head = RotaryEmbedding(shape.head_dim, 1.0)(shape.sequence_length)
    angles = rotary[:, 0, 0]
    blocks: dict[str, Block] = {
        "sas": lambda x: sas(x, None, rotary_pos_emb=rotary)[0],
        "literal": lambda x: literal(x, angles),
        "multi_head": lambda x: multi_head(x, None, rotary_pos_emb=rotary_multi_head)[0],
    }
    if compiled:
        literal_compiled = torch.compile(literal)
        blocks["literal_compiled"] = lambda x: literal_compiled(x, angles)
    static = [rotary, rotary_multi_head]
    for module in (sas, literal, multi_head):
        static += module.parameters()
    return blocks, hidden, {tensor.untyped_storage().data_ptr() for tensor in static}


def _build_block(attention: AttentionConfig, shape: BlockShape, dtype: torch.dtype) -> Any:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden_size,
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.num_key_value_heads,
        kv_channels=attention.head_dim,
        add_bias_linear=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        apply_rope_fusion=True,
    )
    return build_module(resolve_layer(attention).build_spec(attention), config=config, layer_number=1)


@torch.no_grad()
def _copy_weights(literal: LiteralSimulatedAttention, sas: Any) -> None:
    sas.linear_qkv.weight.copy_(literal.linear_qkv.weight)
    sas.linear_proj.weight.copy_(literal.linear_proj.weight)
    for kind in ("heads", "features"):
        for name, source in getattr(literal, kind).items():
            target = getattr(sas.simulation, kind)[name]
            for layer in ("expand", "refine"):
                getattr(target, layer).copy_(getattr(source, layer).weight)
                getattr(target, f"{layer}_bias").copy_(getattr(source, layer).bias)


def _check_difference(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the relative difference of the outputs of the SAS block and of its literal form.

    Raises:
        RuntimeError: The outputs differ by more than rounding.
    """
    with torch.no_grad():
        difference = float((actual - expected).norm() / expected.norm())
    if difference > MAX_DIFFERENCE[dtype]:
        raise RuntimeError(
            f"relative difference of the SAS block and its literal form={difference:.1e}: must be at most "
            f"{MAX_DIFFERENCE[dtype]:.0e}, since only equal functions are compared; report the sizes as a bug"
        )
    return difference


def _preparation(block: Block, hidden: torch.Tensor) -> Preparation:
    def prepare() -> Callable[[], object]:
        leaf = hidden.detach().requires_grad_()

        def run() -> torch.Tensor:
            output = block(leaf)
            output.backward(torch.ones_like(output))
            return output

        return run

    return prepare


def _saved_bytes(block: Block, hidden: torch.Tensor, static_storages: set[int]) -> int:
    """Return the bytes of the storages that autograd saves in the forward pass, without the static ones."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in static_storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(hidden.detach().requires_grad_())
    del output
    return sum(kept.values())


def _peak_bytes(prepare: Preparation) -> int:
    """Return the peak memory of a forward and backward pass, without the memory allocated before."""
    run = prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
