"""Builds a Megatron-core GPT from a run's config: this rank's model chunks, with the attention variant."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from sas_megatron.attention.layer import resolve_layer
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.output_loss import is_loss_blocked, resolve_output_loss
from sas_megatron.distributed.topology import virtual_pipeline_size
from sas_megatron.model.initialization import initialize_weights
from sas_megatron.model.output_loss import GPT
from sas_megatron.model.rotary_frequencies import scale_frequencies
from sas_megatron.platform.transformer_engine_fallbacks import ReplicatedNorm

ACTIVATIONS = {
    "swiglu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_transformer_config(config: RunConfig, *, dtype: torch.dtype | None = None) -> TransformerConfig:
    """Build Megatron-core's config of the run's model and layout.

    Args:
        config: The run.
        dtype: Type of weights and activations; None for that of `training.precision`.
    """
    model, attention = config.model, config.attention
    layer = resolve_layer(attention)
    dtype = dtype or DTYPES[config.training.precision]
    on_cuda = torch.cuda.is_available()
    is_interleaved = config.parallel.virtual_pipeline > 1
    transformer = layer.transformer_config_type(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=attention.num_query_heads,
        num_query_groups=attention.num_key_value_heads,
        kv_channels=attention.head_dim,
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.normalization],
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=attention.qkv_bias,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=ACTIVATIONS[model.activation],
        hidden_dropout=model.hidden_dropout,
        attention_dropout=attention.dropout,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=config.training.deterministic,
        # Megatron-core's fused element-wise functions; on a CPU they would be compiled without a benefit.
        # That of GELU computes the tanh approximation where F.gelu is named (0.16.1), and requires a bias.
        bias_activation_fusion=on_cuda and model.activation == "swiglu",
        bias_dropout_fusion=on_cuda,
        # The fused kernel reads and writes queries and keys once. A layer with its own rotary embedding does
        # not support it.
        apply_rope_fusion=attention.uses_model_rotary,
        # 1: no layer applies rotary embeddings.
        no_rope_freq=1 if attention.rotary == "none" else None,
        # Requires an extension of Apex or TransformerEngine.
        gradient_accumulation_fusion=False,
        **_layout_options(config, on_cuda=on_cuda, is_interleaved=is_interleaved),
        **_recompute_options(config),
        **layer.transformer_options(attention),
    )
    if hasattr(transformer, "rotary_base"):
        # A layer with its own rotary embedding reads θ here, and the GPT does so instead of its argument.
        transformer.rotary_base = model.rotary_base
    if "simulation" in config.recomputed_modules:
        # Added after construction, since Megatron-core rejects unknown names there. The SAS layer reads it.
        transformer.recompute_modules.append("simulation")
    return transformer


def _layout_options(config: RunConfig, *, on_cuda: bool, is_interleaved: bool) -> dict[str, Any]:
    """Return the section `parallel` as Megatron-core's fields."""
    parallel = config.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "context_parallel_size": parallel.context,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": virtual_pipeline_size(parallel),
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers,
        # After a stage has sent its output, only its autograd graph is needed. (Interleaved stages do
        # not wait for sends, and gloo, unlike a CUDA stream, may not have read the memory yet.)
        "deallocate_pipeline_outputs": on_cuda or not is_interleaved,
        # In batched communication, two interleaved stages would confuse activations and gradients, since
        # both directions connect the same two ranks. Unbatched, each direction has its own group.
        "overlap_p2p_comm": is_interleaved,
        "batch_p2p_comm": not is_interleaved,
    }


def _recompute_options(config: RunConfig) -> dict[str, Any]:
    """Return `training.recompute*` as Megatron-core's fields."""
    training = config.training
    if training.recompute == "none":
        return {}
    if training.recompute == "full":
        layers = training.recompute_layers
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform" if layers is None else "block",
            "recompute_num_layers": layers or 1,
        }
    names = {"attention": "core_attn", "mlp": "mlp"}
    modules = [names[module] for module in config.recomputed_modules if module in names]
    return {"recompute_granularity": "selective", "recompute_modules": modules}


