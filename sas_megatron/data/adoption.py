"""Adopt existing token files of Megatron: check PREFIX.bin and PREFIX.idx, and record them in PREFIX.json.

Neither file is written. PREFIX.json is written atomically when all checks have passed, so that an adoption
that was killed leaves nothing behind, and several processes may adopt the same files.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.data.token_files import (
    TokenManifest,
    build_manifest,
    check_token_range,
    load_manifest,
    token_file,
    verify_token_files,
)
from sas_megatron.data.token_index import (
    BLOCK_BYTES,
    check_positions,
    read_header,
    read_lengths,
    read_offsets,
)
from sas_megatron.data.tokenizer import RefusedText, Tokenizer
from sas_megatron.io.files import write_file

logger = logging.getLogger(__name__)

COPY_AGAIN = "copy it again from where it was written"
# Documents that are encoded again, and the largest one, in tokens.
NUM_COMPARED = 32
MAX_COMPARED_TOKENS = 100_000


@dataclass(frozen=True)
class Adoption:
    """Result of `adopt_token_files`."""

    prefix: str
    manifest: TokenManifest
    was_complete: bool  # the files had been adopted, or prepared, with this tokenizer


def expand_prefixes(names: Sequence[str]) -> list[str]:
    """Return the prefixes of token files that names or patterns stand for, sorted within each pattern.

    A name may end in .bin or .idx, as in a list that a shell expanded.

    Raises:
        FileProblem: A name has no token files.
    """
    prefixes: dict[str, None] = {}
    for name in names:
        stem = name.removesuffix(".bin").removesuffix(".idx")
        literal = [stem] if token_file(stem, ".bin").exists() or token_file(stem, ".idx").exists() else []
        found = literal or sorted(
            {path[:-4] for ending in (".bin", ".idx") for path in glob.glob(f"{stem}{ending}")}
        )
        if not found:
            raise FileProblem(
                f"{stem}.idx", "does not exist", "name token files without the endings .bin and .idx"
            )
        prefixes |= dict.fromkeys(found)
    return list(prefixes)


def adopt_token_files(prefix: str, tokenizer: Tokenizer, *, overwrite: bool = False) -> Adoption:
    """Check token files that another program wrote, and record them in PREFIX.json.

    Args:
        prefix: Path of the token files without ending.
        tokenizer: The tokenizer that encoded them.
        overwrite: Check and record files again that have a record.

    Raises:
        FileProblem: A file is missing, damaged or has tokens that the tokenizer does not have, the documents
            end with another special token, or PREFIX.json is another file or cannot be written.
    """
    path = token_file(prefix, ".json")
    if path.exists():
        complete = _find_complete(prefix, tokenizer, overwrite=overwrite)
        if complete is not None:
            return Adoption(prefix, complete, True)
    with _with_remedy():
        manifest = _check(prefix, tokenizer)
    with translate_os_errors(
        path,
        problem="cannot be written",
        remedy="fix the permissions of the folder, or link the .bin and .idx file into a folder of yours",
    ):
        write_file(path, manifest.model_dump_json(indent=2) + "\n")
    return Adoption(prefix, manifest, False)


def _find_complete(prefix: str, tokenizer: Tokenizer, *, overwrite: bool) -> TokenManifest | None:
    """Return the manifest of files that are recorded with this tokenizer; None to record them again.

    Raises:
        FileProblem: PREFIX.json is no manifest, or one of another tokenizer or of other files.
    """
    path = token_file(prefix, ".json")
    try:
        manifest = load_manifest(prefix)
    except FileProblem as problem:
        raise FileProblem(path, problem.problem, "move this file away, or link the token files") from None
    if overwrite:
        return None
    remedy = "give --overwrite to check and record the files again"
    if manifest.tokenizer_sha256 != tokenizer.sha256:
        raise FileProblem(path, f"records another tokenizer ({manifest.tokenizer_path})", remedy)
    try:
        return verify_token_files(prefix)
    except FileProblem as problem:
        raise FileProblem(problem.path, problem.problem, f"{COPY_AGAIN}, or {remedy}") from None


@contextlib.contextmanager
def _with_remedy() -> Iterator[None]:
    """Give errors about files that this program did not write the remedy for them."""
    try:
        yield
    except FileProblem as problem:
        remedy = COPY_AGAIN if "data prepare" in problem.remedy else problem.remedy
        raise FileProblem(problem.path, problem.problem, remedy) from problem
    except OSError as error:
        raise FileProblem(error.filename, f"cannot be read ({error.strerror})", COPY_AGAIN) from error


def _check(prefix: str, tokenizer: Tokenizer) -> TokenManifest:
    """Read both files completely and return their manifest.

    Raises:
        FileProblem: A check failed.
        OSError: A file cannot be read.
    """
    bin_path, idx_path = token_file(prefix, ".bin"), token_file(prefix, ".idx")
    for path in (bin_path, idx_path):
        if not path.exists():
            raise FileProblem(path, "does not exist", "copy both files, PREFIX.bin and PREFIX.idx")
    token_type, num_documents = read_header(idx_path)
    dtype = np.dtype(token_type)
    bin_bytes = bin_path.stat().st_size
    num_tokens = bin_bytes // dtype.itemsize
    check_positions(idx_path, num_documents=num_documents, num_tokens=num_tokens, token_bytes=dtype.itemsize)
    if num_tokens * dtype.itemsize != bin_bytes:
        raise FileProblem(bin_path, f"has an incomplete token at its end ({bin_bytes:,} bytes)", COPY_AGAIN)
    contents = _read_contents(bin_path, dtype, tokenizer)
    without_end = _count_without_end(bin_path, idx_path, num_documents, tokenizer)
    tokens = np.memmap(bin_path, dtype=dtype, mode="r")
    if not _agrees_with_tokenizer(idx_path, tokens, num_documents, tokenizer):
        problem = f"has no text that {tokenizer.location} encodes as the tokens in this file"
        if without_end == num_documents:
            raise FileProblem(bin_path, problem, "name the tokenizer that encoded it")
        logger.warning("%s: %s; is it the tokenizer that encoded them?", bin_path, problem)
    return build_manifest(
        tokenizer,
        idx_path,
        adopted=True,
        num_documents=num_documents,
        num_tokens=num_tokens,
        text_bytes=contents.text_bytes,
        empty_documents=0,
        documents_without_end=without_end,
        dtype=token_type,
        max_token_id=contents.max_token_id,
        sources=[],
        bin_bytes=bin_bytes,
        bin_sha256=contents.sha256,
    )


@dataclass(frozen=True)
class _Contents:
    sha256: str
    text_bytes: int
    max_token_id: int


def _read_contents(path: Path, dtype: np.dtype[Any], tokenizer: Tokenizer) -> _Contents:
    """Read all tokens once, in blocks.

    Raises:
        FileProblem: A token is outside of the vocabulary.
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    text_bytes, max_token_id, last = 0, -1, tokenizer.eos_id
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK_BYTES * dtype.itemsize):
            digest.update(block)
            tokens = np.frombuffer(block, dtype=dtype)
            check_token_range(tokens, tokenizer.vocab_size, path)
            max_token_id = max(max_token_id, int(tokens.max()))
            previous = np.concatenate([np.array([last], dtype=dtype), tokens[:-1]])
            text_bytes += int(tokenizer.count_bytes(tokens, previous).sum(dtype=np.int64))
            last = int(tokens[-1])
    return _Contents(digest.hexdigest(), text_bytes, max_token_id)


