"""Tests that a killed run resumes where it stopped, and that damage to its files is found."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.data import partial_tokens
from sas_megatron.data.prepare import PreparationProgress
from sas_megatron.data.token_files import load_manifest, token_file
from tests.data.preparing import files_of, prepare


def start_command(corpus: Path, tokenizer_path: Path, prefix: Path) -> subprocess.Popen[bytes]:
    arguments = [
        "data",
        "prepare",
        corpus,
        "--tokenizer",
        tokenizer_path,
        "--output",
        prefix,
        "--workers",
        "2",
    ]
    return subprocess.Popen([sys.executable, "-m", "sas_megatron", *arguments], stdout=subprocess.DEVNULL)


def journal_lines(prefix: Path) -> int:
    journal = token_file(prefix, ".partial") / "journal.jsonl"
    return journal.read_text().count("\n") if journal.exists() else 0


def children_of(process_id: int) -> list[int]:
    return [
        int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    ]


def test_killed_run_resumes_and_its_workers_end(
    prepared: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "tokens"
    process = start_command(corpus, tokenizer_path, prefix)
    while journal_lines(prefix) < 2:
        assert process.poll() is None, "the command ended before it could be killed: the corpus is too small"
        time.sleep(0.002)
    workers = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert files_of(tmp_path) == {}
    finished = journal_lines(prefix)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    preparation = prepare(corpus, tokenizer_path, prefix)
    assert 2 <= preparation.resumed_chunks <= finished
    assert preparation.encoded_tokens < preparation.manifest.num_tokens
    assert files_of(tmp_path) == files_of(prepared.parent)
    assert preparation.manifest.bin_sha256 == load_manifest(prepared).bin_sha256
    assert preparation.manifest.text_sha256 == load_manifest(prepared).text_sha256
    assert not token_file(prefix, ".partial").exists()


class InterruptedRunError(Exception):
    pass


def interrupt_after(source: Path, tokenizer_path: Path, prefix: Path, num_chunks: int) -> Path:
    """Stop a preparation after `num_chunks` finished chunks; return its partial folder."""
    calls = 0

    def stop(state: PreparationProgress) -> None:
        nonlocal calls
        calls += 1
        if calls == num_chunks:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        prepare(source, tokenizer_path, prefix, report_progress=stop)
    return token_file(prefix, ".partial")


@pytest.mark.parametrize(
    "damage", ["truncated journal", "truncated tokens", "flipped token", "missing lengths", "none"]
)
def test_damaged_chunks_of_unfinished_files_are_encoded_again(
    damage: str, prepared: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    folder = interrupt_after(corpus, tokenizer_path, tmp_path / "tokens", 3)
    tokens, lengths, journal = (folder / name for name in ("tokens.bin", "lengths.bin", "journal.jsonl"))
    if damage == "truncated journal":
        os.truncate(journal, journal.stat().st_size - 9)
    elif damage == "truncated tokens":
        os.truncate(tokens, tokens.stat().st_size - 5)
    elif damage == "flipped token":
        content = bytearray(tokens.read_bytes())
        content[-7] ^= 1
        tokens.write_bytes(content)
    elif damage == "missing lengths":
        lengths.unlink()
    preparation = prepare(corpus, tokenizer_path, tmp_path / "tokens")
    assert preparation.resumed_chunks == {"none": 3, "missing lengths": 0}.get(damage, 2)
    assert files_of(tmp_path) == files_of(prepared.parent)


def test_documents_changed_after_an_interruption_are_encoded_again(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"text {number} " * 80_000)
    interrupt_after(folder, tokenizer_path, tmp_path / "out" / "tokens", 3)
    (folder / "1.txt").write_text("other words " * 80_000)
    (folder / "4.txt").unlink()
    (folder / "3.txt").unlink()
    assert prepare(folder, tokenizer_path, tmp_path / "out" / "tokens").resumed_chunks == 1
    prepare(folder, tokenizer_path, tmp_path / "fresh" / "tokens")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_documents_removed_after_an_interruption_are_dropped(tokenizer_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"text {number} " * 80_000)
    interrupt_after(folder, tokenizer_path, tmp_path / "out" / "tokens", 3)
    for number in (1, 2, 3):
        (folder / f"{number}.txt").unlink()
    assert prepare(folder, tokenizer_path, tmp_path / "out" / "tokens").resumed_chunks == 1
    prepare(folder, tokenizer_path, tmp_path / "fresh" / "tokens")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_run_killed_while_renaming_is_completed_by_the_next_run(
    renames: int,
    corpus: Path,
    tokenizer_path: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = 0

    def replace(source: Path, target: Path) -> None:
        nonlocal done
        if done == renames:
            raise InterruptedRunError
        done += 1
        os.rename(source, target)

    prefix = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        patch.setattr(partial_tokens, "rename_file", replace)
        with pytest.raises(InterruptedRunError):
            prepare(corpus, tokenizer_path, prefix)
    assert not token_file(prefix, ".json").exists()
    assert prepare(corpus, tokenizer_path, prefix).was_complete
    assert files_of(tmp_path) == files_of(prepared.parent)
    assert not token_file(prefix, ".partial").exists()


def test_run_with_a_killed_worker_is_an_error_and_can_be_resumed(
    corpus: Path, tokenizer_path: Path, prepared: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "tokens"

    def kill_a_worker(state: PreparationProgress) -> None:
        for worker in children_of(os.getpid()):
            if b"encoding_worker" in Path(f"/proc/{worker}/cmdline").read_bytes():
                os.kill(worker, signal.SIGKILL)

    with pytest.raises(
        UserError, match=r"workers=1: process \d+ ended unexpectedly \(status -9\), possibly out of memory"
    ):
        prepare(corpus, tokenizer_path, prefix, report_progress=kill_a_worker)
    assert files_of(tmp_path) == {}
    assert prepare(corpus, tokenizer_path, prefix).resumed_chunks >= 1
    assert files_of(tmp_path) == files_of(prepared.parent)
