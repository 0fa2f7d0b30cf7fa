"""The layer spec in Megatron-LM's scripts, which import it by name and build their GPT model from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.attention.definitions import DEFINITIONS
from tests.fork_server import ForkedCommand
from tests.model.model_parts import random_tokens
from tests.rank_pool import in_layout
from tests.run_configs import small_config

SPEC = ("sas_megatron.model.megatron_lm", "layer_spec")


def import_spec(path: Path) -> Any:
    """Import the spec as `--spec` does, with the config named in the environment."""
    from megatron.core.transformer.spec_utils import import_module

    os.environ["SAS_MEGATRON_CONFIG"] = str(path)
    sys.modules.pop(SPEC[0], None)
    return import_module(SPEC)


def build_their_model(path: Path, config: RunConfig, **sizes: Any) -> Any:
    """Build Megatron-core's GPT, with the arguments of Megatron-LM's model provider."""
    from megatron.core.models.gpt import GPTModel

    from sas_megatron.model.assembly import build_transformer_config

    transformer = build_transformer_config(config, dtype=torch.float64)
    for name, value in sizes.items():
        setattr(transformer, name, value)
    return GPTModel(
        config=transformer,
        transformer_layer_spec=import_spec(path),
        vocab_size=config.model.padded_vocab_size,
        max_sequence_length=config.data.sequence_length,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
    )


def compare_with_ours(path: Path, config: RunConfig) -> tuple[bool, float]:
    """Return whether all layers' weights are bit-identical, and the largest difference of the logits."""
    from sas_megatron.model.assembly import build_gpt_chunks

    in_layout(config.parallel)
    theirs = build_their_model(path, config)
    (ours,) = build_gpt_chunks(config, dtype=torch.float64)
    our_weights = dict(ours.named_parameters())
    equal = True
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.startswith("decoder.layers."):
                equal = equal and torch.equal(parameter, our_weights[name])
            else:
                parameter.copy_(our_weights[name])
        tokens = random_tokens(config)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        difference = theirs(tokens, positions, None) - ours(tokens, positions, None)
    return equal, float(difference.abs().max())


def config_of(attention: dict[str, Any], tensor: int = 1, **model: Any) -> RunConfig:
    return small_config(attention=attention, parallel={"tensor": tensor}, model=model)


ATTENTIONS: dict[str, small.Attention] = {
    "mha": small.MHA,
    "gqa": small.GQA,
    "mqa": small.MQA,
    "mla": small.MLA,
    "mfa": small.MFA,
    "diff": {**small.DIFF, **small.MODIFIERS},
    "sas": {**small.SAS, "head_expansion": 2, "rotary_dim": 6},
    "tpa": small.TPA,
    "mla without rotary": {**small.MLA, "rotary": "none"},
    "sas without rotary": {**small.SAS, "head_expansion": 2, "rotary": "none"},
}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", [*KINDS, *("mla without rotary", "sas without rotary")])
def test_the_spec_of_every_kind_computes_the_same_as_our_model(
    ranks: Any, tmp_path: Path, name: str, tensor: int
) -> None:
    config = config_of(ATTENTIONS[name], tensor)
    assert config.attention.kind in DEFINITIONS
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    for equal, difference in ranks(tensor).run(compare_with_ours, path, config):
        assert equal, "the layers' initial weights"
        assert difference <= 1e-12


def test_parallel_residual_branches_and_biases_of_queries_are_built(ranks: Any, tmp_path: Path) -> None:
    config = config_of({**ATTENTIONS["gqa"], "qkv_bias": True}, parallel_residual=True)
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    [(equal, difference)] = ranks(1).run(compare_with_ours, path, config)
    assert equal
    assert difference <= 1e-12
    [message] = ranks(1).run(error_message, path, config, {"add_qkv_bias": False})
    assert message.startswith(f"--add-qkv-bias=False: must equal True of {path}; change one of them")


def test_scaled_rotary_embeddings_are_rejected_since_the_scripts_build_them(
    ranks: Any, tmp_path: Path
) -> None:
    config = config_of(ATTENTIONS["gqa"], rotary_scaling="linear", rotary_scaling_factor=2.0)
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    [message] = ranks(1).run(error_message, path, config, {})
    assert message.startswith("model.rotary_scaling=linear: is not supported in Megatron-LM's scripts")


def error_message(path: Path, config: RunConfig, sizes: dict[str, Any]) -> str:
    """Return the error message of building and running the model, on a rank."""
    in_layout(config.parallel)
    try:
        model = build_their_model(path, config, **sizes)
        tokens = random_tokens(config)
        model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    except UserError as error:
        return str(error)
    return "no error"


def test_sizes_that_differ_from_the_config_are_rejected(ranks: Any, tmp_path: Path) -> None:
    config = config_of(ATTENTIONS["sas"])
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    [message] = ranks(1).run(error_message, path, config, {"kv_channels": 8})
    assert message.startswith(f"--kv-channels=8: must equal 6 of {path}; change one of them")


def test_layers_without_rotary_embeddings_need_the_option_of_the_scripts(ranks: Any, tmp_path: Path) -> None:
    config = config_of({**ATTENTIONS["gqa"], "rotary": "none"})
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    [message] = ranks(1).run(error_message, path, config, {"no_rope_freq": None})
    assert message.startswith(f"--no-rope-freq=None: must equal [1, 1] of {path}; change one of them")


def test_a_rotary_width_that_differs_from_the_models_is_rejected(ranks: Any, tmp_path: Path) -> None:
    config = config_of({**ATTENTIONS["sas"], "rotary_dim": None})
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    [message] = ranks(1).run(error_message, path, config, {})
    assert message == (
        "attention.rotary_dim=10: must equal the 6 features that this model rotates "
        "(--kv-channels × --rotary-percent); set attention.rotary_dim=6 in the config"
    )


def test_latent_attention_without_its_transformer_config_is_rejected(ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config_of(ATTENTIONS["mla"])))
    [message] = ranks(1).run(error_message, path, config_of(ATTENTIONS["mha"]), {})
    assert message.startswith(
        "attention.kind=mla: needs a MLATransformerConfig, but the model has a TransformerConfig; "
        "add --multi-latent-attention"
    )


def test_without_a_config_the_import_names_the_variable_to_set() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "SAS_MEGATRON_CONFIG"}
    command = ForkedCommand(module=SPEC[0], environment=environment)
    assert command.wait(timeout=60) != 0
    assert "SAS_MEGATRON_CONFIG=: must name a run's config; set it to a file in configs/" in command.errors()
