"""An attention variant of another package: installed with pip, selected in a config, and trained."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sas_megatron.config.loading import dump_tree
from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.conftest import ROOT
from tests.fork_server import run_command
from tests.small_data import SmallData

PACKAGE = ROOT / "docs" / "own_attention"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example package, and return the folder with the package and its metadata."""
    folder = tmp_path_factory.mktemp("own_attention")
    source = folder / "source"
    source.mkdir()
    for path in PACKAGE.glob("*.py"):
        (source / path.name).write_bytes(path.read_bytes())
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    site = folder / "site"
    done = subprocess.run(
        [*install, "--target", str(site), str(source)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return site


def command(installed: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder of the installed package, which Python searches first."""
    return run_command(*arguments, cwd=installed)


def tied_config(base: RunConfig, path: Path, **attention: object) -> Path:
    tree = base.model_dump(mode="json", exclude_unset=True)
    tree["attention"] = {"kind": "tied", "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, **attention}
    path.write_text(dump_tree(tree))
    return path


def test_a_variant_of_another_package_is_trained_and_its_costs_are_counted(
    installed: Path, small_data: SmallData, tmp_path: Path
) -> None:
    run = small_data.run(tmp_path / "run", training={"num_steps": 12})
    config = tied_config(run, tmp_path / "tied.yaml")
    done = command(installed, "train", config)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["train_loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # Two layers; hidden size 48; four query and two key heads of 12 features.
    assert summary["parameters"]["qkv"] == 2 * 48 * 12 * 6

    prompt = ["--prompt", "import os", "--max-new-tokens", "3", "--json"]
    generated = command(installed, "generate", tmp_path / "run", *prompt)
    assert generated.returncode == 0, generated.stderr
    # Two layers; two key heads of 12 features in float32; no values.
    assert json.loads(generated.stdout)["kv_cache"]["bytes_per_token_and_rank"] == 2 * 2 * 12 * 4

    counted = command(installed, "costs", config, "--json")
    assert counted.returncode == 0, counted.stderr
    assert json.loads(counted.stdout)[str(config)]["parameters"]["terms"] == summary["parameters"]

    matched = command(installed, "match", config, "--variants", "tied,gqa", "--equal", "kv")
    assert matched.returncode == 0, matched.stderr


def test_the_example_of_a_variant_overrides_no_more_than_before_the_modifiers() -> None:
    overridden = {
        definition.name: {item.name for item in definition.body if isinstance(item, ast.FunctionDef)}
        for path in PACKAGE.glob("tied_*.py")
        for definition in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(definition, ast.ClassDef)
    }
    assert overridden == {
        "TiedAttentionConfig": {"projected_width"},
        "TiedAttentionCosts": {"weights", "count_projection_flops", "count_kv_cache_elements"},
        "TiedSelfAttention": {"__init__", "build_spec", "project", "expand"},
    }


def test_a_variant_of_another_package_has_every_modifier(
    installed: Path, small_data: SmallData, tmp_path: Path
) -> None:
    run = small_data.run(tmp_path / "run", training={"num_steps": 4})
    config = tied_config(run, tmp_path / "tied.yaml", **small.MODIFIERS)
    done = command(installed, "train", config)
    assert done.returncode == 0, done.stderr
    terms = json.loads((tmp_path / "run" / "summary.json").read_text())["parameters"]
    assert {name: terms[name] for name in ("qk_norm", "knocking_heads", "output_norm", "output_gate")} == {
        "qk_norm": 2 * 2 * 12,
        "knocking_heads": 2 * 3 * 12 * 12,
        "output_norm": 2 * 12,
        "output_gate": 2 * 48 * 4 * 12,
    }
    generated = command(
        installed, "generate", tmp_path / "run", "--prompt", "import", "--max-new-tokens", "3"
    )
    assert generated.returncode == 0, generated.stderr


def test_unknown_fields_of_the_variant_are_refused(
    installed: Path, small_data: SmallData, tmp_path: Path
) -> None:
    config = tied_config(small_data.run(tmp_path / "run"), tmp_path / "tied.yaml", gian=2.0)
    done = command(installed, "train", config)
    assert done.returncode == 2
    assert "attention.gian" in done.stderr
    assert "gain" in done.stderr
    assert not (tmp_path / "run").exists()


def test_without_the_package_the_error_names_the_known_kinds(small_data: SmallData, tmp_path: Path) -> None:
    config = tied_config(small_data.run(tmp_path / "run"), tmp_path / "tied.yaml")
    done = command(tmp_path, "train", config)
    assert done.returncode == 2
    assert "attention.kind=tied: is not a known variant; use one of diff, gqa, mfa, mha" in done.stderr
