"""Token files hold the documents in order, whatever the number of workers and whenever the run is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.data import partial_tokens
from sas_megatron.data import prepare as preparation
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.prepare import Preparation, PreparationProgress, prepare_token_files
from sas_megatron.data.token_files import load_manifest, token_file, verify_token_files
from sas_megatron.data.tokenizer import Tokenizer
from tests.selection import exhaustive

ENDINGS = (".bin", ".idx", ".json")


def prepare(
    source: Path,
    tokenizer_path: Path,
    prefix: Path,
    *,
    num_workers: int = 1,
    overwrite: bool = False,
    report_progress: Callable[[PreparationProgress], None] | None = None,
) -> Preparation:
    return prepare_token_files(
        [source],
        tokenizer_path=tokenizer_path,
        prefix=prefix,
        num_workers=num_workers,
        overwrite=overwrite,
        report_progress=report_progress,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".idx")
    }


@pytest.fixture(scope="session")
def prepared(corpus: Path, tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus prepared by one worker in one go: what every other way is compared with."""
    prefix = tmp_path_factory.mktemp("prepared") / "v1.0" / "tokens"
    prepare(corpus, tokenizer_path, prefix)
    return prefix


def test_megatron_reads_each_document_ended_by_eos(
    prepared: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    dataset = IndexedDataset(str(prepared))
    documents = list(stream_documents([corpus]))
    assert len(dataset) == len(documents) == len(dataset.document_indices) - 1
    assert dataset.index.dtype == DType.optimal_dtype(tokenizer.vocab_size) == tokenizer.token_dtype
    for index, document in enumerate(documents):
        assert dataset[index].tolist() == [*tokenizer.encode(document), tokenizer.eos_id]


def test_the_files_are_what_megatron_would_write(
    prepared: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "tokens.bin"), dtype=np.uint16)
    for document in IndexedDataset(str(prepared)):
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(str(tmp_path / "tokens.idx"))
    assert files_of(tmp_path) == files_of(prepared.parent)


def test_the_record_says_what_the_files_hold(prepared: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    manifest = load_manifest(prepared)
    documents = list(stream_documents([corpus]))
    tokens = np.fromfile(f"{prepared}.bin", dtype=np.uint16)
    assert manifest.num_documents == len(documents)
    assert manifest.num_tokens == len(tokens)
    assert manifest.text_bytes == sum(len(document.encode()) for document in documents)
    assert manifest.text_bytes == tokenizer.token_byte_lengths()[tokens].sum()
    assert manifest.max_token_id == tokens.max()
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    assert manifest.sources[0].model_dump() == {
        "path": str(corpus), "num_files": 1, "size_bytes": corpus.stat().st_size
    }  # fmt: skip
    assert verify_token_files(prepared, tokenizer.vocab_size, full=True) == manifest
    assert sorted(path.name for path in prepared.parent.iterdir()) == [
        "tokens.bin",
        "tokens.idx",
        "tokens.json",
    ]


@pytest.mark.parametrize("num_workers", [pytest.param(2, marks=exhaustive), 3])
def test_the_number_of_workers_changes_no_byte(
    num_workers: int, prepared: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    states: list[PreparationProgress] = []
    prepare(
        corpus, tokenizer_path, tmp_path / "tokens", num_workers=num_workers, report_progress=states.append
    )
    assert files_of(tmp_path) == files_of(prepared.parent)
    assert load_manifest(tmp_path / "tokens").text_sha256 == load_manifest(prepared).text_sha256
    assert len(states) > 3
    assert [state.num_tokens for state in states] == sorted(state.num_tokens for state in states)
    assert states[-1].source_bytes_read == states[-1].source_bytes == corpus.stat().st_size


def test_other_formats_of_the_same_documents_give_the_same_bytes(
    prepared: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "a.jsonl"
    texts = [text for document in stream_documents([corpus]) for text in (document, "", None)]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(lines, tokenizer_path, tmp_path / "out" / "tokens")
    assert files_of(tmp_path / "out") == files_of(prepared.parent)
    manifest = load_manifest(tmp_path / "out" / "tokens")
    assert manifest.empty_documents == 2 * manifest.num_documents


def test_documents_of_odd_sizes_come_back(tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["a", "\u2581", "long " * 250_000, "é\u2581\n" * 7, "<unk>", "x" * (1 << 19), "b"]
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), source)
    prepare(source, tokenizer_path, tmp_path / "tokens", num_workers=2)
    tokens = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16)
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)[:-1]
    assert [tokenizer.decode(document.tolist()) for document in documents] == texts


def test_a_second_call_starts_no_worker(
    prepared: Path, corpus: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "EncodingPool", None)
    before = {ending: token_file(prepared, ending).stat() for ending in ENDINGS}
    started = time.process_time()
    assert prepare(corpus, tokenizer_path, prepared).was_complete
    assert time.process_time() - started < 0.5
    assert {ending: token_file(prepared, ending).stat() for ending in ENDINGS} == before


