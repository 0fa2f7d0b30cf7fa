"""Tests of `data adopt`: existing token files are checked and recorded, and their samples are Megatron's."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sas_megatron.config.errors import FileProblem
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.data.adoption import Adoption, adopt_token_files, expand_prefixes
from sas_megatron.data.token_files import load_manifest, token_file, verify_token_files
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.tokenizer_loading import load_tokenizer
from tests.data.token_pairs import CODES, INDEX_HEADER, write_pair
from tests.data.tokenizer_kinds import END, WORDS, write_byte_level, write_prefixed
from tests.fork_server import run_command
from tests.rank_pool import in_layout

TEXTS = [WORDS * (number % 5 + 1) + str(number) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("byte_level")))


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, before: Sequence[int] = ()) -> list[list[int]]:
    return [[*before, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def write_shards(folder: Path, tokenizer: Tokenizer) -> list[Path]:
    return [
        write_pair(folder / f"shard_{number}", encode(tokenizer, TEXTS[number::3])) for number in range(3)
    ]


def stamp(path: Path) -> tuple[bytes, int]:
    return path.read_bytes(), path.stat().st_mtime_ns


def adopt(prefix: Path, tokenizer: Tokenizer, *, overwrite: bool = False) -> Adoption:
    return adopt_token_files(str(prefix), tokenizer, overwrite=overwrite)


@pytest.mark.parametrize("dtype", list(CODES))
def test_the_record_describes_the_files_which_stay_unchanged(
    dtype: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents = encode(tokenizer, TEXTS)
    prefix = write_pair(tmp_path / "corpus_text_document", documents, dtype)
    pair = [token_file(prefix, ending) for ending in (".bin", ".idx")]
    before = [stamp(path) for path in pair]
    adoption = adopt(prefix, tokenizer)
    assert [stamp(path) for path in pair] == before
    assert adoption.manifest == load_manifest(prefix) == verify_token_files(prefix, full=True)
    manifest = adoption.manifest
    assert not adoption.was_complete
    assert manifest.adopted
    assert (manifest.num_documents, manifest.num_tokens) == (60, sum(map(len, documents)))
    assert manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert (manifest.dtype, manifest.max_token_id) == (dtype, max(map(max, documents)))
    assert manifest.bin_sha256 == hashlib.sha256(pair[0].read_bytes()).hexdigest()
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    assert manifest.documents_without_end == 0


def test_files_are_adopted_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "corpus", encode(tokenizer, TEXTS))
    adopt(prefix, tokenizer)
    record = stamp(token_file(prefix, ".json"))
    assert adopt(prefix, tokenizer).was_complete
    assert stamp(token_file(prefix, ".json")) == record
    other = load_tokenizer(tokenizer.location, end_of_document="<|user|>")
    with pytest.raises(FileProblem, match=r"records another tokenizer .*; give --overwrite to check"):
        adopt(prefix, other)
    assert not adopt(prefix, tokenizer, overwrite=True).was_complete


def test_a_special_token_before_each_text_is_accepted(tmp_path: Path) -> None:
    """Megatron-LM adds Llama's first token; the space that the tokenizer adds follows it."""
    tokenizer = load_tokenizer(write_prefixed(tmp_path))
    begin = tokenizer.special_tokens["<s>"]
    prefix = write_pair(tmp_path / "corpus", encode(tokenizer, TEXTS, before=[begin]))
    assert adopt(prefix, tokenizer).manifest.text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_documents_without_an_end_are_counted_and_logged(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents = encode(tokenizer, TEXTS)
    for document in documents[::2]:
        document.pop()
    manifest = adopt(write_pair(tmp_path / "corpus", documents), tokenizer).manifest
    assert manifest.documents_without_end == 30
    assert f"30 of 60 documents do not end with {END}" in caplog.text


def damage(case: str, prefix: Path, documents: list[list[int]]) -> None:
    bin_path, idx_path = token_file(prefix, ".bin"), token_file(prefix, ".idx")
    index = bytearray(idx_path.read_bytes())
    if case == "missing .idx":
        idx_path.unlink()
    elif case == "truncated .bin":
        os.truncate(bin_path, bin_path.stat().st_size - 20)
    elif case == "half a token":
        os.truncate(bin_path, bin_path.stat().st_size + 1)
    elif case == "truncated .idx":
        os.truncate(idx_path, len(index) - 8)
    elif case == "another file":
        idx_path.write_bytes(b"x" * len(index))
    elif case == "position":
        index[INDEX_HEADER.size + 4 * 60 + 8] ^= 2
        idx_path.write_bytes(index)
    elif case == "sentences":
        struct.pack_into("<Q", index, 26, 31)
        idx_path.write_bytes(index)
    elif case == "floats":
        index[17] = 6
        idx_path.write_bytes(index)
    elif case == "large token":
        documents[3][1] = 400
        write_pair(prefix, documents)
    elif case == "other record":
        token_file(prefix, ".json").write_text('{"text": "the corpus"}')


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing .idx", ".idx: does not exist; copy both files, PREFIX.bin and PREFIX.idx"),
        ("truncated .bin", ".idx: does not end with the"),
        ("half a token", ".bin: has an incomplete token at its end"),
        ("truncated .idx", ".idx: has 1,234 bytes, but its header gives 1,242; copy it again from"),
        ("another file", ".idx: is not an index of token files; copy it again from where it was written"),
        ("position", ".idx: has a wrong position for document 1; copy it again from where it was written"),
        ("sentences", ".idx: has 60 sequences in 30 documents; write the token files with one sequence"),
        ("floats", ".idx: has tokens that are not integers (type 6)"),
        ("large token", ".bin: has token id 400, outside of the vocabulary of 330"),
        ("other record", ".json: is not a manifest of token files"),
    ],
)
def test_damaged_files_are_named_and_not_recorded(
    case: str, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents = encode(tokenizer, TEXTS)
    prefix = write_pair(tmp_path / "corpus", documents)
    damage(case, prefix, documents)
    with pytest.raises(FileProblem) as caught:
        adopt(prefix, tokenizer)
    assert str(caught.value).startswith(f"{prefix}{message}")
    if case == "other record":
        assert json.loads(token_file(prefix, ".json").read_text()) == {"text": "the corpus"}
    else:
        assert not token_file(prefix, ".json").exists()


def test_another_end_of_document_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "corpus", encode(tokenizer, TEXTS))
    other = load_tokenizer(tokenizer.location, end_of_document="<|user|>")
    with pytest.raises(
        FileProblem, match=r"60 end with <\|endoftext\|>, not with <\|user\|>; give --end-of-doc"
    ):
        adopt(prefix, other)


