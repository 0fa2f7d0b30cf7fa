"""Tests that token files hold the documents in order for any number of workers, and of the errors."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.data import prepare as preparation
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.prepare import PreparationProgress, prepare_token_files
from sas_megatron.data.token_files import load_manifest, token_file, verify_token_files
from sas_megatron.data.tokenizer import Tokenizer
from tests.data.preparing import files_of, prepare
from tests.selection import exhaustive

ENDINGS = (".bin", ".idx", ".json")


def test_megatron_core_reads_each_document_with_its_end_token(
    prepared: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

    dataset = IndexedDataset(str(prepared))
    documents = list(stream_documents([corpus]))
    assert len(dataset) == len(documents) == len(dataset.document_indices) - 1
    assert dataset.index.dtype == DType.optimal_dtype(tokenizer.vocab_size) == tokenizer.token_dtype
    for index, document in enumerate(documents):
        assert dataset[index].tolist() == [*tokenizer.encode(document), tokenizer.eos_id]


def test_files_are_equal_to_those_of_megatron_core(
    prepared: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "tokens.bin"), dtype=np.uint16)
    for document in IndexedDataset(str(prepared)):
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(str(tmp_path / "tokens.idx"))
    assert files_of(tmp_path) == files_of(prepared.parent)


def test_manifest_describes_the_files(prepared: Path, corpus: Path, tokenizer: Tokenizer) -> None:
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
def test_files_do_not_depend_on_the_number_of_workers(
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


def test_files_do_not_depend_on_the_format_of_the_documents(
    prepared: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "a.jsonl"
    texts = [text for document in stream_documents([corpus]) for text in (document, "", None)]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(lines, tokenizer_path, tmp_path / "out" / "tokens")
    assert files_of(tmp_path / "out") == files_of(prepared.parent)
    manifest = load_manifest(tmp_path / "out" / "tokens")
    assert manifest.empty_documents == 2 * manifest.num_documents


def test_documents_of_very_different_sizes_are_encoded(
    tokenizer_path: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = ["a", "\u2581", "long " * 250_000, "é\u2581\n" * 7, "<unk>", "x" * (1 << 19), "b"]
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), source)
    prepare(source, tokenizer_path, tmp_path / "tokens", num_workers=2)
    tokens = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16)
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_id) + 1)[:-1]
    assert [tokenizer.decode(document.tolist()) for document in documents] == texts


def test_second_call_starts_no_worker(
    prepared: Path, corpus: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "EncodingPool", None)
    before = {ending: token_file(prepared, ending).stat() for ending in ENDINGS}
    started = time.process_time()
    assert prepare(corpus, tokenizer_path, prepared).was_complete
    assert time.process_time() - started < 0.5
    assert {ending: token_file(prepared, ending).stat() for ending in ENDINGS} == before


def test_copy_of_the_same_documents_counts_as_unchanged(
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
        FileProblem, match=r"tokens\.json: token files of other documents exist; name another"
    ):
        prepare(source, tokenizer_path, prefix)
    other = tokenizer_path.with_name("other.model")
    from sas_megatron.data.tokenizer_training import train_tokenizer

    train_tokenizer(stream_documents([corpus]), vocab_size=500, model_path=other, sample_bytes=50_000)
    with pytest.raises(FileProblem, match="token files of another tokenizer exist"):
        prepare(source, other, prefix)
    assert files_of(tmp_path) == before
    prepare(source, tokenizer_path, prefix, overwrite=True)
    assert files_of(tmp_path) != before
    verify_token_files(prefix, full=True)


def test_concurrent_run_for_the_same_files_is_refused(
    corpus: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "tokens"

    def start_another(state: PreparationProgress) -> None:
        with pytest.raises(FileProblem, match="another process is preparing these files; wait for it"):
            prepare(corpus, tokenizer_path, prefix)

    source = tmp_path / "a.txt"
    source.write_text("text")
    prepare(source, tokenizer_path, prefix, report_progress=start_another)
    assert load_manifest(prefix).num_documents == 1


def test_errors_leave_no_files(corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "out" / "tokens"
    prefix.parent.mkdir()
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 nothing")
    for source, message in [
        (empty, "have no documents, or only empty ones"),
        (damaged, "cannot be read as Parquet"),
        (tmp_path / "absent.txt", "does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(source, tokenizer_path, prefix)
        assert list(prefix.parent.iterdir()) == []
    for number in (0, 1025):
        with pytest.raises(FieldError, match=f"workers={number}: must be between 1 and 1,024 processes"):
            prepare(corpus, tokenizer_path, prefix, num_workers=number)
    with pytest.raises(FileProblem, match="is damaged, or is not a tokenizer that this program reads"):
        prepare(corpus, corpus, prefix)
    with pytest.raises(FieldError, match="must end in a file name"):
        prepare_token_files([corpus], tokenizer_path=tokenizer_path, prefix=f"{prefix}/")
    with pytest.raises(FileProblem, match=r"cannot be written \(Not a directory\); name another --output"):
        prepare(corpus, tokenizer_path, empty / "tokens")
    assert list(prefix.parent.iterdir()) == []


def test_workers_import_neither_torch_nor_megatron_core_nor_pyarrow() -> None:
    script = (
        "import sys, sas_megatron.data.encoding_worker\n"
        "print([name for name in ('torch', 'megatron', 'pyarrow', 'pydantic') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"[]\n"
