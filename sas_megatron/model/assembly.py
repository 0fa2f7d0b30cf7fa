"""A run's config -> a Megatron-core GPT with its attention variant, on this rank's part of the layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from sas_megatron.config.run import RunConfig
from sas_megatron.model.initialization import initialize_weights
from sas_megatron.platform.norm import ReplicatedNorm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_transformer_config(config: RunConfig, *, dtype: torch.dtype | None = None) -> TransformerConfig:
    """Megatron-core's view of the run's model and layout.

    Args:
        config: The run.
        dtype: Of weights and activations; None: as `training.precision` says.
    """
    model, attention = config.model, config.attention
    dtype = dtype or DTYPES[config.training.precision]
    on_cuda = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.num_key_value_heads,
        kv_channels=attention.head_dim,
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.normalization],
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=model.linear_bias,
        gated_linear_unit=model.activation == "swiglu",
        activation_func={"swiglu": F.silu, "gelu": F.gelu}[model.activation],
        hidden_dropout=model.hidden_dropout,
        attention_dropout=attention.dropout,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence,
        context_parallel_size=config.parallel.context,
        # Megatron-core's fused element-wise functions; on CPU they would only be compiled in vain.
        bias_activation_fusion=on_cuda and model.linear_bias,
        bias_dropout_fusion=on_cuda,
        apply_rope_fusion=True,
        # Needs an extension of Apex or TransformerEngine.
        gradient_accumulation_fusion=False,
    )


def build_layer_spec(config: RunConfig) -> ModuleSpec:
    """One transformer layer with the run's attention variant."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ReplicatedNorm,
            self_attention=config.attention.build_spec(),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ReplicatedNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_block_spec(config: RunConfig) -> TransformerBlockSubmodules:
    """All layers and the final norm."""
    layer = build_layer_spec(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * config.model.num_layers, layer_norm=ReplicatedNorm
    )


def build_gpt(config: RunConfig, *, dtype: torch.dtype | None = None) -> GPTModel:
    """This rank's part of the model, its weights drawn from `training.seed`.

    The process groups must exist (`joined_topology`). Under any layout the parts join to the same
    whole, weight for weight.
    """
    model = GPTModel(
        config=build_transformer_config(config, dtype=dtype),
        transformer_layer_spec=build_block_spec(config),
        vocab_size=config.model.padded_vocab_size,
        max_sequence_length=config.data.sequence_length,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
    )
    # Megatron-core can rotate a part of kv_channels, but never more than it; SAS turns up to E > D.
    model.rotary_pos_emb = RotaryEmbedding(
        kv_channels=config.attention.rotary_width,
        rotary_percent=1.0,
        rotary_base=config.model.rotary_base,
        cp_group=model.pg_collection.cp,
    )
    initialize_weights(model, config)
    return model
