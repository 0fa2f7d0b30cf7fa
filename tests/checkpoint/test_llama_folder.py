"""An exported Llama has every field, tensor and file that transformers and vLLM read, with the right values.

vLLM is not a dependency. The fields and names below are those that its Llama reads, in
vllm/model_executor/models/llama.py at commit e06c9ba2a6ea923a84add30f5dafaea126429b81
(https://github.com/vllm-project/vllm): the constructors of `LlamaAttention`, `LlamaDecoderLayer`,
`LlamaModel` and `LlamaForCausalLM`, and `LlamaModel.load_weights`. vLLM reads the rotary embedding from
`rope_parameters`, which transformers 5, or vLLM's `patch_rope_parameters` for transformers 4, makes of
`rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.export import export_model
from sas_megatron.checkpoint.tensor_files import StoredTensors
from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.checkpoint.unsharded_models import build_unsharded_weights
from tests.run_configs import small_config
from tests.small_data import SmallData

SCALED = {
    "rotary_scaling": "llama3",
    "rotary_scaling_factor": 8.0,
    "rotary_low_frequency_factor": 1.0,
    "rotary_high_frequency_factor": 4.0,
    "rotary_original_length": 8192,
    "rotary_base": 500000,
}
LLAMAS: dict[str, tuple[small.Attention, dict[str, Any]]] = {
    "mha": (small.MHA, {}),
    "gqa, scaled and tied": (small.GQA, {**SCALED, "tie_embeddings": True}),
    "mqa, biased": (small.MQA, {"linear_bias": True, "norm_epsilon": 1e-6}),
}
# With any of these, vLLM would build another model.
ABSENT = (
    *("bias", "qkv_bias", "is_causal", "layer_types", "sliding_window", "logit_scale"),
    *("quantization_config", "pretraining_tp"),
)


def expected_fields(config: RunConfig) -> dict[str, Any]:
    """Return the fields of config.json by the meaning that vLLM and transformers give them."""
    model, attention = config.model, config.attention
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": {"mha": 4, "gqa": 2, "mqa": 1}[attention.kind],
        "head_dim": 6,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "max_position_embeddings": 12,
        "attention_bias": model.linear_bias,
        "mlp_bias": model.linear_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": None,
    }


def expected_shapes(fields: dict[str, Any]) -> dict[str, list[int]]:
    """Return the tensors that `load_weights` of vLLM expects of these fields, before it joins q, k and v."""
    hidden, outer, table = (fields[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    query = fields["num_attention_heads"] * fields["head_dim"]
    key = fields["num_key_value_heads"] * fields["head_dim"]
    matrices = {
        "self_attn.q_proj": [query, hidden],
        "self_attn.k_proj": [key, hidden],
        "self_attn.v_proj": [key, hidden],
        "self_attn.o_proj": [hidden, query],
        "mlp.gate_proj": [outer, hidden],
        "mlp.up_proj": [outer, hidden],
        "mlp.down_proj": [hidden, outer],
    }
    shapes = {"model.embed_tokens.weight": [table, hidden], "model.norm.weight": [hidden]}
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [table, hidden]
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = [hidden]
        for name, shape in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if fields["mlp_bias" if name.startswith("mlp") else "attention_bias"]:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes


@pytest.fixture
def exported(ranks: Any, small_data: SmallData, tmp_path: Path, request: Any) -> tuple[Path, RunConfig]:
    """Return the folder of an exported Llama, and the run's config."""
    attention, model = LLAMAS[request.param]
    config = small_config(
        attention=attention,
        model={**model, "vocab_size": 512, "vocab_multiple": 12},
        data={"tokenizer": str(small_data.tokenizer)},
    )
    (weights,) = ranks(1).run(build_unsharded_weights, config, torch.float32)
    return export_model(weights, config, folder=tmp_path / "model", shard_bytes=40_000).folder, config


@pytest.mark.parametrize("exported", LLAMAS, indirect=True)
def test_config_and_tensors_are_those_that_vllm_reads(exported: tuple[Path, RunConfig]) -> None:
    folder, config = exported
    fields = json.loads((folder / "config.json").read_text())
    expected = expected_fields(config)
    assert {name: fields[name] for name in expected} == expected
    assert not set(ABSENT) & fields.keys()
    assert fields["rope_theta"] == config.model.rotary_base
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert fields.get("rope_scaling") == (None if config.model.rotary_scaling == "none" else scaling)
    stored = StoredTensors(folder, stem="model")
    assert {name: list(stored.shape(name)) for name in stored} == expected_shapes(fields)
    assert {stored.dtype(name) for name in stored} == {"F32"}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == set(stored)
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("exported", LLAMAS, indirect=True)
def test_transformers_reads_the_same_fields_and_tensors(exported: tuple[Path, RunConfig]) -> None:
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder, config = exported
    read = LlamaConfig.from_pretrained(folder)
    expected = expected_fields(config)
    dtype = expected.pop("torch_dtype")
    assert {name: getattr(read, name) for name in expected} == expected
    assert str(read.dtype).removeprefix("torch.") == dtype
    assert read.rope_parameters["rope_theta"] == config.model.rotary_base
    kind = config.model.rotary_scaling
    assert read.rope_parameters["rope_type"] == ("default" if kind == "none" else kind)
    # None of the fields is unknown to `LlamaConfig`.
    written = json.loads((folder / "config.json").read_text()).keys()
    assert written - {"torch_dtype", "rope_theta", "rope_scaling"} <= LlamaConfig().to_dict().keys()
    model, loading = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = StoredTensors(folder, stem="model")
    state = model.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert state.keys() - set(stored) <= {"lm_head.weight"}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    generation = GenerationConfig.from_pretrained(folder)
    assert tokenizer.eos_token_id == generation.eos_token_id == read.eos_token_id
    assert tokenizer.pad_token_id == generation.pad_token_id == read.pad_token_id
    assert len(tokenizer) == read.vocab_size
    assert tokenizer.model_max_length == read.max_position_embeddings
