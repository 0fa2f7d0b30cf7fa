"""Tests of `tokenizer train`, `data prepare` and `data inspect`: output, exit status, imports of the help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import UserError
from tests.fork_server import run_command

TEXT = "def twice(number):\n    return 2 * number\n\n" * 40


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "texts").mkdir()
    for number in range(3):
        (folder / "texts" / f"{number}.py").write_text(f"# file {number}\n{TEXT}")
    model, prefix = folder / "made" / "t.model", folder / "made" / "tokens"
    trained = invoke("tokenizer", "train", folder / "texts", "--vocab-size", 300, "--output", model)
    assert trained.exit_code == 0, trained.output
    assert f"{model}: 300 tokens (bpe), trained on" in trained.output
    prepared = invoke(
        "data", "prepare", folder / "texts", "--tokenizer", model, "--output", prefix, "--workers", 1
    )
    assert prepared.exit_code == 0, prepared.output
    assert f"{prefix}: 3 documents," in prepared.output
    assert "tokens/s)" in prepared.output
    return folder


def test_inspect_shows_a_summary_and_the_document(folder: Path) -> None:
    shown = invoke("data", "inspect", folder / "made" / "tokens", "--document", 2, "--verify")
    assert shown.exit_code == 0, shown.output
    assert "# file 2\ndef twice(number):" in shown.output
    assert "verified: every byte and token is unchanged" in shown.output
    assert "uint16, with end-of-document tokens" in shown.output


def test_inspect_prints_valid_json(folder: Path) -> None:
    facts = json.loads(invoke("data", "inspect", folder / "made" / "tokens", "--json").stdout)
    assert (facts["num_documents"], facts["vocab_size"]) == (3, 300)
    assert facts["document"]["text"] == f"# file 0\n{TEXT}"


def test_prepare_reports_complete_files(folder: Path) -> None:
    made = folder / "made"
    arguments = [
        "data",
        "prepare",
        folder / "texts",
        "--tokenizer",
        made / "t.model",
        "--output",
        made / "tokens",
    ]
    assert "already complete" in invoke(*arguments).output
    assert json.loads(invoke(*arguments, "--json").stdout)["num_documents"] == 3


def test_inspect_refuses_another_tokenizer(folder: Path) -> None:
    other = folder / "other.model"
    invoke("tokenizer", "train", folder / "texts", "--vocab-size", 290, "--output", other)
    shown = invoke("data", "inspect", folder / "made" / "tokens", "--tokenizer", other)
    assert isinstance(shown.exception, UserError)
    assert "other.model: is not the tokenizer that encoded the tokens" in str(shown.exception)


def test_builtin_corpus_is_a_source(
    folder: Path, monkeypatch: pytest.MonkeyPatch, small_corpus: Path
) -> None:
    monkeypatch.setattr("sas_megatron.data.corpus.builtin_corpus", lambda: small_corpus)
    model = folder / "builtin.model"
    trained = invoke("tokenizer", "train", "builtin", "--vocab-size", 500, "--output", model, "--json")
    assert json.loads(trained.stdout)["corpus_bytes"] > 10_000


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sas_megatron.data.corpus import builtin_corpus

    return builtin_corpus(tmp_path_factory.mktemp("builtin"), max_bytes=100_000)


def test_a_byte_level_tokenizer_is_trained_and_used(folder: Path, tmp_path: Path) -> None:
    path, prefix = tmp_path / "bpe" / "tokenizer.json", tmp_path / "tokens"
    arguments = ("tokenizer", "train", folder / "texts", "--kind", "bpe", "--output", path)
    trained = invoke(*arguments, "--vocab-size", 280, "--special-token", "<|user|>")
    assert f"{path}: 280 tokens (byte-level bpe), trained on" in trained.output
    record = json.loads((tmp_path / "bpe" / "tokenizer.training.json").read_text())
    assert (record["kind"], record["special_tokens"]) == ("bpe", ["<|user|>"])
    prepared = invoke("data", "prepare", folder / "texts", "--tokenizer", path, "--output", prefix)
    assert prepared.exit_code == 0, prepared.output
    facts = json.loads(invoke("data", "inspect", prefix, "--json").stdout)
    assert (facts["end_of_document"], facts["eos_id"]) == ("<|endoftext|>", 0)
    assert facts["document"]["text"] == f"# file 0\n{TEXT}"
    for more, message in (
        (
            ("--vocab-size", 257, "--special-token", "a"),
            "is too small for the 256 bytes and 2 special tokens; use",
        ),
        (("--vocab-size", 9999), "vocab_size=9999: is too large for the text; use at most "),
        (("--special-token", "<|endoftext|>"), "must be different names; name each special token once"),
        (
            ("--model-type", "bpe"),
            "--model-type=bpe: is an option of sentencepiece; leave it out with --kind bpe",
        ),
    ):
        refused = invoke(*arguments, *more)
        assert message in str(refused.exception)


def test_user_error_exits_with_status_2_and_no_traceback(folder: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent.jsonl"
    model = folder / "made" / "t.model"
    (tmp_path / "file").write_text("")
    for arguments, message in [
        (("data", "inspect", tmp_path / "none"), f"{tmp_path}/none.json: does not exist, so the token files"),
        (
            ("data", "prepare", absent, "--tokenizer", model, "--output", tmp_path / "t"),
            f"{absent}: does not exist; check the path",
        ),
        (
            (
                "tokenizer",
                "train",
                folder / "texts",
                "--vocab-size",
                300,
                "--output",
                tmp_path / "file" / "t.model",
            ),
            "cannot be written (Not a directory); name another --output",
        ),
    ]:
        ended = run_command(*arguments)
        assert ended.returncode == 2
        assert ended.stderr.startswith("sas-megatron: error: ")
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("tokenizer",),
        ("tokenizer", "train"),
        ("data",),
        ("data", "prepare"),
        ("data", "adopt"),
        ("data", "inspect"),
    ],
)
def test_help_imports_no_heavy_package(arguments: tuple[str, ...]) -> None:
    script = (
        "import sys\nfrom sas_megatron.cli.main import cli\n"
        f"cli.main([*{arguments!r}, '--help'], standalone_mode=False)\n"
        "heavy = ('torch', 'pyarrow', 'numpy', 'sentencepiece', 'tokenizers', 'tiktoken', 'rich')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("Usage:")
    assert shown.endswith("[]\n")
