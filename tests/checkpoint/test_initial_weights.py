"""Unsharded weights load on every layout, and an upcycled SAS model has the logits of its base model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.importing import write_model
from sas_megatron.checkpoint.tensor_files import StoredTensors
from sas_megatron.checkpoint.unsharded_weights import UnshardedModel
from sas_megatron.checkpoint.upcycling import upcycle
from sas_megatron.checkpoint.weights_source import find_weights
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from tests.checkpoint.unsharded_models import ATTENTIONS, PARTS, build_unsharded_weights, compute_logits
from tests.model.model_parts import initial_weights, joined_logits, joined_weights, logits_part_of
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import cases
from tests.tolerances import assert_near

IDENTITY = {"kind": "sas", "initialization": "identity", "head_expansion": 2}


def unsharded_model(config: RunConfig, weights: dict[str, torch.Tensor]) -> UnshardedModel:
    """Return weights as the model of a config."""
    return UnshardedModel(config.model, config.attention, weights.items(), "a test")


def compute_loaded_logits(config: RunConfig) -> torch.Tensor | None:
    """Return the local float64 logits of a model with `checkpoint.initial_weights`."""
    from sas_megatron.checkpoint.initial_weights import load_initial_weights
    from sas_megatron.model.assembly import build_gpt_chunks

    in_layout(config.parallel)
    model_chunks = build_gpt_chunks(config, dtype=torch.float64)
    load_initial_weights(Path(str(config.checkpoint.initial_weights)), model_chunks, config)
    return logits_part_of(model_chunks, config)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
    "pipeline 2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
}


# The default run has both values of `parts` with every layout and with every attention.
@pytest.mark.parametrize(
    ("layout", "attention", "parts"),
    cases(
        itertools.product(LAYOUTS, ["gqa", "mla", "mfa", "tpa", "sas"], PARTS),
        default=[
            ("one rank", "gqa", "plain"),
            ("one rank", "mla", "biased"),
            ("one rank", "tpa", "biased"),
            ("tensor 2", "gqa", "biased"),
            ("tensor 2", "mla", "plain"),
            ("tensor 2", "mfa", "biased"),
            ("tensor 2", "tpa", "plain"),
            ("tensor 2", "sas", "plain"),
            ("tensor 2, sequence", "mfa", "plain"),
            ("tensor 2, sequence", "sas", "biased"),
            ("pipeline 2 interleaved", "gqa", "plain"),
            ("pipeline 2 interleaved", "sas", "biased"),
        ],
    ),
)
def test_weights_give_the_same_logits_on_every_layout(
    ranks: Any, tmp_path: Path, layout: str, attention: str, parts: str
) -> None:
    sections = {"attention": ATTENTIONS[attention], "model": {"num_layers": 4, **PARTS[parts]}}
    base_config = small_config(**sections)
    (weights,) = ranks(1).run(build_unsharded_weights, base_config, torch.float64)
    (expected,) = ranks(1).run(compute_logits, weights, base_config)
    write_model(unsharded_model(base_config, weights), tmp_path / "weights", shard_bytes=60_000)
    config = small_config(
        **sections,
        parallel=LAYOUTS[layout],
        # Another seed, so that weights that are not loaded would differ.
        training={"seed": 99},
        checkpoint={"initial_weights": str(tmp_path / "weights")},
    )
    by_rank = ranks(config.parallel.model_size).run(compute_loaded_logits, config)
    assert_near(joined_logits(by_rank, config.parallel), expected, torch.float64, "logits")


def test_weights_recorded_before_a_field_existed_have_its_default(ranks: Any, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    config = small_config(checkpoint={"initial_weights": str(folder)})
    (weights,) = ranks(1).run(build_unsharded_weights, config, torch.float64)
    write_model(unsharded_model(config, weights), folder)
    record = json.loads((folder / "weights.json").read_text())
    del record["architecture"]["attention"]["rotary"]
    (folder / "weights.json").write_text(json.dumps(record))
    assert find_weights(folder, config).folder == folder
    unrotated = small_config(attention={**ATTENTIONS["mha"], "rotary": "none"})
    with pytest.raises(FieldError, match=r"attention.rotary=none: must be after, as for the weights in"):
        find_weights(folder, unrotated)


BASES = ["mha", "gqa", "gqa-partly-rotary", "mqa"]


@pytest.mark.parametrize(
    ("tensor", "parts", "base"),
    cases(
        itertools.product([1, 2], PARTS, BASES),
        default=[
            *((1, "plain", base) for base in BASES),
            *((2, "biased", base) for base in BASES),
        ],
    ),
)
def test_an_upcycled_model_has_the_logits_of_its_base_model(
    ranks: Any, tmp_path: Path, base: str, parts: str, tensor: int
) -> None:
    base_config = small_config(attention=ATTENTIONS[base], model=PARTS[parts])
    (weights,) = ranks(1).run(build_unsharded_weights, base_config, torch.float64)
    (expected,) = ranks(1).run(compute_logits, weights, base_config)
    config = small_config(
        attention={**ATTENTIONS[base], "num_kv_heads": base_config.attention.num_key_value_heads, **IDENTITY},
        model=PARTS[parts],
        parallel={"tensor": tensor},
        checkpoint={"initial_weights": str(tmp_path / "weights")},
    )
    ranks(1).run(write_upcycled, base_config, weights, config)
    by_rank = ranks(tensor).run(compute_loaded_logits, config)
    assert_near(joined_logits(by_rank, config.parallel), expected, torch.float64, "logits")


def write_upcycled(base: RunConfig, weights: dict[str, torch.Tensor], config: RunConfig) -> None:
    """Upcycle and write a model on a rank, where Megatron-core can be imported."""
    write_model(upcycle(unsharded_model(base, weights), config), Path(str(config.checkpoint.initial_weights)))


def test_upcycling_initializes_the_simulation_like_a_new_run(ranks: Any, tmp_path: Path) -> None:
    base_config = small_config()
    (weights,) = ranks(1).run(build_unsharded_weights, base_config, torch.bfloat16)
    config = small_config(
        attention={**ATTENTIONS["mha"], **IDENTITY},
        checkpoint={"initial_weights": str(tmp_path / "weights")},
    )
    ranks(1).run(write_upcycled, base_config, weights, config)
    stored = StoredTensors(tmp_path / "weights", stem="weights")
    drawn = joined_weights(ranks(1).run(initial_weights, config))
    assert stored.keys() == drawn.keys()
    for name, weight in drawn.items():
        if ".simulation." in name:
            assert torch.equal(stored[name], weight), name
        else:
            assert torch.equal(stored[name], weights[name]), name


REJECTED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "no identity": (
        ATTENTIONS["mha"],
        {**ATTENTIONS["mha"], "kind": "sas"},
        {},
        r"attention.initialization=authors: must be identity, so that the upcycled .*; set .*=identity",
    ),
    "no simulation": (
        ATTENTIONS["mha"],
        ATTENTIONS["gqa"],
        {},
        r"attention.kind=gqa: must be sas to upcycle a model",
    ),
    "another base": (
        ATTENTIONS["mfa"],
        {**ATTENTIONS["mha"], **IDENTITY},
        {},
        r"attention.kind=mfa: is the attention of the weights in a test, but only mha, gqa and mqa can be",
    ),
    "other groups": (
        ATTENTIONS["gqa"],
        {**ATTENTIONS["mha"], **IDENTITY},
        {},
        r"attention.num_kv_heads=4: must be 2, as for the weights in a test; set attention.num_kv_heads=2",
    ),
    "other rotary positions": (
        ATTENTIONS["mha"],
        {**ATTENTIONS["mha"], **IDENTITY, "rotary_dim": 4},
        {},
        r"attention.rotary_dim=4: must be 6, as for the weights",
    ),
    "another base of positions": (
        ATTENTIONS["mha"],
        {**ATTENTIONS["mha"], **IDENTITY},
        {"rotary_base": 500},
        r"model.rotary_base=500: must be 10000, as for the weights in a test; set model.rotary_base=10000",
    ),
    "other rows": (
        ATTENTIONS["mha"],
        {**ATTENTIONS["mha"], **IDENTITY},
        {"vocab_multiple": 10},
        r"model.vocab_multiple=10: gives 50 rows of the embedding, but .* in a test have 48; set .*=4",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_upcycling_to_a_different_function_is_rejected(case: str) -> None:
    base, attention, model, message = REJECTED[case]
    with pytest.raises(FieldError, match=message):
        upcycle(
            unsharded_model(small_config(attention=base), {}), small_config(attention=attention, model=model)
        )


def test_mismatched_and_damaged_weights_are_rejected_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    base_config, folder = small_config(), tmp_path / "weights"
    (weights,) = ranks(1).run(build_unsharded_weights, base_config, torch.float64)

    def problem(**sections: Any) -> str:
        with pytest.raises(AssertionError) as caught:
            ranks(2).run(
                compute_loaded_logits,
                small_config(
                    **{"parallel": {"tensor": 2}, "checkpoint": {"initial_weights": str(folder)}, **sections}
                ),
            )
        text = str(caught.value)
        assert "rank 0:" in text
        assert "rank 1:" in text
        return text

    assert (
        "contains neither a checkpoint nor weights that `sas-megatron checkpoint import` wrote" in problem()
    )
    write_model(unsharded_model(base_config, weights), folder)
    assert "model.norm_epsilon=0.001: must be 1e-05, as for the weights in" in problem(
        model={"norm_epsilon": 1e-3}
    )
    assert "attention.kind=sas: must be mha" in problem(attention=ATTENTIONS["sas"])
    remedy = "set model.vocab_multiple as in its model.yaml, or import the model with another"
    assert (
        "has shape [48, 20] for embedding.word_embeddings.weight, whose shape in this run is [46, 20]; "
        f"{remedy}" in problem(model={"vocab_multiple": 2})
    )
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    intact = file.replace(folder / "intact")
    file.write_bytes(content)
    assert "contains weights that differ from what was written (weights_sha256 in weights.json)" in problem()
    intact.replace(file)
    record = json.loads((folder / "weights.json").read_text())
    (folder / "weights.json").write_text(json.dumps({**record, "schema_version": 7}))
    assert "is newer than format 1; update the package" in problem()
    (folder / "weights.json").write_text(json.dumps(record))
    weights.pop("decoder.layers.1.mlp.linear_fc2.weight")
    write_model(unsharded_model(base_config, weights), tmp_path / "incomplete")
    for name in ("weights.safetensors", "weights.json"):
        (tmp_path / "incomplete" / name).replace(folder / name)
    assert (
        "contains 2 embedding or output tables and 6,740 other parameters, but the config has 7,300 other "
        "parameters; import the complete model again"
    ) in problem()