def _count_without_end(bin_path: Path, idx_path: Path, num_documents: int, tokenizer: Tokenizer) -> int:
    """Return the number of documents that do not end with the end-of-document token, and log it.

    Raises:
        FileProblem: No document does, and most end with another special token.
    """
    dtype, _ = read_header(idx_path)
    tokens = np.memmap(bin_path, dtype=dtype, mode="r")
    lengths = read_lengths(idx_path, num_documents)
    begin = count = 0
    last_counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, num_documents, BLOCK_BYTES):
        ends = begin + np.cumsum(lengths[start : start + BLOCK_BYTES], dtype=np.int64)
        last = tokens[ends - 1]
        last_counts += np.bincount(last.astype(np.int64), minlength=tokenizer.vocab_size)
        count += int((last != tokenizer.eos_id).sum())
        begin = int(ends[-1])
    usual = int(last_counts.argmax())
    if count and usual != tokenizer.eos_id and usual in tokenizer.special_tokens.values():
        names = {token: name for name, token in tokenizer.special_tokens.items()}
        raise FileProblem(
            bin_path,
            f"has {num_documents:,} documents, of which {last_counts[usual]:,} end with {names[usual]}, not "
            f"with {tokenizer.end_of_document}",
            f"give --end-of-document '{names[usual]}'",
        )
    if count:
        logger.warning(
            "%s: %s of %s documents do not end with %s; data.reset_at_document_ends does not separate them",
            *(bin_path, f"{count:,}", f"{num_documents:,}", tokenizer.end_of_document),
        )
    return count


def _agrees_with_tokenizer(
    idx_path: Path, tokens: npt.NDArray[Any], num_documents: int, tokenizer: Tokenizer
) -> bool:
    """Return whether the text of one of some documents gives the stored tokens when it is encoded again."""
    lengths, offsets = read_lengths(idx_path, num_documents), read_offsets(idx_path, num_documents)
    for document in np.unique(np.linspace(0, num_documents - 1, NUM_COMPARED).astype(np.int64)):
        if lengths[document] <= MAX_COMPARED_TOKENS:
            begin = int(offsets[document]) // tokens.itemsize
            stored = tokens[begin : begin + int(lengths[document])].astype(np.int32)
            # Programs add special tokens before and after a text.
            text = stored[tokenizer.token_byte_lengths()[stored] > 0]
            with contextlib.suppress(RefusedText):
                if tokenizer.encode(tokenizer.decode(text)) == text.tolist():
                    return True
    return False
