"""Checkpoints, run directories and exports that an earlier version wrote still load (fixtures/README.md)."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.manifest import verify_checkpoint
from tests.checkpoint.saved_runs import read_unsharded_tensors
from tests.cli.test_evaluation import complete_on_ranks
from tests.fork_server import run_command

FIXTURES = Path(__file__).parent / "fixtures"
WORLD_SIZES = {"one_process": 1, "two_processes": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with all fixtures, unpacked."""
    for archive in FIXTURES.glob("*.tar.xz"):
        with tarfile.open(archive) as opened:
            opened.extractall(tmp_path, filter="data")
    return tmp_path


def losses(run_directory: Path) -> dict[tuple[str, int], float]:
    """Return the training and validation losses in metrics.jsonl by kind of record and step."""
    records = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return {(record["kind"], record["step"]): record[f"{record['kind']}_loss"] for record in records}


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_checkpoints_verify(folder: Path, name: str) -> None:
    path = folder / name / "checkpoints" / "iter_0000002"
    assert verify_checkpoint(path).step == 2
    done = run_command("checkpoint", "verify", name, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "intact, step 2" in done.stdout


@pytest.mark.parametrize("name", WORLD_SIZES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_runs_resume_on_both_layouts_with_the_same_losses(folder: Path, name: str, world_size: int) -> None:
    expected = losses(folder / name)
    arguments = ["train", name + "/config.yaml", "checkpoint.resume=true", f"parallel.tensor={world_size}"]
    complete_on_ranks(world_size, arguments, environment=dict(os.environ), cwd=folder)
    resumed = losses(folder / name)
    assert resumed == pytest.approx(expected, rel=1e-6)
    earlier = {key: loss for key, loss in expected.items() if key[1] <= 2}
    assert {key: loss for key, loss in resumed.items() if key[1] <= 2} == earlier
    sessions = json.loads((folder / name / "run.json").read_text())["sessions"]
    # The weights are those of the checkpoint, although the version that resumes would draw others.
    assert [(session["from_step"], session.get("schema")) for session in sessions] == [(0, None), (2, 2)]


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_evaluation_gives_the_recorded_loss(folder: Path, name: str) -> None:
    summary = folder / name / "evaluation" / "iter_0000002" / "summary.json"
    done = run_command("evaluate", name, "parallel.tensor=1", cwd=folder)
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads(summary.read_text())["validation"]["by_length"]
    assert measured["all"]["loss"] == pytest.approx(losses(folder / name)["validation", 2], rel=1e-6)


def test_results_are_added_to_a_recorded_evaluation(folder: Path) -> None:
    summary = folder / "one_process" / "evaluation" / "iter_0000002" / "summary.json"
    recorded = json.loads(summary.read_text())
    (folder / "text.txt").write_text("the run of a model is a run.\n")
    done = run_command("evaluate", "one_process", "--files", "text.txt", cwd=folder)
    assert done.returncode == 0, done.stderr
    written = json.loads(summary.read_text())
    assert written["validation"] == recorded["validation"]
    assert written["files"]["by_length"][0]["all"]["num_tokens"] > 0


def test_export_of_the_checkpoint_has_the_recorded_weights(folder: Path) -> None:
    done = run_command("checkpoint", "export", "one_process", "--output", "again", cwd=folder)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "tokenizer.model"):
        assert (folder / "again" / name).read_bytes() == (folder / "exported" / name).read_bytes()


@pytest.mark.parametrize("exported_again", [False, True])
def test_transformers_computes_the_recorded_log_probabilities(folder: Path, exported_again: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folder / "exported"
    if exported_again:
        source = folder / "again"
        done = run_command("checkpoint", "export", "one_process", "--output", source, cwd=folder)
        assert done.returncode == 0, done.stderr
    expected: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    tokens = tokenizer(expected["text"], return_tensors="pt").input_ids
    assert tokens[0].tolist() == expected["tokens"]
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1]
    found = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist()
    assert found == pytest.approx(expected["log_probabilities_of_next_tokens"], abs=1e-5)


def test_import_of_the_export_gives_the_weights_of_the_checkpoint(folder: Path) -> None:
    from safetensors.torch import load_file

    done = run_command("checkpoint", "import", "exported", "--output", "imported", cwd=folder)
    assert done.returncode == 0, done.stderr
    imported = load_file(folder / "imported" / "weights.safetensors")
    saved = read_unsharded_tensors(folder / "one_process" / "checkpoints" / "iter_0000002")
    assert imported
    for name, tensor in imported.items():
        assert torch.equal(tensor, saved[name]), name
