"""The table in docs/data.md of what is left out, repeated, kept or cut: every report really appears."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer_loading import load_tokenizer
from tests.conftest import ROOT
from tests.data.damaged_files import write_table
from tests.data.preparing import prepare_two_documents
from tests.data.test_wheel_corpus import source, write_wheels
from tests.data.token_pairs import write_pair
from tests.data.tokenizer_kinds import write_normalizing
from tests.docs.pages import read_table
from tests.fork_server import run_command
from tests.scaling.study.studies import write_study
from tests.small_data import SmallData

Done = subprocess.CompletedProcess[str]


def table_rows() -> list[tuple[str, str]]:
    """Return command and kind of each row of the table."""
    rows = read_table(ROOT / "docs" / "data.md", "| command | left out, repeated, kept or cut | reported |")
    return [(command.strip("`"), kind) for command, kind, _ in rows]


class Workspace:
    """A corpus with something of every kind, a run that repeats its data, and their commands."""

    def __init__(self, small_data: SmallData, folder: Path) -> None:
        self.folder, self.small_data = folder, small_data
        corpus = folder / "corpus"
        saved = corpus / "saved"
        saved.mkdir(parents=True)
        (corpus / "a.jsonl").write_text('{"text": "def twice(x):"}\n{"text": ""}\n{"text": null}\n')
        (corpus / "again.jsonl").symlink_to("a.jsonl")
        (corpus / "linked").symlink_to("saved")
        (corpus / "info.json").write_text('{"splits": []}')
        (corpus / "picture.png").write_bytes(b"")
        (corpus / ".hidden.txt").write_text("hidden")
        for split in ("train", "test"):
            (saved / split).mkdir()
            for name in ("data.arrow", "cache.arrow"):
                (saved / split / name).write_bytes(write_table({"text": [split]}))
            state = {"_data_files": [{"filename": "data.arrow"}]}
            (saved / split / "state.json").write_text(json.dumps(state))
        (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        self.corpus = corpus
        self.run = small_data.run(
            folder / "run",
            data={"prefixes": [str(prepare_two_documents(small_data, folder))] * 2, "split": [0.5, 0.5]},
            training={"num_steps": 15},
            evaluation={"num_sequences": 50, "interval": None},
        )

    def command(self, *arguments: object, status: int = 0) -> Done:
        environment = {"XDG_CACHE_HOME": str(self.folder / "cache"), "PATH": "/usr/bin:/bin"}
        done = run_command(*arguments, cwd=self.folder, environment=environment)
        assert done.returncode == status, done.stderr
        return done

    def prepare(self) -> Done:
        options = ("--tokenizer", self.small_data.tokenizer, "--output", "tokens", "--workers", 1)
        return self.command("data", "prepare", self.corpus, *options)

    @functools.cached_property
    def prepared(self) -> Done:
        return self.prepare()

    def write_config(self, run: RunConfig) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(dump_yaml(run))
        return path


@pytest.fixture(scope="module")
def workspace(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(small_data, tmp_path_factory.mktemp("workspace"))


def check_walk(workspace: Workspace) -> None:
    for kind in (
        "hidden files or folders (1)",
        "files of unknown endings (1)",
        "JSON files without documents (1)",
        "files that a saved dataset does not list (2)",
    ):
        assert kind in workspace.prepared.stderr


def check_names(workspace: Workspace) -> None:
    assert "files named twice (1)" in workspace.prepared.stderr
    assert "folders linked to twice (1)" in workspace.prepared.stderr


def check_formats(workspace: Workspace) -> None:
    errors = workspace.prepared.stderr
    assert "reads files of several formats: JSON lines (1), Arrow (2)" in errors
    assert "reads all splits of the saved dataset: train, test; name" in errors


def check_builtin(workspace: Workspace) -> None:
    options = ("--vocab-size", 400, "--sample-bytes", 90_000, "--output", "builtin.model")
    done = workspace.command("tokenizer", "train", "builtin", *options)
    assert "builtin: left out " in done.stderr
    assert "files that are not UTF-8 (" in done.stderr
    assert "empty files (" in done.stderr


def check_empty_documents(workspace: Workspace) -> None:
    assert "(2 empty documents left out)" in workspace.prepared.stdout
    assert json.loads((workspace.folder / "tokens.json").read_text())["empty_documents"] == 2


def check_kept_tokens(workspace: Workspace) -> None:
    assert "tokens: 3 documents" in workspace.prepared.stdout
    assert "tokens: already complete; 3 documents" in workspace.prepare().stdout


def check_changed_text(workspace: Workspace) -> None:
    model = workspace.folder / "normalizing"
    model.mkdir()
    options = ("--tokenizer", write_normalizing(model), "--output", "changed", "--workers", 1)
    done = workspace.command("data", "prepare", workspace.folder / "texts", *options)
    assert "decoded tokens are not exactly the text: combining characters are composed (NFC)" in done.stderr
    record = json.loads((workspace.folder / "changed.json").read_text())
    assert record["round_trip"].startswith("combining characters are composed (NFC)")


def check_adopted(workspace: Workspace) -> None:
    tokenizer = load_tokenizer(workspace.small_data.tokenizer)
    write_pair(workspace.folder / "adopted", [tokenizer.encode("one text"), [*tokenizer.encode("two"), 1]])
    done = workspace.command("data", "adopt", "adopted", "--tokenizer", workspace.small_data.tokenizer)
    assert "1 of 2 documents do not end with </s>" in done.stderr
    assert json.loads((workspace.folder / "adopted.json").read_text())["documents_without_end"] == 1


def check_wheels(workspace: Workspace) -> None:
    text = source(seed=1)
    files: dict[str, str | bytes] = {"one/a.py": text, "one/b.py": text, "one/c.py": "", "one/d.py": b"\xff"}
    listed = write_wheels(workspace.folder / "wheels", one=files)
    options = ("--wheels", listed.parent, "--output", "wheels.parquet")
    done = workspace.command("data", "wheels", listed, *options)
    counts = "left out empty files (1), files that are not UTF-8 (1), exact duplicates (1)"
    assert counts in done.stdout.splitlines()[-1]
    record = json.loads((workspace.folder / "wheels.json").read_text())
    assert record["left_out"] == {"empty files": 1, "files that are not UTF-8": 1, "exact duplicates": 1}


def check_sample(workspace: Workspace) -> None:
    (workspace.folder / "empty.txt").write_text("")
    options = ("--vocab-size", 290, "--sample-bytes", 1200, "--output", "sample.model")
    texts = workspace.folder / "texts"
    done = workspace.command("tokenizer", "train", texts, "empty.txt", *options)
    num_bytes = sum(path.stat().st_size for path in texts.iterdir())
    assert f" of {num_bytes:,} bytes, sha256 " in done.stdout
    assert "(1 empty documents left out)" in done.stdout


def check_training_epochs(workspace: Workspace) -> None:
    done = workspace.command("train", workspace.write_config(workspace.run))
    first, second = done.stdout.splitlines()[:2]
    assert "training data: " in first
    assert "; more than one epoch: its losses are not those of new text" in first
    assert "few more than once" in first
    assert "validation data: " in second
    assert "; the validation text fills " in second
    directory = workspace.folder / "run"
    data = json.loads((directory / "run.json").read_text())["data"]
    summary = json.loads((directory / "summary.json").read_text())
    for part, field in (("training", "epochs"), ("validation", "validation_epochs")):
        (use,) = data[part].values()
        assert use["epochs"] == summary[field] > 1


def check_indices(workspace: Workspace) -> None:
    for path in (workspace.folder / "index_cache").rglob("*shuffle_index.npy"):
        path.write_bytes(path.read_bytes()[:-1])
    path = workspace.write_config(workspace.run)
    overrides = ("logging.run_directory=repaired", "training.stop_after_steps=1")
    done = workspace.command("train", path, *overrides)
    assert "the sample indices are damaged, or have no checksums, and are built again" in done.stderr


def check_empty_part(workspace: Workspace) -> None:
    path = workspace.write_config(workspace.run)
    overrides = ("data.split=[0.97,0.03]", "logging.run_directory=other")
    assert (
        "leaves no validation documents of" in workspace.command("train", path, *overrides, status=2).stderr
    )


def check_evaluated_windows(workspace: Workspace) -> None:
    done = workspace.command("evaluate", workspace.folder / "run", "--output", "results")
    assert "evaluated, so that windows repeat it." in done.stdout
    (summary,) = (workspace.folder / "results").rglob("summary.json")
    assert "windows repeat it" in json.loads(summary.read_text())["validation"]["remarks"][0]


def check_evaluated_files(workspace: Workspace) -> None:
    files = workspace.corpus / "a.jsonl"
    done = workspace.command("evaluate", workspace.folder / "run", "--files", files, "--output", "results")
    assert "a.jsonl: 2 empty documents were left out." in done.stdout
    (summary,) = (workspace.folder / "results").rglob("summary.json")
    assert json.loads(summary.read_text())["files"]["remarks"] == [
        "a.jsonl: 2 empty documents were left out."
    ]


def check_prompts(workspace: Workspace) -> None:
    prompts = ("--prompts", workspace.corpus / "a.jsonl", "--max-new-tokens", 2)
    done = workspace.command("generate", workspace.folder / "run", *prompts)
    assert done.stderr.splitlines()[-1] == "2 empty prompts left out"


def check_plan(workspace: Workspace) -> None:
    study = write_study(
        workspace.folder,
        workspace.run.model_dump(mode="json"),
        variants={"mha": {}, "gqa": {"num_kv_heads": 2}},
        sizes={"one": {}},
    )
    shown = " ".join(workspace.command("study", "plan", study).stdout.split())
    assert " epochs " in shown
    assert "Warning: " in shown
    assert "runs read their training data more than once" in shown
    assert "so that windows repeat it" in shown
    assert len(json.loads(workspace.command("study", "plan", study, "--json").stdout)["warnings"]) > 1


CHECKS: dict[tuple[str, str], Callable[[Workspace], None]] = {
    (
        "data prepare",
        "files in a folder: hidden, of unknown endings, without documents, not listed by a saved dataset",
    ): check_walk,
    ("data prepare", "files and folders that several names lead to, read once"): check_names,
    ("data prepare", "several formats, or several splits of a saved dataset, read together"): check_formats,
    ("data prepare", "source files of `builtin` that are empty or not UTF-8"): check_builtin,
    (
        "data wheels",
        "empty files, files that are not UTF-8 or mostly data, copies and near-duplicates",
    ): check_wheels,
    ("data prepare", "empty documents"): check_empty_documents,
    ("data prepare", "what the tokenizer changes in a text"): check_changed_text,
    ("data prepare", "tokens of an interrupted or earlier run, kept"): check_kept_tokens,
    ("data adopt", "documents without a token at their end, kept"): check_adopted,
    ("tokenizer train", "text beyond `--sample-bytes`, and empty documents"): check_sample,
    ("train", "training text read more than once, prefixes named more than once"): check_training_epochs,
    ("train", "validation text repeated by windows"): check_training_epochs,
    ("train", "damaged sample indices, built again"): check_indices,
    ("train", "data with an empty or too short part"): check_empty_part,
    ("evaluate", "validation text repeated by windows"): check_evaluated_windows,
    ("evaluate --files", "empty documents"): check_evaluated_files,
    ("generate --prompts", "empty prompts"): check_prompts,
    ("study plan", "training or validation text read more than once"): check_plan,
}


def test_every_row_of_the_table_has_a_check() -> None:
    assert table_rows() == list(CHECKS)


def test_what_is_left_out_repeated_or_cut_is_reported(workspace: Workspace) -> None:
    for check in dict.fromkeys(CHECKS.values()):
        check(workspace)
