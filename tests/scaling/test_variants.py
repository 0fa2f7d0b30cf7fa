"""Variants of a base run, by kind or by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sas_megatron.config.attention import MODIFIERS
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import UserError
from sas_megatron.scaling.variants import build_variant
from tests.scaling.conftest import build_config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base_kind", KINDS)
def test_kind_has_defaults_from_the_base(kind: str, base_kind: str) -> None:
    base = build_config(attention__num_heads=8, attention__head_dim=4)
    _, base = build_variant(base, base_kind)
    name, variant = build_variant(base, kind)
    assert name == variant.attention.kind == kind
    assert variant.attention.num_heads == base.attention.num_heads
    assert variant.model == base.model
    assert variant.data == base.data


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (8, 2), (12, 4), (16, 4), (32, 8), (9, 3), (5, 1)])
def test_grouped_attention_has_about_a_quarter_of_the_heads_as_key_heads(heads: int, groups: int) -> None:
    _, variant = build_variant(build_config(attention__num_heads=heads), "gqa")
    assert variant.attention.num_kv_heads == groups


def test_groups_dropout_and_backend_of_the_base_are_kept() -> None:
    base = build_config(
        attention__kind="gqa",
        attention__num_kv_heads=3,
        attention__dropout=0.25,
        attention__backend="unfused",
    )
    _, variant = build_variant(base, "sas")
    assert variant.attention.num_kv_heads == 3
    assert (variant.attention.dropout, variant.attention.backend) == (0.25, "unfused")


@pytest.mark.parametrize("kind", KINDS)
def test_modifiers_of_the_base_are_kept_by_every_kind(kind: str) -> None:
    base = build_config(attention__qk_norm=True, attention__output_gate="headwise")
    _, variant = build_variant(base, kind)
    assert {name: getattr(variant.attention, name) for name in MODIFIERS} == {
        "qk_norm": True,
        "knocking_heads": False,
        "output_norm": False,
        "output_gate": "headwise",
    }


@pytest.mark.parametrize(
    ("directory", "expected"),
    [("runs/a", "runs/a_tpa"), ("runs/125m/mha", "runs/125m/tpa"), ("runs/1_mha", "runs/1_tpa")],
)
def test_run_directory_is_next_to_that_of_the_base(directory: str, expected: str) -> None:
    _, variant = build_variant(build_config(logging__run_directory=directory), "tpa")
    assert variant.logging.run_directory == expected


def test_file_replaces_only_the_attention(tmp_path: Path) -> None:
    path = tmp_path / "wide.yaml"
    path.write_text(
        "model: {num_layers: 99}\nattention: {kind: sas, num_heads: 6, head_dim: 6, head_expansion: 2}\n"
    )
    base = build_config()
    name, variant = build_variant(base, str(path))
    assert name == "wide"
    assert variant.attention.model_dump(exclude_unset=True)["head_expansion"] == 2
    assert variant.model == base.model


def test_file_without_attention_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("model: {num_layers: 99}\n")
    with pytest.raises(UserError, match="has no section attention; add one, with its kind"):
        build_variant(build_config(), str(path))


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"attention\.kind=ring: is not a known variant; use one of diff"):
        build_variant(build_config(), "ring")
