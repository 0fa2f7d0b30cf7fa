"""Tests of token ids in chunks and processes, of bytes, and of the place of texts that cannot be encoded."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiktoken import registry

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.data.chunks import cut_chunks
from sas_megatron.data.documents import stream_text_batches
from sas_megatron.data.encoding_worker import encode_chunk
from sas_megatron.data.prepare import prepare_token_files
from sas_megatron.data.sources import find_source_files
from sas_megatron.data.token_files import load_manifest, token_file
from sas_megatron.data.tokenizer_loading import load_tokenizer
from tests.data.tokenizer_kinds import (
    KINDS,
    TIKTOKEN_URL,
    encode_with_library,
    fuzzed_documents,
    train_byte_level,
    write_tiktoken_plugin,
    write_tiktoken_ranks,
)
from tests.selection import cases, exhaustive


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from the name of a kind to the path of its tokenizer."""
    return functools.cache(lambda kind: KINDS[kind](tmp_path_factory.mktemp("kind")))


def write_parquet(path: Path, documents: Any) -> Path:
    pq.write_table(pa.table({"text": list(documents)}), path, row_group_size=7)
    return path


@pytest.mark.parametrize("line_characters", [20_000, pytest.param(1_000_000, marks=exhaustive)])
@pytest.mark.parametrize("kind", cases(KINDS, default=["byte-level bpe", "tiktoken"]))
def test_ids_do_not_depend_on_chunks_and_processes(
    kind: str, line_characters: int, build: Any, tmp_path: Path
) -> None:
    documents = fuzzed_documents(line_characters, count=120, line_characters=line_characters)
    source, tokenizer = write_parquet(tmp_path / "fuzzed.parquet", documents), load_tokenizer(build(kind))
    files = find_source_files([source])
    found = []
    for chunk_bytes in (1, 997, 1 << 19):
        chunks = cut_chunks(stream_text_batches(files), chunk_bytes)
        found.append(b"".join(encode_chunk(tokenizer, chunk).tokens for chunk in chunks))
    for num_workers in (1, 3) if line_characters > 20_000 else (2,):
        prefix = tmp_path / f"workers_{num_workers}"
        prepare_token_files([source], tokenizer_path=build(kind), prefix=prefix, num_workers=num_workers)
        found.append(token_file(prefix, ".bin").read_bytes())
    assert len(set(found)) == 1
    tokens = np.frombuffer(found[0], dtype=tokenizer.token_dtype)
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert len(ends) == len(documents)
    stored = [each[:-1].tolist() for each in np.split(tokens, ends + 1)[:-1]]
    for document, ids in zip(documents, stored, strict=True):
        # The libraries read names of special tokens as these tokens, and sentencepiece U+2581 as a space.
        if not any(name in document for name in [*tokenizer.special_tokens, "\u2581"]):
            assert ids == encode_with_library(kind, build(kind), document)
        expected = document if tokenizer.is_exact else document.replace("\u2581", " ")
        assert tokenizer.decode(ids) == expected


def test_an_unpaired_surrogate_is_named_with_its_place(build: Any, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "good"}\n{"text": "caf\\u00e9 \\ud83d!"}\n')
    encoded = tmp_path / "encoded.parquet"
    # The surrogates of U+1F600, each encoded as three bytes, as programs in Java and C# may write.
    values = pa.array([b"good", b"ab\xed\xa0\xbd\xed\xb8\x80"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), encoded)
    for source, place in (
        (lines, r"lines.jsonl, line 2: has an unpaired surrogate \('\\ud83d'\) at character 5 of the text"),
        (encoded, r"encoded.parquet: has bytes that are not UTF-8 at byte offset 2 of the text in row 1"),
    ):
        with pytest.raises(FileProblem, match=place):
            prepare_token_files(
                [source], tokenizer_path=build("tiktoken"), prefix=tmp_path / "out", num_workers=1
            )
        assert not token_file(tmp_path / "out", ".json").exists()
    for kind in KINDS:
        with pytest.raises(UnicodeEncodeError) as caught:
            load_tokenizer(build(kind)).encode("ab\ud800")
        assert caught.value.start == 2


def test_a_text_that_the_library_refuses_is_named_with_its_place(build: Any, tmp_path: Path) -> None:
    """The regular expressions of tiktoken exceed their stack for a million spaces before a letter."""
    first = write_parquet(tmp_path / "1.parquet", ["good"] * 9)
    refused = write_parquet(tmp_path / "2.parquet", ["", "good", None, " " * 1_000_000 + "a", "good"])
    with pytest.raises(FileProblem) as caught:
        prepare_token_files(
            [first, refused], tokenizer_path=build("tiktoken"), prefix=tmp_path / "out", num_workers=2
        )
    message = str(caught.value)
    assert message.startswith(
        f"{refused}: has a text that the library of the tokenizer cannot encode, document 3"
    )
    assert "1,000,001 bytes" in message
    assert message.endswith("split or remove this document")


