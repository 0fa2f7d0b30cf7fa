"""One attention layer, run on the ranks of a layout, and its definition, run in one process."""

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
from tests.tolerances import assert_near

HIDDEN_SIZE, LENGTH, BATCH = 20, 8, 3  # LENGTH divides by 4 for sequence parallelism; T = 24 does not by 5


@dataclass(frozen=True)
class LayerCase:
    """An attention config, the type of its elements, the layout, and the segments of each sample."""

    attention: tuple[tuple[str, Any], ...]
    dtype: torch.dtype = torch.float64
    sequence_parallel: bool = field(default=False)
    segments: tuple[tuple[int, ...], ...] = ((LENGTH,),) * BATCH

    @staticmethod
    def of(
        dtype: torch.dtype = torch.float64,
        sequence_parallel: bool = False,
        segments: tuple[tuple[int, ...], ...] = ((LENGTH,),) * BATCH,
        **attention: Any,
    ) -> LayerCase:
        """Build a case from the fields of the attention section."""
        return LayerCase(tuple(sorted(attention.items())), dtype, sequence_parallel, segments)

    def config(self) -> AttentionConfig:
        """Return the attention section."""
        return parse_attention(dict(self.attention))


@dataclass
class LayerResult:
    """Full tensors: the output, and the gradients of the input and the parameters."""

    output: torch.Tensor
    input_gradient: torch.Tensor
    gradients: dict[str, torch.Tensor]

    def assert_near(self, expected: LayerResult, dtype: torch.dtype) -> None:
        """Compare the output and every gradient with those of the definition, for computations in `dtype`."""
        assert_near(self.output, expected.output, dtype, "output")
        assert_near(self.input_gradient, expected.input_gradient, dtype, "input gradient")
        assert self.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert_near(self.gradients[name], gradient, dtype, f"gradient of {name}")


def drawn(
    name: str, shape: tuple[int, ...] | list[int], dtype: torch.dtype, scale: float = 0.2
) -> torch.Tensor:
    """Draw a tensor that depends only on its name and shape, rounded to `dtype`.

    The scale gives every ReLU inputs of both signs, without saturating a softmax, which would amplify the
    rounding to bfloat16.
    """
    seed = sum(ord(letter) * 31**index for index, letter in enumerate(name)) % 2**31
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def layer_input(dtype: torch.dtype) -> torch.Tensor:
    """Return hidden states [S, B, H]."""
    return drawn("input", (LENGTH, BATCH, HIDDEN_SIZE), dtype, scale=1.0)


def output_gradient(dtype: torch.dtype) -> torch.Tensor:
    """Return the gradient of the output, [S, B, H]."""
    return drawn("output gradient", (LENGTH, BATCH, HIDDEN_SIZE), dtype, scale=1.0)


@functools.lru_cache(maxsize=64)
def by_definition(
    attention: tuple[tuple[str, Any], ...],
    dtype: torch.dtype,
    segments: tuple[tuple[int, ...], ...] = ((LENGTH,),) * BATCH,
) -> LayerResult:
    """Compute the definition in float64, for one segment after another, from values rounded to `dtype`."""
    config = parse_attention(dict(attention))
    weights = {
        name: drawn(name, shape, dtype).double().requires_grad_()
        for name, shape in DEFINITIONS[config.kind].weight_shapes(config, HIDDEN_SIZE).items()
    }
    hidden = layer_input(dtype).double().requires_grad_()
    output = torch.cat(
        [
            torch.cat(
                [
                    DEFINITIONS[config.kind].self_attention(segment, weights, config)
                    for segment in sample.split(lengths)
                ]
            )
            for sample, lengths in zip(hidden.split(1, dim=1), segments, strict=True)
        ]
        if any(len(lengths) > 1 for lengths in segments)
        else [DEFINITIONS[config.kind].self_attention(hidden, weights, config)],
        dim=1,
    )
    output.backward(output_gradient(dtype).double())
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    assert hidden.grad is not None
    return LayerResult(output.detach(), hidden.grad, gradients)


def transformer_config(case: LayerCase, tensor: int, context: int = 1) -> Any:
    """Return Megatron-core's config of one layer."""
    from sas_megatron.attention.layer import resolve_layer

    config = case.config()
    layer = resolve_layer(config)
    return layer.transformer_config_type(
        num_layers=1,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=config.num_query_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        add_bias_linear=False,
        params_dtype=case.dtype,
        bf16=case.dtype == torch.bfloat16,
        tensor_model_parallel_size=tensor,
        sequence_parallel=case.sequence_parallel,
        context_parallel_size=context,
        no_rope_freq=1 if config.rotary == "none" else None,
        **layer.transformer_options(config),
    )


def zigzag_tokens(context: int) -> list[list[int]]:
    """Return the tokens of each context rank c: chunks c and 2C-1-c of 2C."""
    chunks = torch.arange(LENGTH).chunk(2 * context)
    return [torch.cat([chunks[rank], chunks[2 * context - 1 - rank]]).tolist() for rank in range(context)]


