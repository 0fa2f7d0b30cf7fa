"""Compares data by their contents: two paths may name the same token files, and one path different ones.

run.json records the SHA-256 of the token files of a run and of their tokenizer; each PREFIX.json records
those of its token files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.token_files import TokenManifest, load_manifest
from sas_megatron.io.run_record import RECORD, TokensRecord, damaged_record, read_run_record

# The fields that name data by path.
DATA_PATHS = ("data.prefixes", "data.tokenizer")
_CHECKSUMS = ("bin_sha256", "tokenizer_sha256")


def raise_if_data_differ(config: RunConfig, run: Path) -> None:
    """Check that the token files of a config have the contents of those with which a run was trained.

    Raises:
        FieldError: Token files or their tokenizer differ.
        FileProblem: The record of the run, or a manifest of token files, is missing or damaged.
    """
    record = read_run_record(run)
    if record is None or record.corpus is None:
        raise damaged_record(run / RECORD, "corpus: Field required")
    prefixes = list(dict.fromkeys(config.data.prefixes))
    manifests = {prefix: load_manifest(prefix) for prefix in prefixes}
    pairs: list[tuple[str, TokensRecord | None, list[TokenManifest]]]
    if len(record.corpus) == len(prefixes):
        pairs = [
            (prefix, tokens, [manifests[prefix]])
            for prefix, tokens in zip(prefixes, record.corpus.values(), strict=True)
        ]
    else:
        # Earlier versions recorded one of the prefixes that end in the same name.
        names = {prefix: Path(prefix).name for prefix in prefixes}
        pairs = [
            (
                prefix,
                record.corpus.get(name),
                [manifests[other] for other in prefixes if names[other] == name],
            )
            for prefix, name in names.items()
        ]
    for prefix, tokens, candidates in pairs:
        for checksum, field, value in (
            ("bin_sha256", "data.prefixes", prefix),
            ("tokenizer_sha256", "data.tokenizer", config.data.tokenizer),
        ):
            if getattr(tokens, checksum, None) not in [getattr(found, checksum) for found in candidates]:
                raise FieldError(
                    field,
                    value,
                    f"differs from the {'tokens' if value == prefix else 'tokenizer'} with which the run in "
                    f"{run} started",
                    "use the same token files and tokenizer, or choose another logging.run_directory",
                )


def remove_equal_data(
    differences: Mapping[str, tuple[Any, ...]], config: RunConfig, run: Path
) -> dict[str, tuple[Any, ...]]:
    """Return the differences of a config from that of a run without paths of data with equal contents.

    The paths are compared if the contents are not recorded or the token files cannot be found.
    """
    remaining = dict(differences)
    if remaining.keys() & set(DATA_PATHS):
        try:
            raise_if_data_differ(config, run)
        except UserError:
            return remaining
        for field in DATA_PATHS:
            remaining.pop(field, None)
    return remaining


def corpus_contents(provenance: Mapping[str, Any]) -> object:
    """Return what identifies the data in the provenance of a run, for comparisons with other runs.

    These are the checksums of the token files and tokenizers, in their order, or the recorded value if it
    has another form.
    """
    corpus = provenance.get("corpus")
    if not isinstance(corpus, dict) or not corpus:
        return corpus
    records = list(corpus.values())
    if not all(isinstance(record, dict) and all(map(record.get, _CHECKSUMS)) for record in records):
        return corpus
    return [[record[name] for name in _CHECKSUMS] for record in records]
