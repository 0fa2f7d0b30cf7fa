"""Errors of unknown keys and of the attention section: each message has field, value, rule and remedy."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.config.hints import known_keys
from sas_megatron.config.loading import build_run_config
from sas_megatron.config.megatron_flags import MEGATRON_ALIASES, NOT_OFFERED, OTHER_UNITS
from sas_megatron.config.model import ModelConfig
from tests.run_configs import small_config, small_tree

MHA: dict[str, Any] = {"kind": "mha", "num_heads": 6, "head_dim": 10}
SAS: dict[str, Any] = {"kind": "sas", "num_heads": 6, "head_dim": 10}
MLA: dict[str, Any] = {
    **MHA,
    "kind": "mla",
    "rotary_head_dim": 4,
    "kv_lora_rank": 8,
    "query_lora_rank": None,
}

# Sections that break one rule each -> the full message.
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt key": (
        {"attention": {**SAS, "kernal_size": 3}},
        "attention.kernal_size=3: no such key; did you mean attention.kernel_size?",
    ),
    "misspelt section": (
        {"modle": {"num_layers": 2}},
        "modle={'num_layers': 2}: no such key; did you mean model?",
    ),
    "key of another section": (
        {"training": {"learning_rate": 0.1}},
        "training.learning_rate=0.1: no such key; did you mean optimizer.learning_rate?",
    ),
    "key of another kind": (
        {"attention": {**MHA, "num_head": 6}},
        "attention.num_head=6: no such key; did you mean attention.num_heads?",
    ),
    "key of one other kind": (
        {"attention": {**MHA, "kv_lora_rank": 8}},
        "attention.kv_lora_rank=8: no such key; attention.kv_lora_rank belongs to attention.kind=mla, and "
        "this run has attention.kind=mha",
    ),
    "misspelt key of another kind": (
        {"attention": {**MHA, "kernal_size": 3}},
        "attention.kernal_size=3: no such key; did you mean attention.kernel_size? attention.kernel_size "
        "belongs to attention.kind=sas, and this run has attention.kind=mha",
    ),
    "key of another kind in another section": (
        {"model": {"key_rank": 2}},
        "model.key_rank=2: no such key; attention.key_rank belongs to attention.kind=tpa, and this run has "
        "attention.kind=mha",
    ),
    "name in Megatron-LM": (
        {"parallel": {"tensor_model_parallel_size": 2}},
        "parallel.tensor_model_parallel_size=2: no such key; did you mean parallel.tensor?",
    ),
    "option of Megatron-LM": (
        {"data": {"seq-length": 128}},
        "data.seq-length=128: no such key; did you mean data.sequence_length?",
    ),
    "nothing like it": (
        {"model": {"zzzzzz": 1}},
        "model.zzzzzz=1: no such key; zzzzzz is not offered; the fields of model are "
        + ", ".join(ModelConfig.model_fields),
    ),
    "no such section": (
        {"zzzzzz": {"a": 1}},
        "zzzzzz={'a': 1}: no such key; known sections: model, attention, parallel, data, optimizer, "
        "schedule, training, deepspeed, evaluation, checkpoint, health, logging",
    ),
    "unknown kind": (
        {"attention": {"kind": "flash", "num_heads": 6}},
        "attention.kind=flash: is not a known variant; use one of diff, gqa, mfa, mha, mla, mqa, sas, tpa",
    ),
    "kind that is not a string": (
        {"attention": {"kind": ["sas"]}},
        "attention.kind=['sas']: is not a known variant; use one of diff, gqa, mfa, mha, mla, mqa, sas, tpa",
    ),
    "no kind": (
        {"attention": {"num_heads": 6}},
        "attention: needs a kind; use one of diff, gqa, mfa, mha, mla, mqa, sas, tpa",
    ),
    "heads over ranks": (
        {"attention": MHA, "parallel": {"tensor": 4}},
        "attention.num_heads=6: must be divisible by parallel.tensor=4, the ranks that share the heads; "
        "set parallel.tensor to one of [1, 2, 3, 6]",
    ),
    "key/value heads over ranks": (
        {"attention": {**MHA, "kind": "gqa", "num_kv_heads": 2}, "parallel": {"tensor": 3}},
        "attention.num_kv_heads=2: must be a multiple or a divisor of parallel.tensor=3; "
        "set parallel.tensor to one of [1, 2, 6]",
    ),
    "key/value heads over query heads": (
        {"attention": {**MHA, "kind": "gqa", "num_kv_heads": 4}},
        "attention.num_kv_heads=4: must divide attention.num_heads=6; use one of [1, 2, 3, 6]",
    ),
    "multi-head with groups": (
        {"attention": {**MHA, "num_kv_heads": 3}},
        "attention.num_kv_heads=3: must equal num_heads in multi-head attention; omit it, or use kind: gqa",
    ),
    "multi-query with groups": (
        {"attention": {**MHA, "kind": "mqa", "num_kv_heads": 2}},
        "attention.num_kv_heads=2: must be 1 in multi-query attention; omit it, or use kind: gqa",
    ),
    "tensor products with groups": (
        {"attention": {**MHA, "kind": "tpa", "num_kv_heads": 2}},
        "attention.num_kv_heads=2: must equal num_heads in tensor product attention; "
        "omit it, and set attention.key_rank and attention.value_rank",
    ),
    "tensor products over ranks": (
        {"attention": {**MHA, "kind": "tpa"}, "parallel": {"tensor": 4}},
        "attention.num_heads=6: must be divisible by parallel.tensor=4, the ranks that share the heads; "
        "set parallel.tensor to one of [1, 2, 3, 6]",
    ),
    "rank of a query without factors": (
        {"attention": {**MHA, "kind": "tpa", "factorize_query": False, "query_rank": 6}},
        "attention.query_rank=6: must be null if attention.factorize_query=false; "
        "omit it, or set attention.factorize_query=true",
    ),
    "no rank": (
        {"attention": {**MHA, "kind": "tpa", "key_rank": 0}},
        "attention.key_rank=0: must be positive; use 1 or more",
    ),
    "factorization with groups": (
        {"attention": {**MHA, "kind": "mfa", "query_rank": 8, "num_kv_heads": 2}},
        "attention.num_kv_heads=2: must be 1 in multi-matrix factorization attention; "
        "omit it, or use kind: gqa",
    ),
    "factorization over ranks": (
        {"attention": {**MHA, "kind": "mfa", "query_rank": 8}, "parallel": {"tensor": 4}},
        "attention.num_heads=6: must be divisible by parallel.tensor=4, the ranks that share the heads; "
        "set parallel.tensor to one of [1, 2, 3, 6]",
    ),
    "no low rank": (
        {"attention": {**MHA, "kind": "mfa", "query_rank": 61}},
        "attention.query_rank=61: must not exceed the 60 features of all query heads; "
        "use a smaller rank, or kind: mqa, whose queries have full rank",
    ),
    "no columns": (
        {"attention": {**MHA, "kind": "mfa", "query_rank": 0}},
        "attention.query_rank=0: must be positive; use 1 or more",
    ),
    "no heads": (
        {"attention": {**MHA, "num_heads": 0}},
        "attention.num_heads=0: must be positive; use 1 or more",
    ),
    "latent attention with groups": (
        {"attention": {**MLA, "num_kv_heads": 2}},
        "attention.num_kv_heads=2: must equal num_heads in latent attention; "
        "omit it; kv_lora_rank decides the size of the KV cache",
    ),
    "latent attention with the others' positions": (
        {"attention": {**MLA, "rotary_dim": 4}},
        "attention.rotary_dim=4: must be null in latent attention, which has separate features for "
        "positions; use rotary_head_dim",
    ),
    "odd rotary width of latent attention": (
        {"attention": {**MLA, "rotary_head_dim": 5}},
        "attention.rotary_head_dim=5: must be even, since rotary embeddings rotate pairs of features; use 6",
    ),
    "values wider than keys": (
        {"attention": {**MLA, "value_head_dim": 15}},
        "attention.value_head_dim=15: must be at most head_dim + rotary_head_dim = 14; use 14 or less",
    ),
    "no latent": (
        {"attention": {**MLA, "kv_lora_rank": 0}},
        "attention.kv_lora_rank=0: must be positive; use 1 or more",
    ),
    "latent attention's heads over ranks": (
        {"attention": MLA, "parallel": {"tensor": 4}},
        "attention.num_heads=6: must be divisible by parallel.tensor=4, the ranks that share the heads; "
        "set parallel.tensor to one of [1, 2, 3, 6]",
    ),
    "even kernel": (
        {"attention": {**SAS, "kernel_size": 4}},
        "attention.kernel_size=4: must be odd, so that the convolution preserves head_dim; use 3 or 5",
    ),
    "fewer simulated features": (
        {"attention": {**SAS, "simulated_head_dim": 8}},
        "attention.simulated_head_dim=8: must be at least attention.head_dim=10; use 15, for example",
    ),
    "width without features": (
        {"attention": {**SAS, "simulated_head_dim": 16, "simulate_features": False}},
        "attention.simulated_head_dim=16: must be head_dim=10 if attention.simulate_features=false; omit it",
    ),
    "odd rotary width": (
        {"attention": {**MHA, "rotary_dim": 7}},
        "attention.rotary_dim=7: must be even, since rotary embeddings rotate pairs of features; use 8",
    ),
    "rotary width beyond the head": (
        {"attention": {**MHA, "rotary_dim": 12}},
        "attention.rotary_dim=12: must not exceed the 10 features of a query/key head; use 10 or less",
    ),
    "odd head": (
        {"attention": {**MHA, "head_dim": 7}},
        "attention.head_dim=7: must be even, since rotary embeddings rotate pairs of its features; "
        "use an even width, or set attention.rotary_dim or attention.rotary=none",
    ),
    "odd simulated head": (
        {"attention": {**SAS, "simulated_head_dim": 13}},
        "attention.simulated_head_dim=13: must be even, since rotary embeddings rotate pairs of its features"
        "; use an even width, or set attention.rotary_dim or attention.rotary=none",
    ),
    "rotary embeddings before what is not simulated": (
        {"attention": {**MHA, "rotary": "before"}},
        "attention.rotary=before: must be after or none with attention.kind=mha; use after",
    ),
    "rotary width without rotary embeddings": (
        {"attention": {**MHA, "rotary": "none", "rotary_dim": 4}},
        "attention.rotary_dim=4: must be null if attention.rotary=none; omit it",
    ),
    "rotary width of base heads": (
        {"attention": {**SAS, "rotary": "before", "rotary_dim": 12}},
        "attention.rotary_dim=12: must not exceed the 10 features of a query/key head; use 10 or less",
    ),
    "aggregation of identity": (
        {"attention": {**SAS, "initialization": "identity", "aggregation": "rsqrt"}},
        "attention.aggregation=rsqrt: must be mean with identity initialization, since the layer starts as "
        "the base layer; omit it",
    ),
    "rotary width of identity": (
        {"attention": {**SAS, "initialization": "identity", "rotary_dim": 12}},
        "attention.rotary_dim=12: must be at most attention.head_dim=10 with identity initialization; "
        "omit it",
    ),
    "QK-norm of identity": (
        {"attention": {**SAS, "initialization": "identity", "qk_norm": True}},
        "attention.qk_norm=True: must be false with identity initialization, since norms of 16 features "
        "differ from those of 10; set attention.simulated_head_dim=10, or another initialization",
    ),
    "biases of a kind without them": (
        {"attention": {**MLA, "qkv_bias": True}},
        "attention.qkv_bias=True: is not supported by attention.kind=mla; "
        "omit it, or use one of the kinds mha, gqa, mqa, diff, sas",
    ),
    "biases that exist already": (
        {"attention": {**MHA, "qkv_bias": True}, "model": {"linear_bias": True}},
        "attention.qkv_bias=True: has no effect with model.linear_bias=true, which adds these biases and "
        "those of all other projections; set attention.qkv_bias=false",
    ),
    "rotary scaling of latent attention": (
        {"attention": MLA, "model": {"rotary_scaling": "linear", "rotary_scaling_factor": 2.0}},
        "model.rotary_scaling=linear: is not supported by attention.kind=mla, which has its own rotary "
        "embedding; set model.rotary_scaling=none and omit its other fields, or use another kind",
    ),
    "unknown gate": (
        {"attention": {**MHA, "output_gate": "ring"}},
        "attention.output_gate='ring': is not one of the choices; use 'none', 'headwise' or 'elementwise'",
    ),
    "dropout of everything": (
        {"attention": {**MHA, "dropout": 1.0}},
        "attention.dropout=1.0: must be at least 0.0 and below 1.0; use 0.0, for example",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_message_names_field_value_rule_and_remedy(case: str) -> None:
    sections, message = BROKEN[case]
    with pytest.raises(UserError) as caught:
        small_config(**sections)
    assert str(caught.value) == message


def test_all_wrong_fields_are_listed_in_one_error() -> None:
    tree = small_tree(model={"num_layer": 2}, optimizer={"lr": 0.1})
    del tree["logging"], tree["model"]["hidden_size"]
    with pytest.raises(UserError) as caught:
        build_run_config(tree)
    assert str(caught.value).splitlines() == [
        "model.hidden_size: is required; add it",
        "model.num_layer=2: no such key; did you mean model.num_layers?",
        "optimizer.lr=0.1: no such key; did you mean optimizer.learning_rate?",
        "logging: is required; add it",
    ]


def test_hints_name_existing_keys() -> None:
    known = set(known_keys({"attention": {"kind": "sas"}}))
    assert {*MEGATRON_ALIASES.values(), *(other.field for other in OTHER_UNITS.values())} <= known
    # Hints are given for unknown keys, so no option may be the last name of a valid key.
    names = {key.rpartition(".")[2] for key in known}
    assert not {*MEGATRON_ALIASES, *OTHER_UNITS, *NOT_OFFERED} & names
