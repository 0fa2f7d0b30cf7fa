"""Whole weights reach every rank, and a base model continued as SAS has its logits before the first step."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.importing import UnshardedModel, write_model
from sas_megatron.checkpoint.tensor_files import StoredTensors
from sas_megatron.checkpoint.upcycling import upcycle
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from tests.checkpoint.whole_models import ATTENTIONS, PARTS, logits_of, whole_weights
from tests.model.model_parts import initial_weights, joined_logits, joined_weights, logits_part_of
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import cases
from tests.tolerances import assert_near

IDENTITY = {"kind": "sas", "initialization": "identity", "head_expansion": 2}


def whole_model(config: RunConfig, weights: dict[str, torch.Tensor]) -> UnshardedModel:
    return UnshardedModel(config.model, config.attention, weights.items(), "a test")


def loaded_logits(config: RunConfig) -> torch.Tensor | None:
    """On a rank: float64 logits of the model that starts from `checkpoint.initial_weights`."""
    from sas_megatron.checkpoint.initial_weights import load_initial_weights
    from sas_megatron.model.assembly import build_gpt_chunks

    in_layout(config.parallel)
    pieces = build_gpt_chunks(config, dtype=torch.float64)
    load_initial_weights(Path(str(config.checkpoint.initial_weights)), pieces, config)
    return logits_part_of(pieces, config)


LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
    "pipeline 2 interleaved": {"pipeline": 2, "virtual_pipeline": 2},
}


# In the default run both kinds of the model's other parts in every layout, and with every attention.
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
def test_every_layout_has_the_logits_of_the_weights(
    ranks: Any, tmp_path: Path, layout: str, attention: str, parts: str
) -> None:
    sections = {"attention": ATTENTIONS[attention], "model": {"num_layers": 4, **PARTS[parts]}}
    alone = small_config(**sections)
    (weights,) = ranks(1).run(whole_weights, alone, torch.float64)
    (expected,) = ranks(1).run(logits_of, weights, alone)
    write_model(whole_model(alone, weights), tmp_path / "weights", shard_bytes=60_000)
    config = small_config(
        **sections,
        parallel=LAYOUTS[layout],
        # Another seed: what is not read would be drawn otherwise.
        training={"seed": 99},
        checkpoint={"initial_weights": str(tmp_path / "weights")},
    )
    by_rank = ranks(config.parallel.model_size).run(loaded_logits, config)
    assert_near(joined_logits(by_rank, config.parallel), expected, torch.float64, "logits")


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
def test_upcycled_sas_has_the_logits_of_its_base(
    ranks: Any, tmp_path: Path, base: str, parts: str, tensor: int
) -> None:
    alone = small_config(attention=ATTENTIONS[base], model=PARTS[parts])
    (weights,) = ranks(1).run(whole_weights, alone, torch.float64)
    (expected,) = ranks(1).run(logits_of, weights, alone)
    config = small_config(
        attention={**ATTENTIONS[base], "num_kv_heads": alone.attention.num_key_value_heads, **IDENTITY},
        model=PARTS[parts],
        parallel={"tensor": tensor},
        checkpoint={"initial_weights": str(tmp_path / "weights")},
    )
    ranks(1).run(write_upcycled, alone, weights, config)
    by_rank = ranks(tensor).run(loaded_logits, config)
    assert_near(joined_logits(by_rank, config.parallel), expected, torch.float64, "logits")


def write_upcycled(base: RunConfig, weights: dict[str, torch.Tensor], config: RunConfig) -> None:
    """On a rank, where Megatron-core can be imported."""
    write_model(upcycle(whole_model(base, weights), config), Path(str(config.checkpoint.initial_weights)))


def test_the_simulation_is_what_the_run_would_draw(ranks: Any, tmp_path: Path) -> None:
    alone = small_config()
    (weights,) = ranks(1).run(whole_weights, alone, torch.bfloat16)
    config = small_config(
        attention={**ATTENTIONS["mha"], **IDENTITY},
        checkpoint={"initial_weights": str(tmp_path / "weights")},
    )
    ranks(1).run(write_upcycled, alone, weights, config)
    stored = StoredTensors(tmp_path / "weights", stem="weights")
    drawn = joined_weights(ranks(1).run(initial_weights, config))
    assert stored.keys() == drawn.keys()
    for name, weight in drawn.items():
        if ".simulation." in name:
            assert torch.equal(stored[name], weight), name
        else:
            assert torch.equal(stored[name], weights[name]), name


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "no identity": (
        ATTENTIONS["mha"],
        {**ATTENTIONS["mha"], "kind": "sas"},
        {},
        r"attention.initialization=authors: would not start as the base model; set .*=identity",
    ),
    "no simulation": (ATTENTIONS["mha"], ATTENTIONS["gqa"], {}, r"attention.kind=gqa: has no simulation"),
    "another base": (
        ATTENTIONS["mfa"],
        {**ATTENTIONS["mha"], **IDENTITY},
        {},
        r"attention.kind=mfa: of the weights in a test has heads that SAS does not start from; upcycle one",
    ),
    "other groups": (
        ATTENTIONS["gqa"],
        {**ATTENTIONS["mha"], **IDENTITY},
        {},
        r"attention.num_kv_heads=4: is 2 of the weights in a test; set attention.num_kv_heads=2",
    ),
    "other rotary positions": (
        ATTENTIONS["mha"],
        {**ATTENTIONS["mha"], **IDENTITY, "rotary_dim": 4},
        {},
        r"attention.rotary_dim=4: is 6 of the weights",
    ),
    "another base of positions": (
        ATTENTIONS["mha"],
        {**ATTENTIONS["mha"], **IDENTITY},
        {"rotary_base": 500},
        r"model.rotary_base=500: is 10000 of the weights in a test; set model.rotary_base=10000",
    ),
    "other rows": (
        ATTENTIONS["mha"],
        {**ATTENTIONS["mha"], **IDENTITY},
        {"vocab_multiple": 10},
        r"model.vocab_multiple=10: gives 50 rows, and the weights in a test have 48; set .*=4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_the_same_function_is_not_upcycled(case: str) -> None:
    base, attention, model, message = REFUSED[case]
    with pytest.raises(FieldError, match=message):
        upcycle(whole_model(small_config(attention=base), {}), small_config(attention=attention, model=model))


def test_weights_that_do_not_fit_are_refused_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    alone, folder = small_config(), tmp_path / "weights"
    (weights,) = ranks(1).run(whole_weights, alone, torch.float64)

    def problem(**sections: Any) -> str:
        with pytest.raises(AssertionError) as caught:
            ranks(2).run(
                loaded_logits,
                small_config(
                    **{"parallel": {"tensor": 2}, "checkpoint": {"initial_weights": str(folder)}, **sections}
                ),
            )
        text = str(caught.value)
        assert "rank 0:" in text
        assert "rank 1:" in text
        return text

    assert "holds neither a checkpoint nor weights that `sas-megatron checkpoint import` wrote" in problem()
    write_model(whole_model(alone, weights), folder)
    assert "model.norm_epsilon=0.001: is 1e-05 of the weights in" in problem(model={"norm_epsilon": 1e-3})
    assert "attention.kind=sas: is mha" in problem(attention=ATTENTIONS["sas"])
    remedy = "set model.vocab_multiple as in model.yaml there, or import it again with another"
    assert (
        f"embedding.word_embeddings.weight is [48, 20], and the config asks for [46, 20]; {remedy}"
        in problem(model={"vocab_multiple": 2})
    )
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    whole = file.replace(folder / "whole")
    file.write_bytes(content)
    assert "holds other weights than were written (weights_sha256 in weights.json)" in problem()
    whole.replace(file)
    record = json.loads((folder / "weights.json").read_text())
    (folder / "weights.json").write_text(json.dumps({**record, "schema_version": 7}))
    assert "is newer than format 1; update the package" in problem()
    (folder / "weights.json").write_text(json.dumps(record))
    weights.pop("decoder.layers.1.mlp.linear_fc2.weight")
    write_model(whole_model(alone, weights), tmp_path / "less")
    for name in ("weights.safetensors", "weights.json"):
        (tmp_path / "less" / name).replace(folder / name)
    assert "holds 2 tables and 6,740 other parameters, of 7,300 in the config; import it again" in problem()
