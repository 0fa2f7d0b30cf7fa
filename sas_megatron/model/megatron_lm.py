"""Any attention variant in Megatron-LM's own scripts: `--spec sas_megatron.model.megatron_lm layer_spec`.

The environment variable SAS_MEGATRON_CONFIG names a run's config when the scripts import this module:

    SAS_MEGATRON_CONFIG=configs/125m/sas.yaml torchrun … pretrain_gpt.py \\
        --spec sas_megatron.model.megatron_lm layer_spec --num-attention-heads 12 --kv-channels 64 …

The sizes on the command line must equal the config's. The layers are initialized as the config
describes, in any layout.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from sas_megatron.attention.layer import resolve_layer
from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.model.assembly import (
    ParallelResidualLayer,
    build_layer_spec,
    build_transformer_config,
)
from sas_megatron.model.initialization import initialize_layer

CONFIG_VARIABLE = "SAS_MEGATRON_CONFIG"
# The fields of Megatron-core's config that decide the layer's shape, in addition to the variant's options.
SIZES = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("no_rope_freq", "add_qkv_bias"),
)


class SpecifiedLayer(TransformerLayer):
    """A transformer layer with the attention of a run's config, in a model that Megatron-LM builds."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        run_config: RunConfig,
        **options: Any,
    ) -> None:
        _check_sizes(config, run_config)
        super().__init__(config, submodules, *args, **options)
        self.attention = run_config.attention
        initialize_layer(self, run_config)

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **options: Any) -> Any:
        """Run the parent's forward pass.

        Raises:
            FieldError: The model's rotary embedding has a different width than the attention's config.
        """
        applies_model_rotary = self.attention.uses_model_rotary and self.attention.rotary != "none"
        if rotary_pos_emb is not None and applies_model_rotary:
            width, model_width = self.attention.rotary_width, rotary_pos_emb.shape[-1]
            if model_width != width:
                raise FieldError(
                    "attention.rotary_dim",
                    width,
                    f"must equal the {model_width} features that this model rotates "
                    "(--kv-channels × --rotary-percent)",
                    f"set attention.rotary_dim={model_width} in the config",
                )
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **options)


class SpecifiedParallelLayer(SpecifiedLayer, ParallelResidualLayer):
    """`SpecifiedLayer` with parallel residual branches."""


def _check_sizes(config: TransformerConfig, run_config: RunConfig) -> None:
    """Raise `UserError` if the command line and the config differ.

    Megatron-core constructs the error again from its text alone, to add which module it was building; a
    `FieldError` does not support that.
    """
    layer = resolve_layer(run_config.attention)
    needed = layer.transformer_config_type
    if not isinstance(config, needed):
        raise UserError(
            f"attention.kind={run_config.attention.kind}: needs a {needed.__name__}, but the model has a "
            f"{type(config).__name__}; add --multi-latent-attention"
        )
    if run_config.model.rotary_scaling != "none":
        raise UserError(
            f"model.rotary_scaling={run_config.model.rotary_scaling}: is not supported in Megatron-LM's "
            "scripts, which build the rotary embedding of the model; set it to none, or train with "
            "`sas-megatron train`"
        )
    expected = build_transformer_config(run_config)
    for name in (*SIZES, *layer.transformer_options(run_config.attention)):
        value, stated = getattr(config, name), getattr(expected, name)
        if value != stated:
            raise UserError(
                f"--{name.replace('_', '-')}={value}: must equal {stated} of "
                f"{os.environ[CONFIG_VARIABLE]}; change one of them"
            )


def _load_named_config() -> RunConfig:
    path = os.environ.get(CONFIG_VARIABLE)
    if path is None:
        raise FieldError(CONFIG_VARIABLE, "", "must name a run's config", "set it to a file in configs/")
    return load_run_config(path)


def build_specified_layer(run_config: RunConfig) -> ModuleSpec:
    """Build the spec of one layer with the run's attention, norms and MLP."""
    return ModuleSpec(
        module=SpecifiedParallelLayer if run_config.model.parallel_residual else SpecifiedLayer,
        params={"run_config": run_config},
        submodules=build_layer_spec(run_config).submodules,
    )


layer_spec = build_specified_layer(_load_named_config())
