"""A run's config -> a Megatron-core GPT with its attention variant, on this rank's part of the layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
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
from sas_megatron.distributed.topology import virtual_pipeline_size
from sas_megatron.model.initialization import initialize_weights
from sas_megatron.platform.transformer_engine_fallbacks import ReplicatedNorm

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
    interleaved = config.parallel.virtual_pipeline > 1
    transformer = attention.transformer_config_type()(
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
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline_size(config.parallel),
        num_layers_in_first_pipeline_stage=config.parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=config.parallel.last_stage_layers,
        # Of what a stage has sent on, only where it came from is needed. (Sends of interleaved stages are
        # not waited for, and gloo, unlike CUDA's streams, may not have read the memory yet.)
        deallocate_pipeline_outputs=on_cuda or not interleaved,
        # Megatron-core's fused element-wise functions; on CPU they would only be compiled in vain.
        # Of GELU without a bias there is none.
        bias_activation_fusion=on_cuda and (model.linear_bias or model.activation == "swiglu"),
        bias_dropout_fusion=on_cuda,
        # One pass over queries and keys; a layer with positions of its own has none of it.
        apply_rope_fusion=attention.uses_model_rotary,
        # Needs an extension of Apex or TransformerEngine.
        gradient_accumulation_fusion=False,
        # Batched, two interleaved stages would take each other's activations for gradients: the sends
        # of both directions go between the same two ranks. Apart, they go over two groups.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        **_recompute_options(config),
        **attention.transformer_options(),
    )
    if hasattr(transformer, "rotary_base"):
        # A layer with positions of its own reads θ there, and so does the GPT in place of its argument.
        transformer.rotary_base = model.rotary_base
    if "simulation" in config.recomputed_modules:
        # Ours: Megatron-core refuses names that it does not know, and reads the list no further.
        transformer.recompute_modules.append("simulation")
    return transformer


def _recompute_options(config: RunConfig) -> dict[str, Any]:
    """`training.recompute*` as Megatron-core's fields."""
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


class BiasPassingLinear(RowParallelLinear):
    """Megatron-core's row-parallel linear, whose bias survives that the MLP is recomputed.

    The MLP returns its last bias, for the residual branch to add. Recomputation makes what it returns
    the result of an operation, in place; done to the parameter itself, as in 0.16.1, each backward
    pass then runs those of all microbatches before, and ends in a deadlock.
    """

    def forward(self, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the parent, with a tensor of its own that stands for the bias."""
        output, bias = super().forward(*args, **options)
        if bias is not None:
            bias = bias.view_as(bias) if torch.is_grad_enabled() else bias.detach()
        return output, bias


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
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=BiasPassingLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_block_spec(config: RunConfig, *, num_layers: int | None = None) -> TransformerBlockSubmodules:
    """`num_layers` layers, all if None, and the final norm (which the last stage has)."""
    layer = build_layer_spec(config)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * (num_layers or config.model.num_layers), layer_norm=ReplicatedNorm
    )


def build_gpt_chunks(
    config: RunConfig, *, dtype: torch.dtype | None = None, draws_weights: bool = True
) -> list[GPTModel]:
    """This rank's part of the model, a GPT for each piece of its stage, drawn from `training.seed`.

    The process groups must exist (`joined_topology`). Under any layout the parts join to the same
    whole, weight for weight. Most layouts have one piece; interleaved stages several.

    Args:
        config: The run.
        dtype: Of weights and activations; None: as `training.precision` says.
        draws_weights: Off: the weights are left as memory happens to hold them, to be read from a file.
    """
    pieces = [_build_piece(config, piece, dtype) for piece in range(config.parallel.virtual_pipeline)]
    for piece in pieces if draws_weights else []:
        initialize_weights(piece, config)
    return pieces


def _build_piece(config: RunConfig, piece: int, dtype: torch.dtype | None) -> GPTModel:
    pieces = config.parallel.virtual_pipeline
    virtual_stage = piece if pieces > 1 else None
    stage = parallel_state.get_pipeline_model_parallel_rank()
    layers_of_stage = config.parallel.layers_of_stages(config.model.num_layers)[stage]
    model = GPTModel(
        config=build_transformer_config(config, dtype=dtype),
        transformer_layer_spec=build_block_spec(config, num_layers=layers_of_stage // pieces),
        vocab_size=config.model.padded_vocab_size,
        max_sequence_length=config.data.sequence_length,
        pre_process=stage == 0 and piece == 0,
        post_process=stage == config.parallel.pipeline - 1 and piece == pieces - 1,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        vp_stage=virtual_stage,
    )
    if config.attention.uses_model_rotary:
        # Megatron-core can rotate a part of kv_channels, but never more than it; SAS turns up to E > D.
        model.rotary_pos_emb = RotaryEmbedding(
            kv_channels=config.attention.rotary_width,
            rotary_percent=1.0,
            rotary_base=config.model.rotary_base,
            cp_group=model.pg_collection.cp,
        )
    return model
