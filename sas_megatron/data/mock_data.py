"""Token files of random tokens, and a tokenizer without text, for runs that need no corpus.

The files are in the user's cache folder, named by what determines them; equal configs have equal files on
every node, so that no file system has to be shared.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import uuid
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sentencepiece import sentencepiece_model_pb2

from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError, FileProblem, translate_os_errors
from sas_megatron.data.sentencepiece_tokenizer import SPACE_MARK
from sas_megatron.data.token_files import (
    build_manifest,
    token_file,
    verify_token_files,
)
from sas_megatron.data.token_index import write_index
from sas_megatron.data.tokenizer_loading import load_tokenizer
from sas_megatron.io.file_records import describe_file
from sas_megatron.io.files import make_folder, user_cache_folder

# Changes whenever the same arguments give other files.
VERSION = 1
MIN_TOKENS = 2**22
TOKENS_PER_DOCUMENT = 1024
# The control tokens, one token for each byte, and the space, which has a piece of its own in sentencepiece.
SMALLEST_VOCABULARY = 3 + 256 + 1
SEED = 0


def provide_mock_data(data: DataConfig, *, vocab_size: int) -> DataConfig:
    """Return the `data` section with random token files instead of its own; write them if needed.

    Args:
        data: The section; its sequence length and split decide the number of tokens.
        vocab_size: Vocabulary size of the model.

    Raises:
        FieldError: The vocabulary is too small.
        FileProblem: The cache folder cannot be written.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise FieldError(
            "model.vocab_size",
            vocab_size,
            "is too small for mock data, whose tokenizer has a token for each byte",
            f"use {SMALLEST_VOCABULARY} or more",
            (f"model.vocab_size={SMALLEST_VOCABULARY}",),
        )
    smallest_share = min(data.split) / sum(data.split)
    # Each part has the tokens of some samples.
    num_tokens = max(MIN_TOKENS, int(4 * (data.sequence_length + TOKENS_PER_DOCUMENT) / smallest_share))
    num_documents = -(-num_tokens // TOKENS_PER_DOCUMENT)
    folder = user_cache_folder() / "mock_data" / f"{vocab_size}_{num_documents}_v{VERSION}"
    with translate_os_errors(
        folder, problem="cannot be written", remedy="set XDG_CACHE_HOME to a writable folder"
    ):
        if not _is_intact(folder):
            _remove(folder)
            _write_folder(folder, vocab_size=vocab_size, num_documents=num_documents)
    changes = {"prefixes": [str(folder / "tokens")], "weights": None, "tokenizer": str(folder / "mock.model")}
    return data.model_copy(update=changes)


def _is_intact(folder: Path) -> bool:
    try:
        manifest = verify_token_files(folder / "tokens", full=True)
        return load_tokenizer(folder / "mock.model").sha256 == manifest.tokenizer_sha256
    except FileProblem:
        return False


def _remove(folder: Path) -> None:
    """Remove damaged files, if there are any; they are renamed first, so that no process reads a part."""
    with contextlib.suppress(FileNotFoundError):
        renamed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        folder.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def _write_folder(folder: Path, *, vocab_size: int, num_documents: int) -> None:
    """Write the files to a temporary folder and rename it; the ranks of a node may do so at the same time."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    make_folder(temporary)
    try:
        _write_files(temporary, folder, vocab_size=vocab_size, num_documents=num_documents)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has written the same files
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(temporary: Path, folder: Path, *, vocab_size: int, num_documents: int) -> None:
    model = temporary / "mock.model"
    model.write_bytes(build_mock_tokenizer(vocab_size))
    tokenizer = load_tokenizer(model)
    lengths = np.full(num_documents, TOKENS_PER_DOCUMENT, dtype=np.int32)
    tokens = _draw_tokens(vocab_size, num_documents).astype(tokenizer.token_dtype)
    tokens[:, -1] = tokenizer.eos_id
    prefix = temporary / "tokens"
    bin_path, idx_path = token_file(prefix, ".bin"), token_file(prefix, ".idx")
    bin_path.write_bytes(tokens.tobytes())
    write_index(idx_path, lengths, tokenizer.token_dtype)
    contents = describe_file(bin_path)
    nothing = hashlib.sha256().hexdigest()
    manifest = build_manifest(
        tokenizer,
        idx_path,
        num_documents=num_documents,
        num_tokens=tokens.size,
        text_bytes=int(tokenizer.token_byte_lengths()[tokens].sum()),
        empty_documents=0,
        max_token_id=int(tokens.max()),
        tokenizer_path=str(folder / model.name),
        text_column="mock",
        sources=[],
        sources_fingerprint=nothing,
        text_sha256=nothing,
        bin_bytes=contents.size_bytes,
        bin_sha256=contents.sha256,
    )
    token_file(prefix, ".json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def build_mock_tokenizer(vocab_size: int) -> bytes:
    """Return a sentencepiece model with a token for each byte and invented pieces, `vocab_size` in total."""
    model = sentencepiece_model_pb2.ModelProto()
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    pieces = [("<unk>", kind.UNKNOWN), ("<s>", kind.CONTROL), ("</s>", kind.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
    pieces += [(SPACE_MARK, kind.NORMAL)]
    pieces += [(f"mock{number:07d}", kind.NORMAL) for number in range(vocab_size - SMALLEST_VOCABULARY)]
    for piece, piece_type in pieces:
        score = -1.0 if piece_type == kind.NORMAL else 0.0
        model.pieces.add(piece=piece, score=score, type=piece_type)
    trainer = model.trainer_spec
    trainer.vocab_size, trainer.byte_fallback = vocab_size, True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix = "identity", False
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _draw_tokens(vocab_size: int, num_documents: int) -> npt.NDArray[np.int64]:
    """Return random tokens without control tokens, int64 [documents, TOKENS_PER_DOCUMENT].

    The n-th token has a probability in proportion to 1/n, about as the words of a text.
    """
    num_choices = vocab_size - 3
    cumulative = np.cumsum(1.0 / np.arange(1, num_choices + 1))
    uniform = np.random.default_rng(SEED).random((num_documents, TOKENS_PER_DOCUMENT))
    drawn = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    tokens: npt.NDArray[np.int64] = (3 + np.minimum(drawn, num_choices - 1)).astype(np.int64)
    return tokens
