"""Any variant in Megatron-LM's own scripts: `--spec sas_megatron.model.megatron_lm layer_spec`.

Which one, a run's config says, whose path is in SAS_MEGATRON_CONFIG when the scripts import this module:

    SAS_MEGATRON_CONFIG=configs/125m/sas.yaml torchrun … pretrain_gpt.py \\
        --spec sas_megatron.model.megatron_lm layer_spec --num-attention-heads 12 --kv-channels 64 …

Sizes stand in the command line there; a layer whose sizes are not those of the config is refused. Initial
weights of the layers are the config's, at any layout.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.model.assembly import build_layer_spec, build_transformer_config
from sas_megatron.model.initialization import initialize_layer

CONFIG_VARIABLE = "SAS_MEGATRON_CONFIG"
# Of Megatron-core's config, what the layer's shape depends on; options of the variant come on top.
SIZES = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


class SpecifiedLayer(TransformerLayer):
    """A transformer layer with the attention of a run's config, in a model that is built elsewhere."""

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
        """As the parent.

        Raises:
            FieldError: the model turns another number of features than the attention is made for.
        """
        if rotary_pos_emb is not None and self.attention.uses_model_rotary:
            width, turned = self.attention.rotary_width, rotary_pos_emb.shape[-1]
            if turned != width:
                raise FieldError(
                    "attention.rotary_dim",
                    width,
                    f"is not what this model turns, {turned} features (--kv-channels × --rotary-percent)",
                    f"set attention.rotary_dim={turned} in the config",
                )
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **options)


def _check_sizes(config: TransformerConfig, run_config: RunConfig) -> None:
    """Raises `UserError` where the command line and the config differ.

    Megatron-core makes the error anew from its text alone, to say which module was built.
    """
    needed = run_config.attention.transformer_config_type()
    if not isinstance(config, needed):
        raise UserError(
            f"attention.kind={run_config.attention.kind}: needs a {needed.__name__}, and the model has a "
            f"{type(config).__name__}; give --multi-latent-attention"
        )
    expected = build_transformer_config(run_config)
    for name in (*SIZES, *run_config.attention.transformer_options()):
        value, stated = getattr(config, name), getattr(expected, name)
        if value != stated:
            raise UserError(
                f"--{name.replace('_', '-')}={value}: is {stated} in {os.environ[CONFIG_VARIABLE]}; "
                "let both say the same"
            )


def _named_config() -> RunConfig:
    path = os.environ.get(CONFIG_VARIABLE)
    if path is None:
        raise FieldError(CONFIG_VARIABLE, "", "must name a run's config", "set it to a file in configs/")
    return load_run_config(path)


def build_specified_layer(run_config: RunConfig) -> ModuleSpec:
    """The spec of one layer with the run's attention, norms and MLP."""
    return ModuleSpec(
        module=SpecifiedLayer,
        params={"run_config": run_config},
        submodules=build_layer_spec(run_config).submodules,
    )


layer_spec = build_specified_layer(_named_config())