def test_a_copy_of_the_same_documents_counts_as_unchanged(
    prepared: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(corpus.read_bytes())
    assert prepare(copy, tokenizer_path, prepared).was_complete


def test_files_of_other_documents_are_replaced_only_on_request(
    tokenizer_path: Path, corpus: Path, tmp_path: Path
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("first")
    prefix = tmp_path / "tokens"
    prepare(source, tokenizer_path, prefix)
    before = files_of(tmp_path)
    source.write_text("second")
    with pytest.raises(
        FileProblem, match=r"tokens\.json: the token files are there, of other documents; name another"
    ):
        prepare(source, tokenizer_path, prefix)
    other = tokenizer_path.with_name("other.model")
    from sas_megatron.data.tokenizer_training import train_tokenizer

    train_tokenizer(stream_documents([corpus]), vocab_size=500, model_path=other, sample_bytes=50_000)
    with pytest.raises(FileProblem, match="the token files are there, of another tokenizer"):
        prepare(source, other, prefix)
    assert files_of(tmp_path) == before
    prepare(source, tokenizer_path, prefix, overwrite=True)
    assert files_of(tmp_path) != before
    verify_token_files(prefix, full=True)


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


def test_a_killed_run_goes_on_and_its_workers_end(
    prepared: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "tokens"
    process = start_command(corpus, tokenizer_path, prefix)
    while journal_lines(prefix) < 2:
        assert process.poll() is None, "ended before it could be killed: the corpus is too small"
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
    """Leaves a partial folder with these chunks finished; returns it."""
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
    "damage", ["torn journal", "torn tokens", "flipped token", "missing lengths", "none"]
)
def test_damage_to_unfinished_files_is_found_and_mended(
    damage: str, prepared: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    folder = interrupt_after(corpus, tokenizer_path, tmp_path / "tokens", 3)
    tokens, lengths, journal = (folder / name for name in ("tokens.bin", "lengths.bin", "journal.jsonl"))
    if damage == "torn journal":
        os.truncate(journal, journal.stat().st_size - 9)
    elif damage == "torn tokens":
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


def test_documents_that_changed_after_a_stop_are_encoded_again(tokenizer_path: Path, tmp_path: Path) -> None:
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


def test_documents_taken_away_after_a_stop_are_dropped(tokenizer_path: Path, tmp_path: Path) -> None:
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
def test_a_run_killed_while_renaming_is_finished_by_the_next(
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


def test_two_runs_at_once_do_not_mix(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "tokens"

    def start_another(state: PreparationProgress) -> None:
        with pytest.raises(FileProblem, match="another process is preparing these files; wait for it"):
            prepare(corpus, tokenizer_path, prefix)

    source = tmp_path / "a.txt"
    source.write_text("text")
    prepare(source, tokenizer_path, prefix, report_progress=start_another)
    assert load_manifest(prefix).num_documents == 1


def test_errors_leave_nothing_behind(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "out" / "tokens"
    prefix.parent.mkdir()
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 nothing")
    for source, message in [
        (empty, "hold no documents, or only empty ones"),
        (damaged, "cannot be read as Parquet"),
        (tmp_path / "absent.txt", "there is no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(source, tokenizer_path, prefix)
        assert list(prefix.parent.iterdir()) == []
    with pytest.raises(FieldError, match="workers=0: must be at least one process"):
        prepare(corpus, tokenizer_path, prefix, num_workers=0)
    with pytest.raises(FileProblem, match="is damaged, or no sentencepiece model"):
        prepare(corpus, corpus, prefix)
    with pytest.raises(FieldError, match="must end in a name"):
        prepare_token_files([corpus], tokenizer_path=tokenizer_path, prefix=f"{prefix}/")
    with pytest.raises(FileProblem, match=r"cannot be written \(Not a directory\); name another --output"):
        prepare(corpus, tokenizer_path, empty / "tokens")
    assert list(prefix.parent.iterdir()) == []


def test_a_killed_worker_is_an_error_that_can_be_gone_on_from(
    corpus: Path, tokenizer_path: Path, prepared: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "tokens"

    def kill_a_worker(state: PreparationProgress) -> None:
        for worker in children_of(os.getpid()):
            if b"encoding_worker" in Path(f"/proc/{worker}/cmdline").read_bytes():
                os.kill(worker, signal.SIGKILL)

    with pytest.raises(
        UserError, match=r"workers=1: process \d+ ended by itself \(status -9\), perhaps for want of"
    ):
        prepare(corpus, tokenizer_path, prefix, report_progress=kill_a_worker)
    assert files_of(tmp_path) == {}
    assert prepare(corpus, tokenizer_path, prefix).resumed_chunks >= 1
    assert files_of(tmp_path) == files_of(prepared.parent)


def test_workers_import_neither_torch_nor_megatron_nor_pyarrow() -> None:
    script = (
        "import sys, sas_megatron.data.encoding_worker\n"
        "print([name for name in ('torch', 'megatron', 'pyarrow', 'pydantic') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"[]\n"
