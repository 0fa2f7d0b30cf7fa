"""Tests of the checks of token files before a training run reads them."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.data.prepare import prepare_token_files
from sas_megatron.data.token_files import (
    load_manifest,
    read_document_tokens,
    token_file,
    verify_token_files,
)
from sas_megatron.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def original(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("token_files")
    for number in range(7):
        (folder / f"{number}.txt").write_text(f"document number {number}\n" * (number + 1))
    prepare_token_files(
        [folder], tokenizer_path=tokenizer_path, prefix=folder / "out" / "tokens", num_workers=1
    )
    return folder / "out" / "tokens"


@pytest.fixture
def prefix(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original.parent, tmp_path / "copy")
    return tmp_path / "copy" / "tokens"


def problem(prefix: Path, vocab_size: int | None = None, *, full: bool = False) -> str:
    with pytest.raises(FileProblem) as caught:
        verify_token_files(prefix, vocab_size, full=full)
    message = str(caught.value)
    assert message.startswith(str(prefix))
    return message.removeprefix(str(prefix))


def edit_manifest(prefix: Path, **fields: object) -> None:
    path = token_file(prefix, ".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_undamaged_files_pass(prefix: Path, tokenizer: Tokenizer) -> None:
    assert verify_token_files(prefix, tokenizer.vocab_size, full=True) == load_manifest(prefix)


def test_document_is_read_by_its_index(prefix: Path, tokenizer: Tokenizer) -> None:
    for number in range(7):
        tokens = read_document_tokens(prefix, number).tolist()
        assert tokens[-1] == tokenizer.eos_id
        assert tokenizer.decode(tokens) == f"document number {number}\n" * (number + 1)
    for number in (7, -1):
        with pytest.raises(FieldError, match=f"document={number}: .* has 7 documents; use 0 to 6"):
            read_document_tokens(prefix, number)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_error_names_missing_truncated_and_longer_files(prefix: Path, ending: str) -> None:
    path = token_file(prefix, ending)
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    again = "prepare it again with `sas-megatron data prepare --overwrite`"
    assert problem(prefix) == f"{ending}: is truncated: {len(content) - 3} bytes of {len(content)}; {again}"
    path.write_bytes(content + b"\0")
    assert f"{ending}: is longer than when it was written" in problem(prefix)
    path.unlink()
    assert problem(prefix) == f"{ending}: is missing; {again}"


def test_error_names_a_missing_or_invalid_manifest(prefix: Path) -> None:
    path = token_file(prefix, ".json")
    edit_manifest(prefix, schema_version=99)
    assert ".json: has schema version 99, and this program reads up to 2" in problem(prefix)
    edit_manifest(prefix, num_tokens="many")
    assert ".json: is not a manifest of token files (num_tokens: Input should be a valid integer" in problem(
        prefix
    )
    path.write_text('{"schema_version": 1')
    assert ".json: is not a manifest of token files (the entire file: Invalid JSON" in problem(prefix)
    path.write_bytes(b"\xff\xfe")
    assert ".json: is not a manifest of token files (the entire file: Invalid JSON" in problem(prefix)
    path.unlink()
    assert ".json: does not exist, so the token files are missing or incomplete" in problem(prefix)


def test_index_header_is_compared_with_the_manifest(prefix: Path) -> None:
    path = token_file(prefix, ".idx")
    content = bytearray(path.read_bytes())
    path.write_bytes(b"X" + content[1:])
    assert ".idx: is not an index of token files" in problem(prefix)
    content[18:26] = struct.pack("<Q", 6)
    path.write_bytes(content)
    assert (
        ".idx: has token type, sequences, documents + 1 = (8, 6, 8), but the manifest has (8, 7, 8)"
        in problem(prefix)
    )


def test_file_size_is_compared_with_the_number_of_tokens(prefix: Path) -> None:
    edit_manifest(prefix, num_tokens=load_manifest(prefix).num_tokens + 1)
    assert ".bin: has " in problem(prefix)


def test_tokens_outside_of_the_vocabulary_are_found_without_reading_the_file(prefix: Path) -> None:
    largest = load_manifest(prefix).max_token_id
    verify_token_files(prefix, largest + 1)
    assert problem(prefix, largest) == (
        f".bin: has token id {largest}, outside of the vocabulary of {largest}; "
        "use the tokenizer that encoded it, or prepare the data with yours"
    )


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_full_check_finds_a_changed_byte(prefix: Path, ending: str) -> None:
    path = token_file(prefix, ending)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    verify_token_files(prefix)
    assert f"{ending}: has changed since it was written (sha256)" in problem(prefix, full=True)


def test_full_check_scans_every_token(prefix: Path) -> None:
    tokens = np.fromfile(token_file(prefix, ".bin"), dtype=np.uint16)
    largest = int(tokens.max())
    edit_manifest(prefix, max_token_id=0)
    verify_token_files(prefix, largest)
    assert f".bin: has token id {largest}" in problem(prefix, largest, full=True)


def reseal(prefix: Path) -> None:
    """Record the files as they are in the manifest."""
    for name in ("bin", "idx"):
        content = token_file(prefix, f".{name}").read_bytes()
        edit_manifest(
            prefix,
            **{f"{name}_bytes": len(content), f"{name}_sha256": hashlib.sha256(content).hexdigest()},
        )


@pytest.mark.parametrize(
    ("offset", "kind", "value", "message"),
    [
        (34 + 4 * 2, "<i", 10**9, ".idx: has a wrong position for document 3"),
        (34 + 4 * 2, "<i", 0, ".idx: has a wrong position for document 2"),
        (34 + 4 * 6, "<i", 10**6, ".idx: does not end with the "),
        (34 + 4 * 7 + 8 * 3, "<q", -2, ".idx: has a wrong position for document 3"),
        (34 + 4 * 7 + 8 * 3, "<q", 2**62, ".idx: has a wrong position for document 3"),
        (34 + 12 * 7 + 8 * 4, "<q", 5, ".idx: has a wrong position for document 4"),
        (34 + 12 * 7 + 8 * 7, "<q", 8, ".idx: does not end with the "),
    ],
)
def test_full_check_finds_a_wrong_position_with_a_matching_checksum(
    prefix: Path, offset: int, kind: str, value: int, message: str
) -> None:
    # 34 bytes of header, then the 7 lengths, the 7 offsets and the 8 indices of sequences.
    path = token_file(prefix, ".idx")
    content = bytearray(path.read_bytes())
    struct.pack_into(kind, content, offset, value)
    path.write_bytes(content)
    reseal(prefix)
    assert problem(prefix, full=True).startswith(message)
    for document in range(7):
        try:
            read_document_tokens(prefix, document)
        except FileProblem as error:
            assert f"has a wrong position for document {document}" in str(error)  # noqa: PT017


def test_an_index_of_another_size_than_its_documents_need_is_refused(prefix: Path) -> None:
    path = token_file(prefix, ".idx")
    path.write_bytes(path.read_bytes()[:60])
    reseal(prefix)
    assert problem(prefix).startswith(".idx: has 60 bytes, but 7 documents take 182; prepare it again")
    with pytest.raises(FileProblem, match=r"tokens.idx: is truncated \(.*\); prepare it again"):
        read_document_tokens(prefix, 0)


@pytest.mark.parametrize("fields", [{"num_documents": 0}, {"num_tokens": 0}, {"num_documents": -7}])
def test_a_manifest_without_documents_or_tokens_is_refused(prefix: Path, fields: dict[str, int]) -> None:
    edit_manifest(prefix, **fields)
    assert (
        f"is not a manifest of token files ({next(iter(fields))}: Input should be greater than 0"
        in problem(prefix)
    )


def test_negative_and_unknown_tokens_of_a_document_are_refused(prefix: Path) -> None:
    path = token_file(prefix, ".bin")
    content = bytearray(path.read_bytes())
    content[:2] = b"\xff\xff"
    path.write_bytes(content)
    with pytest.raises(FileProblem, match=r"tokens.bin: has token id 65535, outside of the vocabulary of"):
        read_document_tokens(prefix, 0)
    edit_manifest(prefix, dtype="int32", num_tokens=len(content) // 4)
    content[:4] = (-5).to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(FileProblem, match=r"tokens.bin: has token id -5, outside of the vocabulary of"):
        read_document_tokens(prefix, 0)
