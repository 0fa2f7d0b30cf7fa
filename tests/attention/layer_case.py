"""One attention layer at a layout, run on ranks, and the same by its definition in one process."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from sas_megatron.config.attention import AttentionConfig, parse_attention
from sas_megatron.config.parallel import ParallelConfig
from tests.attention.definitions import DEFINITIONS
from tests.model.model_parts import WeightPart, joined_weights, weight_parts
from tests.rank_pool import in_layout

HIDDEN_SIZE, LENGTH, BATCH = 20, 8, 3  # LENGTH divides by 4 for sequence parallelism; T = 24 does not by 5


@dataclass(frozen=True)
class LayerCase:
    """What is computed (attention, dtype) and how it is laid out (the rest)."""

    attention: tuple[tuple[str, Any], ...]
    dtype: torch.dtype = torch.float64
    sequence_parallel: bool = field(default=False)

    @staticmethod
    def of(
        dtype: torch.dtype = torch.float64, sequence_parallel: bool = False, **attention: Any
    ) -> LayerCase:
        """A case from the fields of the attention section."""
        return LayerCase(tuple(sorted(attention.items())), dtype, sequence_parallel)

    def config(self) -> AttentionConfig:
        """The attention section."""
        return parse_attention(dict(self.attention))


@dataclass
class LayerResult:
    """Whole tensors: the output, and the gradients of input and parameters."""

    output: torch.Tensor
    input_gradient: torch.Tensor
    gradients: dict[str, torch.Tensor]


def drawn(
    name: str, shape: tuple[int, ...] | list[int], dtype: torch.dtype, scale: float = 0.2
) -> torch.Tensor:
    """A tensor that depends on its name and shape alone, rounded to `dtype`.

    Wide enough that every ReLU has both signs, narrow enough that no softmax saturates: rounding
    to bfloat16 would then be amplified without bound.
    """
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 2**31
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def layer_input(dtype: torch.dtype) -> torch.Tensor:
    """[S, B, H]."""
    return drawn("input", (LENGTH, BATCH, HIDDEN_SIZE), dtype, scale=1.0)


def output_gradient(dtype: torch.dtype) -> torch.Tensor:
    """[S, B, H]; what comes back from above."""
    return drawn("output gradient", (LENGTH, BATCH, HIDDEN_SIZE), dtype, scale=1.0)


@functools.lru_cache(maxsize=64)
def by_definition(attention: tuple[tuple[str, Any], ...], dtype: torch.dtype) -> LayerResult:
    """In float64, from inputs and weights rounded to `dtype`."""
    config = parse_attention(dict(attention))
    weights = {
        name: drawn(name, shape, dtype).double().requires_grad_()
        for name, shape in DEFINITIONS[config.kind].weight_shapes(config, HIDDEN_SIZE).items()
    }
    hidden = layer_input(dtype).double().requires_grad_()
    output = DEFINITIONS[config.kind].self_attention(hidden, weights, config)
    output.backward(output_gradient(dtype).double())
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    assert hidden.grad is not None
    return LayerResult(output.detach(), hidden.grad, gradients)


def transformer_config(case: LayerCase, tensor: int, context: int = 1) -> Any:
    """Megatron-core's config of one layer."""
    from sas_megatron.attention.layer import resolve_layer

    config = case.config()
    layer = resolve_layer(config)
    return layer.transformer_config_type(
        num_layers=1,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        add_bias_linear=False,
        params_dtype=case.dtype,
        bf16=case.dtype == torch.bfloat16,
        tensor_model_parallel_size=tensor,
        sequence_parallel=case.sequence_parallel,
        context_parallel_size=context,
        **layer.transformer_options(config),
    )


def zigzag_shares(context: int) -> list[list[int]]:
    """Tokens of each context rank: chunks c and 2C-1-c of 2C."""
    chunks = torch.arange(LENGTH).chunk(2 * context)
    return [torch.cat([chunks[rank], chunks[2 * context - 1 - rank]]).tolist() for rank in range(context)]


