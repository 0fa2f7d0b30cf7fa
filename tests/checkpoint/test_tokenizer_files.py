"""Tests that exports and imports of a model carry its tokenizer, with the token ids of training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sas_megatron.checkpoint.tokenizer_files import open_source_tokenizer, write_tokenizer
from sas_megatron.checkpoint.trained_run import open_model_tokenizer
from sas_megatron.config.errors import FieldError
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.tokenizer_loading import load_tokenizer
from tests.data.tokenizer_kinds import END, KINDS, WORDS, train_byte_level
from tests.run_configs import small_config

TEXTS = [WORDS, " two  spaces", "\0e\u0301 1234567", f"a {END} </s> b", "é" * 9, "\u2581 a\u2581b"]


@pytest.fixture(params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    (tmp_path / "trained").mkdir()
    return load_tokenizer(KINDS[request.param](tmp_path / "trained"))


def test_an_exported_tokenizer_gives_the_ids_of_training(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "exported"
    folder.mkdir()
    write_tokenizer(folder, tokenizer, small_config())
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    exported.save_pretrained(tmp_path / "again")
    for each in (exported, AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)):
        for text in TEXTS:
            ids = each(text)["input_ids"]
            assert ids == tokenizer.encode(text)
            assert each.decode(ids) == tokenizer.decode(ids)
        assert each.eos_token_id == each.pad_token_id == tokenizer.eos_id
    assert load_tokenizer(folder).sha256 == tokenizer.sha256, "a run with the exported tokenizer is refused"


def test_an_exported_tokenizer_adds_no_special_tokens(tmp_path: Path) -> None:
    """The tokenizer.json of Llama 3 adds a token before each text, which training does not read."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    library = train_byte_level()
    library.post_processor = TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    for name in ("trained", "exported"):
        (tmp_path / name).mkdir()
    library.save(str(tmp_path / "trained" / "tokenizer.json"))
    native = load_tokenizer(tmp_path / "trained")
    write_tokenizer(tmp_path / "exported", native, small_config())
    ids = AutoTokenizer.from_pretrained(tmp_path / "exported")(WORDS)["input_ids"]
    assert ids == native.encode(WORDS) == library.encode(WORDS).ids[1:]


def test_the_tokenizer_of_an_imported_folder_is_found(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(tokenizer.location).parent
    (folder / "config.json").write_text("{}")
    found = open_source_tokenizer(folder)
    assert found is not None
    assert found.files == tokenizer.files
    Path(tokenizer.location).write_text('{"model": 1}')
    with caplog.at_level(logging.WARNING):
        assert open_source_tokenizer(folder) is None
    assert "the tokenizer is not imported" in caplog.text
    Path(tokenizer.location).unlink()
    assert open_source_tokenizer(folder) is None


def test_a_run_is_read_with_its_copy_of_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = small_config(data={"tokenizer": "moved/tokenizer"}, model={"vocab_size": 512})
    checkpoint = run / "checkpoints" / "iter_0000001"
    with pytest.raises(FieldError, match=r"does not exist, and .* contains no copy"):
        open_model_tokenizer(config, checkpoint, option="--tokenizer PATH", given=None)
    for name, content in tokenizer.files.items():
        (run / name).write_bytes(content)
    found = open_model_tokenizer(config, checkpoint, option="--tokenizer PATH", given=None)
    assert found.sha256 == tokenizer.sha256