def test_tokens_of_another_tokenizer_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    permutation = np.roll(np.arange(330), 7)
    documents = [permutation[document].tolist() for document in encode(tokenizer, TEXTS)]
    with pytest.raises(
        FileProblem, match=r"corpus.bin: has no text that .* encodes as the tokens in this file"
    ):
        adopt(write_pair(tmp_path / "corpus", documents), tokenizer)


def test_patterns_and_expanded_names_give_the_prefixes(tmp_path: Path) -> None:
    for name in ("shard_1.bin", "shard_1.idx", "shard_0.bin", "shard_0.idx", "one[1].bin"):
        (tmp_path / name).touch()
    shards = [str(tmp_path / name) for name in ("shard_0", "shard_1")]
    assert expand_prefixes([f"{tmp_path}/shard_*"]) == shards
    assert expand_prefixes([f"{name}{ending}" for name in shards for ending in (".bin", ".idx")]) == shards
    assert expand_prefixes([f"{tmp_path}/one[1]"]) == [f"{tmp_path}/one[1]"]
    with pytest.raises(FileProblem, match=r"none_\*.idx: does not exist"):
        expand_prefixes([f"{tmp_path}/none_*"])


def test_the_command_adopts_shards(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, tokenizer)
    arguments = ("data", "adopt", tmp_path / "shard_*", "--tokenizer", tokenizer.location)
    ended = run_command(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert f"{shards[0]}: adopted; 20 documents" in ended.stdout
    assert f"data.prefixes: {json.dumps(list(map(str, shards)))}" in ended.stdout
    assert "already recorded" in run_command(*arguments).stdout
    shown = run_command("data", "inspect", shards[0], "--verify")
    assert "adopted; 0 documents without an end-of-document token" in shown.stdout
    assert WORDS.splitlines()[0] in shown.stdout
    shards[1].with_suffix(".bin").write_bytes(b"\xff" * shards[1].with_suffix(".bin").stat().st_size)
    refused = run_command(*arguments, "--overwrite")
    assert refused.returncode == 2
    assert "outside of the vocabulary of 330" in refused.stderr


def read_both(prefixes: list[str], location: str, cache: str) -> list[list[Any]]:
    """Return the training samples of adopted files, and those of Megatron-core's own datasets."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from sas_megatron.config.data import DataConfig
    from sas_megatron.data.batches import build_training_samples
    from sas_megatron.data.token_files import open_token_files

    in_layout(ParallelConfig())
    data = DataConfig(
        prefixes=prefixes,
        tokenizer=location,
        weights=[0.5, 0.3, 0.2][: len(prefixes)],
        split=[0.8, 0.2],
        sequence_length=33,
        index_cache=f"{cache}/ours",
        reset_at_document_ends=True,
    )
    tokenizer = open_token_files(data, vocab_size=330, verify=True)
    ours = build_training_samples(data, tokenizer, num_samples=90, seed=5)
    theirs = BlendedMegatronDatasetBuilder(
        GPTDataset,
        [90, 1, 0],
        lambda *_arguments: True,
        GPTDatasetConfig(
            random_seed=5,
            sequence_length=33,
            blend=(prefixes, [0.5, 0.3, 0.2][: len(prefixes)]),
            split="0.8,0.2,0",
            path_to_cache=f"{cache}/theirs",
            tokenizer=_OnlyEnd(tokenizer.eos_id),
            reset_position_ids=True,
            # Segments replace the mask.
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        ),
    ).build()[0]
    return [
        [{name: value.tolist() for name, value in samples[index].items()} for index in range(90)]
        for samples in (ours, theirs)
    ]


class _OnlyEnd:
    """All that Megatron-core's dataset asks of a tokenizer."""

    def __init__(self, eod: int) -> None:
        self.eod, self.vocab_size = eod, 330
        self.unique_identifiers = {"class": "test"}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_samples_are_those_of_megatron_core_on_the_same_files(
    num_shards: int, ranks: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    prefixes = list(map(str, write_shards(tmp_path, tokenizer)))[:num_shards]
    for prefix in prefixes:
        adopt_token_files(prefix, tokenizer)
    [(ours, theirs)] = ranks(1).run(read_both, prefixes, tokenizer.location, str(tmp_path))
    assert ours == theirs
