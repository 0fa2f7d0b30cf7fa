"""Tests of tokenizers of every kind: ids of the libraries, exact bytes, and what a round trip changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.data import tokenizer_loading
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.tokenizer_loading import load_tokenizer
from tests.data.tokenizer_kinds import (
    END,
    KINDS,
    WORDS,
    characters_of_every_category,
    edit_json,
    encode_with_library,
    train_byte_level,
    write_byte_level,
    write_llama2_json,
    write_normalizing,
    write_sentencepiece,
    write_tiktoken,
)

DIFFICULT = [
    "", " ", "  ", "\n\n", "\t", "\r\n", "\0", "\u2581", " \u2581 a", END, "<s>", "</s>", "<0x0A>", "\ufeff",
    "\ufb01", "e\u0301", "👩‍👩‍👧", "\U0010ffff", "\ufffe", WORDS, "a" * 99, "1234567", "\u2581\u2581 ",
]  # fmt: skip


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write(tmp_path_factory.mktemp("kind")) for kind, write in KINDS.items()}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def of_kind(kind: str, paths: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(paths[kind])


def count_bytes(tokenizer: Tokenizer, text: str) -> int:
    tokens = np.array([tokenizer.eos_id, *tokenizer.encode(text), tokenizer.eos_id])
    return int(tokenizer.count_bytes(tokens[1:], tokens[:-1]).sum())


def check_exact(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer.round_trip == "U+2581 becomes a space":
        text = text.replace("\u2581", " ")
    else:
        assert tokenizer.is_exact
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert count_bytes(tokenizer, text) == len(text.encode())
    assert tokenizer.eos_id not in tokenizer.encode(text)


def test_every_text_keeps_its_characters_and_bytes(of_kind: Tokenizer) -> None:
    for text in (*DIFFICULT, "".join(characters_of_every_category())):
        for surrounded in (text, f"a{text}b", f" {text} "):
            check_exact(of_kind, surrounded)


@pytest.mark.parametrize("name", list(KINDS))
def test_any_text_keeps_its_characters_and_bytes(name: str, paths: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(paths[name])

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.one_of(st.text(), st.sampled_from(DIFFICULT))).map("".join))
    def check(text: str) -> None:
        check_exact(tokenizer, text)

    check()


def test_ids_are_those_of_the_library(kind: str, of_kind: Tokenizer, paths: dict[str, Path]) -> None:
    for text in (WORDS, " two  spaces", "\0e\u0301 1234567", "".join(characters_of_every_category())):
        without_mark = text.replace("\u2581", "")
        assert of_kind.encode(without_mark) == encode_with_library(kind, paths[kind], without_mark)


def test_names_of_special_tokens_in_a_text_are_text(of_kind: Tokenizer) -> None:
    names = [*of_kind.special_tokens, END, "</s>"]
    tokens = of_kind.encode("".join(names))
    assert not set(tokens) & set(of_kind.special_tokens.values())
    assert of_kind.decode(tokens) == "".join(names)


def test_the_end_of_document_is_a_special_token_by_name(of_kind: Tokenizer, paths: dict[str, Path]) -> None:
    assert of_kind.end_of_document in (END, "</s>")
    others = [name for name in of_kind.special_tokens if name != of_kind.end_of_document]
    for name in others:
        other = load_tokenizer(of_kind.location, end_of_document=name)
        assert other.eos_id == of_kind.special_tokens[name] != of_kind.eos_id
        assert other.sha256 != of_kind.sha256, "the hash does not identify the token ids of documents"
    with pytest.raises(FieldError, match=r"end_of_document=fox: is not a special token of .*; use one of"):
        load_tokenizer(of_kind.location, end_of_document="fox")


def test_the_kept_files_give_the_same_tokenizer(of_kind: Tokenizer, tmp_path: Path) -> None:
    for name, content in of_kind.files.items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == of_kind.sha256
    assert again.encode(WORDS) == of_kind.encode(WORDS)
    assert again.vocab_size == of_kind.vocab_size == len(of_kind.token_byte_lengths())


def test_settings_beside_a_tokenizer_name_its_end_of_document(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path)
    assert load_tokenizer(path).end_of_document == END
    settings_path = tmp_path / "tokenizer_config.json"
    for token in ("<|user|>", {"content": "<|user|>", "lstrip": False}):
        settings_path.write_text(json.dumps({"eos_token": token}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.end_of_document == "<|user|>"
        assert set(tokenizer.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert load_tokenizer(path, end_of_document=END).end_of_document == END
    settings_path.write_text("[")
    with pytest.raises(FileProblem, match=r"tokenizer_config.json: is damaged"):
        load_tokenizer(tmp_path)


def test_an_unnamed_end_of_document_is_an_error_that_lists_the_special_tokens(tmp_path: Path) -> None:
    path = write_byte_level(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace(END, "<|final|>"), encoding="utf-8")
    with pytest.raises(
        FieldError, match=r"special token that ends a document; use one of <\|begin\|>, <\|fin"
    ):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("normalizer", "options", "statement"),
    [
        (normalizers.NFC(), {}, "combining characters are composed (NFC)"),
        (normalizers.Lowercase(), {}, "letters become lower case"),
        (None, {"add_prefix_space": True}, "a space at the beginning is removed"),
        (normalizers.Replace("\u0248", "?"), {}, "some characters are replaced, such as '\\u0248' by '?'"),
    ],
)
def test_the_round_trip_of_a_tokenizer_that_changes_text_is_stated(
    normalizer: Any, options: dict[str, bool], statement: str, tmp_path: Path
) -> None:
    train_byte_level(normalizer=normalizer, **options).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert statement in tokenizer.round_trip
    assert not tokenizer.is_exact


def test_the_round_trip_of_a_normalizing_sentencepiece_model_is_stated(tmp_path: Path) -> None:
    statement = load_tokenizer(write_normalizing(tmp_path)).round_trip
    assert "compatibility characters are replaced (NFKC)" in statement
    assert "repeated spaces become one" in statement


def test_settings_that_cut_or_extend_documents_are_not_applied(tmp_path: Path) -> None:
    tokenizer = train_byte_level()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=100)
    tokenizer.post_processor = _adding_begin(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode(WORDS)) == WORDS
    assert load_tokenizer(tmp_path).encode("a") == train_byte_level().encode("a").ids


def _adding_begin(tokenizer: LibraryTokenizer) -> Any:
    from tokenizers.processors import TemplateProcessing

    begin = "<|begin|>"
    return TemplateProcessing(f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])


def _write_damaged(case: str, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if case == "words":
        library = LibraryTokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
        library.pre_tokenizer = pre_tokenizers.Whitespace()
        library.save(str(path))
        return path
    if case == "ranks":
        path.write_bytes(b"IQ== 0\nIg== 1\n")
        return path
    write_byte_level(folder)
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    if case == "dropout":
        edit_json(path, model={**model, "dropout": 0.1})
    elif case == "alphabet":
        del model["vocab"]["\u0100"]
        edit_json(path, model=model)
    elif case == "record":
        path.write_text('{"sha256": "0"}')
    elif case == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif case == "model":
        edit_json(path, model={"type": "BPE"})
    elif case == "encoding":
        write_tiktoken(folder).rename(path)
        edit_json(path, mergeable_ranks=[[0, "%"]])
    return path


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("words", "is a WordLevel model without byte-level tokens or byte fallback; use a byte-level"),
        ("dropout", "encodes a text differently each time (model.dropout=0.1); set model.dropout to null"),
        ("alphabet", "has no token for 1 bytes, such as 0x00; train it with the complete alphabet"),
        ("record", "is JSON, but not a tokenizer.json; name the file of the tokenizer"),
        ("truncated", "is damaged JSON"),
        ("model", "is not a tokenizer.json"),
        ("ranks", "is a table of tiktoken ranks, which lacks the pattern and the special tokens"),
        ("encoding", "is a damaged tiktoken encoding"),
    ],
)
def test_files_that_cannot_be_used_are_refused(case: str, problem: str, tmp_path: Path) -> None:
    path = _write_damaged(case, tmp_path)
    with pytest.raises(FileProblem) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: {problem}")


def test_a_missing_library_is_named_with_its_extra(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_loading, "_is_installed", lambda library: False)
    for kind, library in (("byte-level bpe", "tokenizers"), ("tiktoken", "tiktoken")):
        with pytest.raises(UserError, match=rf"needs the library {library}; install it with `pip install"):
            load_tokenizer(paths[kind])
    with pytest.raises(FileProblem, match="encodings of tiktoken by name need this library"):
        load_tokenizer("cl100k_base")
    assert load_tokenizer(paths["sentencepiece"]).is_exact


def test_a_folder_gives_the_tokenizer_in_it(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match=r"is a folder without tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path)
    write_sentencepiece(tmp_path)
    assert load_tokenizer(tmp_path).location.endswith("tokenizer.model")
    write_llama2_json(tmp_path)
    assert load_tokenizer(tmp_path).location.endswith("tokenizer.json")