def build_layer(case: LayerCase, tensor: int, context: int = 1) -> torch.nn.Module:
    """Build the layer on this rank; the process groups must exist."""
    from megatron.core.transformer.spec_utils import build_module

    from sas_megatron.attention.layer import resolve_layer

    attention = case.config()
    return build_module(
        resolve_layer(attention).build_spec(attention),
        config=transformer_config(case, tensor, context),
        layer_number=1,
    )


def rotary_angles(config: AttentionConfig, *, packed: bool = False) -> torch.Tensor | None:
    """Return the angles that the GPT model passes to its layers; None for a layer with its own.

    Each context rank gets the angles of its local tokens, and with packed sequences those of all positions.
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    if not config.uses_model_rotary:
        return None
    width = config.rotary_width or config.head_dim
    group = parallel_state.get_context_parallel_group()
    return RotaryEmbedding(width, 1.0, cp_group=group)(LENGTH, packed_seq=packed)


def on_rank(
    case: LayerCase, tensor: int, context: int = 1
) -> tuple[torch.Tensor, torch.Tensor, dict[str, WeightPart]]:
    """Return this rank's output, input gradient and parameter gradients."""
    from sas_megatron.model.initialization import full_shape, tensor_parallel_shard

    layout = ParallelConfig(tensor=tensor, sequence=case.sequence_parallel, context=context)
    topology = in_layout(layout)
    layer = build_layer(case, tensor, context)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            full = drawn(name, full_shape(parameter), case.dtype)
            parameter.copy_(tensor_parallel_shard(full, parameter))
    hidden, gradient = layer_input(case.dtype), output_gradient(case.dtype)
    if context > 1:
        tokens = zigzag_tokens(context)
        hidden, gradient = (x[tokens[topology.context_rank]] for x in (hidden, gradient))
    if case.sequence_parallel:
        hidden, gradient = (x.chunk(tensor)[topology.tensor_rank].clone() for x in (hidden, gradient))
    hidden.requires_grad_()
    segments = segments_on_rank(case, zigzag_tokens(context)[topology.context_rank] if context > 1 else None)
    angles = rotary_angles(case.config(), packed=segments is not None)
    output, _ = layer(hidden, None, rotary_pos_emb=angles, packed_seq_params=segments)
    output.backward(gradient)
    sum_sequence_parallel_gradients(layer)
    return output.detach(), hidden.grad, weight_parts([layer], lambda parameter: parameter.grad)


def segments_on_rank(case: LayerCase, tokens: list[int] | None) -> Any:
    """Return the segments of a case for a context rank with these tokens; None for one per sample."""
    from sas_megatron.data.segments import Segments

    if all(len(lengths) == 1 for lengths in case.segments):
        return None
    positions = torch.stack(
        [torch.cat([torch.arange(length) for length in lengths]) for lengths in case.segments]
    )
    return Segments.build(case.segments, positions if tokens is None else positions[:, tokens])


def sum_sequence_parallel_gradients(layer: torch.nn.Module) -> None:
    """Sum the gradients of weights that Megatron-core marks for sequence parallelism, as engines do."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    for parameter in layer.parameters():
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=group)


def joined(case: LayerCase, by_rank: list[Any]) -> LayerResult:
    """Return full tensors from the ranks' shards; replicated tensors must be bit-identical."""
    outputs, input_gradients, gradients = zip(*by_rank, strict=True)
    if case.sequence_parallel:
        output, input_gradient = torch.cat(outputs), torch.cat(input_gradients)
    else:
        output, input_gradient = outputs[0], input_gradients[0]
        for rank, (other, other_gradient) in enumerate(zip(outputs, input_gradients, strict=True)):
            assert torch.equal(other, output), f"rank {rank} has a different output than rank 0"
            assert torch.equal(other_gradient, input_gradient), f"rank {rank} has a different input gradient"
    return LayerResult(output, input_gradient, joined_weights(list(gradients)))


def joined_over_context(case: LayerCase, by_rank: list[Any], *, tensor: int, context: int) -> LayerResult:
    """Return full tensors, given the results of consecutive tensor ranks for each context rank.

    Tokens are put in order. The gradients of weights, which each context rank has for its local tokens, are
    summed, as the data-parallel reduction does.
    """
    parts = [joined(case, by_rank[rank * tensor : (rank + 1) * tensor]) for rank in range(context)]
    order = torch.tensor([token for tokens in zigzag_tokens(context) for token in tokens]).argsort()
    output = torch.cat([part.output for part in parts])[order]
    input_gradient = torch.cat([part.input_gradient for part in parts])[order]
    gradients = {name: sum(part.gradients[name] for part in parts) for name in parts[0].gradients}
    return LayerResult(output, input_gradient, gradients)  # type: ignore[arg-type]
