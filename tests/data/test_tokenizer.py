"""Tests of the tokenizer: exact round trips, byte lengths, and deterministic training."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.sentencepiece_tokenizer import SPACE_MARK
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.tokenizer_loading import load_tokenizer
from sas_megatron.data.tokenizer_training import sample_passages, train_tokenizer
from tests.fork_server import run_command

DIFFICULT = [
    "", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\r", "\0", "\u2581", " \u2581 ", "\u2581\u2581", "\u2585",
    "\u2047", "<unk>", "<s>", "</s>", "<pad>", "<0x0A>", "<0xE2>", "\ufeff", "\u00a0", "\u3000", "\u200b",
    "\ufb01", "Ａ①", "é", "e\u0301", "😀", "👩‍👩‍👧", "\U0010ffff", "\ufffd", "\ufffe",
    "def f():\n        return 1\n", "a" * 999,
]  # fmt: skip


@pytest.mark.parametrize("text", DIFFICULT)
def test_difficult_texts_are_decoded_exactly(tokenizer: Tokenizer, text: str) -> None:
    lengths = tokenizer.token_byte_lengths()
    for surrounded in (text, f"a{text}b", text * 3, f" {text} ", f"\n{text}\n"):
        tokens = tokenizer.encode(surrounded)
        assert tokenizer.decode(tokens) == surrounded
        assert lengths[tokens].sum() == len(surrounded.encode())
        assert tokenizer.eos_id not in tokens


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.text(), st.sampled_from(DIFFICULT))).map("".join))
def test_any_text_is_decoded_exactly(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_byte_lengths()[tokens].sum() == len(text.encode())


def test_documents_of_a_corpus_are_decoded_exactly(tokenizer: Tokenizer, corpus: Path) -> None:
    documents = list(stream_documents([corpus]))
    encoded = tokenizer.encode_documents([document.encode() for document in documents])
    assert [tokenizer.decode(tokens.tolist()) for tokens in encoded] == documents


def test_tokenizer_has_the_interface_of_megatron_core(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 1023
    assert tokenizer.eod == tokenizer.eos == tokenizer.eos_id == 1
    assert tokenizer.decode([tokenizer.eos_id]) == ""
    assert tokenizer.token_byte_lengths()[tokenizer.eos_id] == 0
    assert tokenizer.token_dtype == np.uint16
    assert json.loads(json.dumps(tokenizer.unique_identifiers))["sha256"] == tokenizer.sha256


def test_unpaired_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800")


def test_generated_invalid_utf8_becomes_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("é")[:1]) in ("é", "\ufffd")
    assert tokenizer.decode(tokenizer.encode("\U0010ffff")[:2]) == "\ufffd"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path: Path, corpus: Path, model_type: str) -> None:
    models = []
    for name in ("a", "b"):
        path = tmp_path / name / "t.model"
        trained = train_tokenizer(
            stream_documents([corpus]),
            vocab_size=600,
            model_path=path,
            sample_bytes=100_001,
            model_type=model_type,
        )
        models.append(path.read_bytes())
        record = json.loads(path.with_suffix(".training.json").read_text())
        assert (record["model_type"], record["sha256"]) == (model_type, trained.sha256)
        assert record["trainer_options"]["normalization_rule_name"] == "identity"
    assert models[0] == models[1]


def test_training_of_a_byte_level_bpe_is_deterministic(tmp_path: Path, corpus: Path) -> None:
    command = ("tokenizer", "train", corpus, "--kind", "bpe", "--vocab-size", 600, "--sample-bytes", 100_001)
    contents = []
    for name in ("a.json", "b.json"):
        # Separate processes, because the library draws the order of its hash tables in each.
        ended = run_command(*command, "--output", tmp_path / name)
        assert ended.returncode == 0, ended.stderr
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    assert load_tokenizer(tmp_path / "a.json").is_exact


def test_tokens_may_contain_newlines_and_runs_of_spaces(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("):\n")) < 3
    assert len(tokenizer.encode("        ")) == 1


def test_sample_is_bounded_and_drawn_from_all_documents() -> None:
    documents = [f"{number:05d}\n" * 100 for number in range(997)]
    sample = sample_passages(iter(documents), 60_000)
    assert sample.corpus_bytes == 997 * 600
    assert 59_000 < sample.sampled_bytes <= 60_000
    numbers = [int(passage[:5]) for passage in sample.passages]
    assert numbers == sorted(numbers)
    assert 300 < np.mean(numbers) < 700
    assert sample == sample_passages(iter(documents), 60_000)
    one_long = sample_passages(["".join(documents)], 60_000)
    assert 40_000 < one_long.sampled_bytes <= 60_000
    assert len(one_long.passages) > 2


def test_passages_with_reserved_characters_of_sentencepiece_are_kept() -> None:
    assert sample_passages(["left\u2581\u2585right"], 1000).passages == ["left", "right"]


def error_of_training(documents: list[str], vocab_size: int, model_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        train_tokenizer(documents, vocab_size=vocab_size, model_path=model_path)
    return str(caught.value)


def test_training_errors_name_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    few = ["some words\nand some more"]
    message = error_of_training(few, 9999, path)
    assert message.startswith("vocab_size=9999: is too large for the text; use at most ")
    largest = int(message.split("at most ")[1].split(",")[0])
    assert "vocab_size=100: is too small for the 256 bytes" in error_of_training(few, 100, path)
    assert "vocab_size=0: must be positive" in error_of_training(few, 0, path)
    for documents in ([], [""], ["\n\r\n"]):
        assert "have no text to train a tokenizer on" in error_of_training(documents, 500, path)
    assert list(tmp_path.iterdir()) == []
    train_tokenizer(few, vocab_size=largest, model_path=path)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of_training(few, largest, tmp_path / "file" / "t.model")


def test_another_tokenizer_is_replaced_only_on_request(tmp_path: Path) -> None:
    path, documents = tmp_path / "t.model", ["some words\nand some more"]
    first = train_tokenizer(documents, vocab_size=270, model_path=path)
    assert train_tokenizer(documents, vocab_size=270, model_path=path) == first
    assert error_of_training(documents, 271, path) == (
        f"{path}: is another tokenizer, which token files and checkpoints may need; name another "
        "--output, or give --overwrite"
    )
    assert load_tokenizer(path).sha256 == first.sha256
    train_tokenizer(documents, vocab_size=271, model_path=path, overwrite=True)
    assert load_tokenizer(path).vocab_size == 271


def test_unigram_error_names_the_largest_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="is too large for the text; use at most"):
        train_tokenizer(
            ["some words"], vocab_size=9999, model_path=tmp_path / "t.model", model_type="unigram"
        )


def test_error_names_invalid_models(tmp_path: Path, tokenizer_path: Path) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(FileProblem, match=r"t\.model: does not exist; train one with"):
        load_tokenizer(path)
    model = tokenizer_path.read_bytes()
    not_utf8 = model.replace(SPACE_MARK.encode(), b"\xff\xfe\xfd")
    not_hexadecimal = model.replace(b"<0x41>", b"<0xZZ>")
    # sentencepiece's message on an invalid byte piece contains the piece.
    damaged_byte = model.replace(b"<0x41>", b"<0x\xff1>")
    assert model not in (not_utf8, not_hexadecimal, damaged_byte)
    for content in (b"", b"garbage", model[:5000], not_utf8, not_hexadecimal, damaged_byte):
        path.write_bytes(content)
        with pytest.raises(FileProblem, match=r"t\.model: is damaged, or is not a tokenizer that"):
            load_tokenizer(path)
    with pytest.raises(
        FileProblem, match=r"is a folder without tokenizer\.json or tokenizer\.model; name the file"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "has no byte fallback"),
        ({"byte_fallback": True, "eos_id": -1}, "has no end-of-document token"),
    ],
)
def test_irreversible_models_are_refused(tmp_path: Path, options: dict[str, object], problem: str) -> None:
    model = io.BytesIO()
    lines = [f"some words {number} and more of them" for number in range(99)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=320, model_type="bpe", minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    path = tmp_path / "t.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(FileProblem, match=problem):
        load_tokenizer(path)