def build_layer(case: LayerCase, tensor: int, context: int = 1) -> torch.nn.Module:
    """The Megatron-core module on this rank; the groups must exist."""
    from megatron.core.transformer.spec_utils import build_module

    from sas_megatron.attention.layer import resolve_layer

    attention = case.config()
    return build_module(
        resolve_layer(attention).build_spec(attention),
        config=transformer_config(case, tensor, context),
        layer_number=1,
    )


def rotary_angles(config: AttentionConfig) -> torch.Tensor | None:
    """As the GPT model hands them to its layers; None to a layer that makes its own."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    if not config.uses_model_rotary:
        return None
    # It hands each context rank the angles of its own tokens.
    return RotaryEmbedding(config.rotary_width, 1.0, cp_group=parallel_state.get_context_parallel_group())(
        LENGTH
    )


def on_rank(
    case: LayerCase, tensor: int, context: int = 1
) -> tuple[torch.Tensor, torch.Tensor, dict[str, WeightPart]]:
    """This rank's output, input gradient and parameter gradients."""
    from sas_megatron.model.initialization import full_shape, tensor_parallel_shard

    layout = ParallelConfig(tensor=tensor, sequence=case.sequence_parallel, context=context)
    topology = in_layout(layout)
    layer = build_layer(case, tensor, context)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            whole = drawn(name, full_shape(parameter), case.dtype)
            parameter.copy_(tensor_parallel_shard(whole, parameter))
    hidden, gradient = layer_input(case.dtype), output_gradient(case.dtype)
    if context > 1:
        shares = zigzag_shares(context)
        hidden, gradient = (x[shares[topology.context_rank]] for x in (hidden, gradient))
    if case.sequence_parallel:
        hidden, gradient = (x.chunk(tensor)[topology.tensor_rank].clone() for x in (hidden, gradient))
    hidden.requires_grad_()
    output, _ = layer(hidden, None, rotary_pos_emb=rotary_angles(case.config()))
    output.backward(gradient)
    sum_over_sequence_parts(layer)
    return output.detach(), hidden.grad, weight_parts([layer], lambda parameter: parameter.grad)


def sum_over_sequence_parts(layer: torch.nn.Module) -> None:
    """What the engines do once a step, by Megatron-core's mark, for weights that met their rank's tokens."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    for parameter in layer.parameters():
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=group)


def joined(case: LayerCase, by_rank: list[Any]) -> LayerResult:
    """Whole tensors from the ranks' parts; replicated ones must be equal on every rank, to the bit."""
    outputs, input_gradients, gradients = zip(*by_rank, strict=True)
    if case.sequence_parallel:
        output, input_gradient = torch.cat(outputs), torch.cat(input_gradients)
    else:
        output, input_gradient = outputs[0], input_gradients[0]
        for rank, (other, other_gradient) in enumerate(zip(outputs, input_gradients, strict=True)):
            assert torch.equal(other, output), f"rank {rank} has another output than rank 0"
            assert torch.equal(other_gradient, input_gradient), f"rank {rank} has another input gradient"
    return LayerResult(output, input_gradient, joined_weights(list(gradients)))


def joined_over_context(case: LayerCase, by_rank: list[Any], *, tensor: int, context: int) -> LayerResult:
    """Whole tensors where tensor ranks are neighbours and context ranks their groups.

    Tokens go back to their places; the gradients of weights, which context ranks hold for their own
    tokens, are added up, as the data-parallel reduction does.
    """
    parts = [joined(case, by_rank[rank * tensor : (rank + 1) * tensor]) for rank in range(context)]
    order = torch.tensor([token for share in zigzag_shares(context) for token in share]).argsort()
    output = torch.cat([part.output for part in parts])[order]
    input_gradient = torch.cat([part.input_gradient for part in parts])[order]
    gradients = {name: sum(part.gradients[name] for part in parts) for name in parts[0].gradients}
    return LayerResult(output, input_gradient, gradients)  # type: ignore[arg-type]