class RecomputableRowParallelLinear(RowParallelLinear):
    """Megatron-core's row-parallel linear layer, which returns a copy-free view of its bias.

    The MLP returns its last bias, which the residual branch adds. When the MLP is recomputed, Megatron-core
    modifies its results in place, so that they become results of an autograd operation. If one of them is
    the parameter itself, as in 0.16.1, each backward pass includes the passes of all previous microbatches,
    and ends in a deadlock.
    """

    def forward(self, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the parent's result, with a view of the bias."""
        output, bias = super().forward(*args, **options)
        if bias is not None:
            bias = bias.view_as(bias) if torch.is_grad_enabled() else bias.detach()
        return output, bias


class ParallelResidualLayer(TransformerLayer):
    """A layer x + attention(norm(x)) + MLP(norm'(x)), as in GPT-NeoX (arXiv 2204.06745, section 2.1).

    Megatron-core's layer adds the attention's result before the MLP reads it. Here the spec's
    `self_attn_bda` is `get_bias_dropout`, so that the parent's attention part returns its branch alone.
    """

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
        """Return the output, of the shape of `hidden_states`, and the context of cross-attention, None."""
        branch, context = self._forward_attention(hidden_states, **options)
        return self._forward_mlp(hidden_states, options.get("inference_context")) + branch, context


def get_bias_dropout(training: bool, _fused: bool) -> Callable[..., torch.Tensor]:
    """Return a function that adds a bias and applies dropout, with the signature of Megatron-core's.

    The function ignores the residual, its second argument.
    """

    def bias_dropout(
        result: tuple[torch.Tensor, torch.Tensor | None], _residual: torch.Tensor, probability: float
    ) -> torch.Tensor:
        output, bias = result
        return F.dropout(output if bias is None else output + bias, probability, training)

    return bias_dropout


def build_layer_spec(config: RunConfig) -> ModuleSpec:
    """Build the spec of one transformer layer with the run's attention variant.

    Raises:
        FieldError: The attention's backend or kernel cannot run on this machine.
    """
    is_parallel = config.model.parallel_residual
    return ModuleSpec(
        module=ParallelResidualLayer if is_parallel else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ReplicatedNorm,
            self_attention=resolve_layer(config.attention).build_spec(config.attention),
            self_attn_bda=get_bias_dropout if is_parallel else get_bias_dropout_add,
            pre_mlp_layernorm=ReplicatedNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RecomputableRowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_block_spec(config: RunConfig, *, num_layers: int | None = None) -> TransformerBlockSubmodules:
    """Build the spec of `num_layers` layers (None for all), and of the final norm of the last stage."""
    layer = build_layer_spec(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * (num_layers or config.model.num_layers), layer_norm=ReplicatedNorm
    )


def build_gpt_chunks(
    config: RunConfig, *, dtype: torch.dtype | None = None, draws_weights: bool = True
) -> list[GPT]:
    """Build this rank's model chunks, initialized from `training.seed`.

    The process groups must exist (`joined_topology`). The full model has the same weights in every layout.
    A rank has one model chunk, or several if pipeline stages are interleaved.

    Args:
        config: The run.
        dtype: Type of weights and activations; None for that of `training.precision`.
        draws_weights: Whether to initialize the weights; false if they will be loaded from a file.
    """
    chunks = [_build_chunk(config, chunk, dtype) for chunk in range(config.parallel.virtual_pipeline)]
    for chunk in chunks if draws_weights else []:
        initialize_weights(chunk, config)
    return chunks


def _build_chunk(config: RunConfig, chunk: int, dtype: torch.dtype | None) -> GPT:
    num_chunks = config.parallel.virtual_pipeline
    virtual_stage = chunk if num_chunks > 1 else None
    stage = parallel_state.get_pipeline_model_parallel_rank()
    layers_of_stage = config.parallel.layers_of_stages(config.model.num_layers)[stage]
    model = GPT(
        is_loss_chunked=resolve_output_loss(config) == "chunked",
        is_loss_blocked=is_loss_blocked(config, device="gpu" if torch.cuda.is_available() else "cpu"),
        z_loss=config.model.z_loss,
        config=build_transformer_config(config, dtype=dtype),
        transformer_layer_spec=build_block_spec(config, num_layers=layers_of_stage // num_chunks),
        vocab_size=config.model.padded_vocab_size,
        max_sequence_length=config.data.sequence_length,
        pre_process=stage == 0 and chunk == 0,
        post_process=stage == config.parallel.pipeline - 1 and chunk == num_chunks - 1,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        vp_stage=virtual_stage,
    )
    if config.attention.uses_model_rotary and config.attention.rotary != "none":
        # Megatron-core can rotate fewer features than kv_channels, but not more, as SAS does with E > D.
        model.rotary_pos_emb = build_rotary_embedding(config, cp_group=model.pg_collection.cp)
    return model


def build_rotary_embedding(config: RunConfig, *, cp_group: torch.distributed.ProcessGroup) -> RotaryEmbedding:
    """Build the rotary embedding of a model, with scaled frequencies if the config has a scaling."""
    model = config.model
    embedding = RotaryEmbedding(
        kv_channels=config.attention.rotary_width,
        rotary_percent=1.0,
        rotary_base=model.rotary_base,
        cp_group=cp_group,
    )
    # Megatron-core 0.16.1 has no choice of Llama 3's other numbers, and scales positions for `linear`.
    embedding.inv_freq = scale_frequencies(embedding.inv_freq, model)
    return embedding