def test_what_the_round_trip_changes_is_logged_and_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tokenizers import normalizers

    train_byte_level(normalizer=normalizers.NFC()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("cafe\u0301")
    prefix = tmp_path / "out"
    prepare_token_files([tmp_path / "text.txt"], tokenizer_path=tmp_path, prefix=prefix, num_workers=1)
    statement = "combining characters are composed (NFC)"
    assert f"decoded tokens are not exactly the text: {statement}" in caplog.text
    assert load_manifest(prefix).round_trip == statement


def test_files_of_another_end_of_document_are_prepared_anew_only_on_request(
    build: Any, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    options: dict[str, Any] = {
        "tokenizer_path": build("tiktoken"),
        "prefix": tmp_path / "out",
        "num_workers": 1,
    }
    prepare_token_files([tmp_path / "text.txt"], **options)
    with pytest.raises(FileProblem, match="token files of another tokenizer exist"):
        prepare_token_files([tmp_path / "text.txt"], **options, end_of_document="<|user|>")
    prepared = prepare_token_files(
        [tmp_path / "text.txt"], **options, end_of_document="<|user|>", overwrite=True
    )
    assert (prepared.manifest.eos_id, prepared.manifest.end_of_document) == (301, "<|user|>")
    assert np.fromfile(token_file(tmp_path / "out", ".bin"), dtype=np.uint16)[-1] == 301


def measure_byte_model(paths: dict[str, Path], documents: list[str]) -> dict[str, tuple[float, int]]:
    """Return bits per byte and bytes of documents for a model that ignores its input, by tokenizer.

    The model predicts every byte with a fixed probability, and a token with the product over its bytes.
    """
    from sas_megatron.evaluation.scoring import Scores
    from sas_megatron.evaluation.settings import WindowSettings
    from sas_megatron.evaluation.sliding_window import LossByPosition, document_windows

    measured = {}
    for kind, path in paths.items():
        tokenizer, loss = load_tokenizer(path), LossByPosition()
        for window in document_windows(documents, tokenizer, WindowSettings(64, 16)):
            scored, before = (window.tokens[-window.num_scored :], window.tokens[-window.num_scored - 1 : -1])
            pieces = [tokenizer.decode_bytes([token]) for token in scored.tolist()]
            if before[0] == tokenizer.eos_id and tokenizer.adds_prefix:
                pieces[0] = pieces[0].removeprefix(b" ")
            scores = np.array([sum(map(byte_log_probability, piece)) for piece in pieces])
            loss.add(window, Scores(scores, np.zeros(len(scores), dtype=bool)), tokenizer)
        total = loss.total()
        measured[kind] = (total.bits_per_byte, total.num_bytes)
    return measured


def byte_log_probability(byte: int) -> float:
    return math.log((byte + 1) / (256 * 257 / 2))


def test_bits_per_byte_agree_between_tokenizers_for_a_model_that_ignores_its_input(
    build: Any, separate_process: Any
) -> None:
    """Tokens may split a character of several bytes, and a space may be added before a document."""
    documents = [text for text in fuzzed_documents(5, count=20, line_characters=1000) if "\u2581" not in text]
    text = "".join(documents).encode()
    expected = -sum(map(byte_log_probability, text)) / math.log(2) / len(text)
    measured = separate_process(measure_byte_model, {kind: build(kind) for kind in KINDS}, documents)
    for kind, (bits_per_byte, num_bytes) in measured.items():
        assert num_bytes == len(text), kind
        assert bits_per_byte == pytest.approx(expected, rel=1e-12), kind


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Register the encoding `small` without its ranks; yield its folder."""
    environment = write_tiktoken_plugin(tmp_path / "plugin")
    monkeypatch.syspath_prepend(environment["PYTHONPATH"])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", environment["TIKTOKEN_CACHE_DIR"])
    monkeypatch.setattr(registry, "ENCODING_CONSTRUCTORS", None)
    monkeypatch.setattr(registry, "ENCODINGS", {})
    registry._available_plugin_modules.cache_clear()
    yield tmp_path / "plugin"
    registry._available_plugin_modules.cache_clear()


def test_an_encoding_by_name_is_found_by_all_processes(plugin: Path, build: Any, tmp_path: Path) -> None:
    write_tiktoken_ranks(plugin)
    (tmp_path / "text.txt").write_text("some text")
    prepared = prepare_token_files(
        [tmp_path / "text.txt"], tokenizer_path="small", prefix=tmp_path / "out", num_workers=1
    )
    assert prepared.manifest.tokenizer_path == "small"
    # The file in which a run keeps the encoding has the same token ids.
    assert prepared.manifest.tokenizer_sha256 == load_tokenizer(build("tiktoken")).sha256
    with pytest.raises(FileProblem, match="smal: does not exist, and is not an encoding of tiktoken; train"):
        load_tokenizer("smal")


def test_an_encoding_without_its_file_names_the_file_and_its_place(plugin: Path) -> None:
    with pytest.raises(FieldError) as caught:
        load_tokenizer("small")
    name = hashlib.sha1(TIKTOKEN_URL.encode()).hexdigest()
    assert str(caught.value) == (
        f"tokenizer=small: needs the file {TIKTOKEN_URL}, which cannot be downloaded here (ConnectionError); "
        f"download it elsewhere, save it in a folder under the name {name}, and set TIKTOKEN_CACHE_DIR to "
        "this folder"
    )
    write_tiktoken_ranks(plugin)
    assert load_tokenizer("small").is_exact
