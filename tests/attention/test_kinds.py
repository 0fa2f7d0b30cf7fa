"""The table of attention kinds, and kinds that other packages register."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.attention_kinds import KINDS, resolve_part
from sas_megatron.config.errors import FieldError
from sas_megatron.costs.attention import AttentionCosts

# Entry points that a package called tied-attention declares -> the rule in the error.
INCOMPLETE = {
    "tied = tied_attention:TiedAttentionConfig": "is registered by the package tied-attention as tied, "
    "without tied.config: a variant needs the entry points tied.config, tied.costs, tied.layer in the group "
    "sas_megatron.attention",
    "tied.layer = tied_attention_layer:TiedSelfAttention": "is registered by the package tied-attention as "
    "tied.layer, without tied.config: a variant needs the entry points tied.config, tied.costs, tied.layer "
    "in the group sas_megatron.attention",
}


def install(folder: Path, entry_points: str) -> None:
    """Write the metadata of an installed package."""
    metadata = folder / "tied_attention-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tied-attention\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[sas_megatron.attention]\n{entry_points}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_names_a_config_costs_and_a_layer(kind: str) -> None:
    from sas_megatron.attention.layer import AttentionLayer

    assert resolve_part(kind, "config").model_fields["kind"].default == kind
    assert issubclass(resolve_part(kind, "config"), AttentionConfig)
    assert issubclass(resolve_part(kind, "costs"), AttentionCosts)
    assert issubclass(resolve_part(kind, "layer"), AttentionLayer)


@pytest.mark.parametrize("entry_points", INCOMPLETE)
def test_a_package_with_an_incomplete_contract_is_named_with_the_remedy(
    entry_points: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, entry_points)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FieldError) as raised:
        resolve_part("tied", "config")
    assert raised.value.rule == INCOMPLETE[entry_points]
    assert raised.value.remedy == (
        "install a version of tied-attention for this contract, or register it as docs/own_attention does"
    )


def test_the_kinds_of_other_packages_are_listed_with_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "tied.config = tied_attention:TiedAttentionConfig")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        FieldError, match=r"not a known variant; use one of diff, gqa, mfa, mha, mla, .*, tied, tpa"
    ):
        resolve_part("flash", "config")


def test_the_config_and_costs_of_another_package_are_read_without_its_layer(tmp_path: Path) -> None:
    parts = ("config", "costs", "layer")
    install(tmp_path, "\n".join(f"tied.{part} = tied_{part}:Tied" for part in parts))
    (tmp_path / "tied_config.py").write_text(
        "from sas_megatron.config.attention import AttentionConfig\n\n\n"
        'class Tied(AttentionConfig):\n    kind: str = "tied"\n'
    )
    (tmp_path / "tied_costs.py").write_text(
        "from sas_megatron.costs.attention import AttentionCosts\n\n\nclass Tied(AttentionCosts):\n    pass\n"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from sas_megatron.config.attention import parse_attention\n"
        "from sas_megatron.costs.attention import build_attention_costs\n"
        "attention = parse_attention({'kind': 'tied', 'num_heads': 4, 'head_dim': 6})\n"
        "print(build_attention_costs(attention).count_kv_cache_elements())\n"
        "assert not {'torch', 'tied_layer'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "{'keys': 24, 'values': 24}\n"
