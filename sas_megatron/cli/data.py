"""`sas-megatron data`: encode documents as token files, and inspect token files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sas_megatron.data.prepare import PreparationProgress
    from sas_megatron.data.token_files import TokenManifest
    from sas_megatron.data.tokenizer import Tokenizer

# The default is that of data.documents, which is not imported here because `--help` must stay fast.
# sentencepiece counts the bytes of a document in 32 bits.
document_limit = click.option(
    "--max-document-bytes",
    type=click.IntRange(1, 1 << 30),
    default=1 << 27,
    show_default=True,
    help="Largest document, or line of JSON, that is read. Memory grows with it.",
)

end_of_document = click.option(
    "--end-of-document",
    metavar="TOKEN",
    help="Special token after each document; by default the one that the tokenizer names.",
)

EXCERPT_CHARACTERS = 600
SECONDS_BETWEEN_LINES = 10.0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def data() -> None:
    """Encode documents as token files, and inspect token files."""


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--tokenizer",
    "tokenizer_path",
    type=click.Path(path_type=Path),
    required=True,
    help="A sentencepiece .model file, a tokenizer.json, their folder, or an encoding of tiktoken by name.",
)
@end_of_document
@click.option(
    "--output",
    "prefix",
    type=str,
    required=True,
    metavar="PREFIX",
    help="Path of the token files, without ending.",
)
@click.option("--workers", type=int, default=None, help="Worker processes; by default one per CPU.")
@click.option("--text-column", default="text", show_default=True, help="Column with the text.")
@document_limit
@click.option("--overwrite", is_flag=True, help="Replace token files of other documents, and damaged ones.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest of the files as JSON.")
def prepare(
    sources: tuple[str, ...],
    *,
    tokenizer_path: Path,
    end_of_document: str | None,
    prefix: str,
    workers: int | None,
    text_column: str,
    max_document_bytes: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Encode documents as PREFIX.bin, PREFIX.idx and PREFIX.json.

    SOURCE is a file or folder of documents (Parquet, Arrow, JSON Lines, text), or the word builtin for the
    source code of the Python standard library. A run that was interrupted resumes where it stopped.
    """
    from sas_megatron.data.corpus import resolve_sources
    from sas_megatron.data.prepare import prepare_token_files

    with show_progress() as report_progress:
        preparation = prepare_token_files(
            resolve_sources(list(sources)),
            tokenizer_path=tokenizer_path,
            end_of_document=end_of_document,
            prefix=prefix,
            text_column=text_column,
            max_document_bytes=max_document_bytes,
            num_workers=workers,
            overwrite=overwrite,
            report_progress=report_progress,
        )
    manifest = preparation.manifest
    if as_json:
        click.echo(manifest.model_dump_json(indent=2))
        return
    facts = (
        f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, {manifest.text_bytes:,} bytes"
    )
    if manifest.empty_documents:
        facts += f" ({manifest.empty_documents:,} empty documents left out)"
    if preparation.was_complete:
        click.echo(f"{prefix}: already complete; {facts}")
        return
    if preparation.resumed_chunks:
        click.echo(f"{prefix}: resumed after {preparation.resumed_chunks} chunks of an earlier run")
    speed = preparation.encoded_tokens / max(preparation.encoding_seconds, 1e-9)
    click.echo(f"{prefix}: {facts}, in {preparation.encoding_seconds:.1f} s ({speed:,.0f} tokens/s)")


@data.command(short_help="Check and record token files of Megatron.")
@click.argument("prefixes", nargs=-1, required=True, metavar="PREFIX...")
@click.option(
    "--tokenizer",
    "tokenizer_path",
    required=True,
    help="The tokenizer that encoded them: a file, its folder, or an encoding of tiktoken by name.",
)
@end_of_document
@click.option("--overwrite", is_flag=True, help="Check and record files again that have a PREFIX.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifests as JSON.")
def adopt(
    prefixes: tuple[str, ...],
    *,
    tokenizer_path: str,
    end_of_document: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Check token files of Megatron, PREFIX.bin and PREFIX.idx, and record them in PREFIX.json.

    The token files are read, and not written. PREFIX may be a pattern such as 'shards/part_*'. Files that are
    recorded already are skipped.
    """
    import json

    from sas_megatron.data.adoption import adopt_token_files, expand_prefixes
    from sas_megatron.data.tokenizer_loading import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path, end_of_document=end_of_document)
    shards = expand_prefixes(prefixes)
    manifests = {}
    for prefix in shards:
        adoption = adopt_token_files(prefix, tokenizer, overwrite=overwrite)
        manifests[prefix] = manifest = adoption.manifest
        if not as_json:
            state = "already recorded" if adoption.was_complete else "adopted"
            click.echo(
                f"{prefix}: {state}; {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
                f"{manifest.text_bytes:,} bytes"
            )
    if as_json:
        click.echo(json.dumps({prefix: manifest.model_dump() for prefix, manifest in manifests.items()}))
    elif len(shards) > 1:
        click.echo(f"data.prefixes: {json.dumps(shards, ensure_ascii=False)}")


@data.command(short_help="Write the Python source of wheels as a corpus.")
@click.argument("list_path", metavar="LIST", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The Parquet file; a JSON record has the same name.",
)
@click.option(
    "--wheels",
    "wheel_folder",
    type=click.Path(path_type=Path),
    default=Path("data/wheels"),
    show_default=True,
    help="Folder of the wheels; missing ones are downloaded with pip.",
)
@click.option("--sha256", help="The SHA-256 that the documents must have.")
def wheels(list_path: Path, *, output: Path, wheel_folder: Path, sha256: str | None) -> None:
    """Write the Python source of a pinned list of wheels as one corpus, without duplicates.

    LIST has a line NAME==VERSION --hash=sha256:HEX for each wheel. The corpus is the same on every machine.
    """
    from sas_megatron.data.wheel_corpus import build_wheel_corpus

    corpus = build_wheel_corpus(
        list_path,
        output,
        wheel_folder=wheel_folder,
        expected_sha256=sha256,
        log=lambda text: click.echo(text, err=True),
    )
    left_out = ", ".join(f"{kind} ({count:,})" for kind, count in corpus.left_out.items())
    click.echo(
        f"{output}: {corpus.num_documents:,} documents, {corpus.text_bytes:,} bytes, sha256 {corpus.sha256}"
        + (f"; left out {left_out}" if left_out else "")
    )


@data.command()
@click.argument("prefix")
@click.option(
    "--document", type=int, default=0, show_default=True, help="Index of the document to show, from 0."
)
@click.option(
    "--tokenizer",
    "tokenizer_path",
    type=click.Path(path_type=Path),
    help="Path of the tokenizer, if it has moved.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--verify", is_flag=True, help="Check every byte and token, not only sizes and headers.")
def inspect(prefix: str, *, document: int, tokenizer_path: Path | None, as_json: bool, verify: bool) -> None:
    """Show a summary of token files and the beginning of a document."""
    import json

    from sas_megatron.data.token_files import read_document_tokens, verify_token_files

    manifest = verify_token_files(prefix, full=verify)
    tokens = read_document_tokens(prefix, document).tolist()
    text = _load_tokenizer(manifest, tokenizer_path).decode(tokens)
    if as_json:
        shown = {"index": document, "num_tokens": len(tokens), "text": text}
        click.echo(json.dumps({**manifest.model_dump(), "verified": verify, "document": shown}, indent=2))
        return
    _print_facts(prefix, manifest)
    click.echo(f"\ndocument {document}, {len(tokens):,} tokens:\n{text[:EXCERPT_CHARACTERS]}")
    if verify:
        click.echo("\nverified: every byte and token is unchanged")


def _load_tokenizer(manifest: TokenManifest, tokenizer_path: Path | None) -> Tokenizer:
    from sas_megatron.config.errors import FileProblem
    from sas_megatron.data.tokenizer_loading import load_tokenizer, tokenizer_exists

    location = str(tokenizer_path or manifest.tokenizer_path)
    if not tokenizer_exists(location):
        raise FileProblem(location, "does not exist", "name the tokenizer of the tokens with --tokenizer")
    tokenizer = load_tokenizer(location, end_of_document=manifest.end_of_document)
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        raise FileProblem(
            location, "is not the tokenizer that encoded the tokens", "name that one with --tokenizer"
        )
    return tokenizer


def _print_facts(prefix: str, manifest: TokenManifest) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=prefix, title_justify="left")
    table.add_column("fact")
    table.add_column("value", overflow="fold")  # keep paths and hashes complete for copying
    table.add_row(
        "documents", f"{manifest.num_documents:,} ({manifest.empty_documents:,} empty ones left out)"
    )
    table.add_row("tokens", f"{manifest.num_tokens:,} as {manifest.dtype}, with end-of-document tokens")
    table.add_row(
        "text", f"{manifest.text_bytes:,} bytes, {manifest.text_bytes / manifest.num_tokens:.2f} per token"
    )
    table.add_row("vocabulary", f"{manifest.vocab_size:,}, largest token id {manifest.max_token_id:,}")
    table.add_row("round trip", manifest.round_trip)
    table.add_row("tokenizer", f"{manifest.tokenizer_path} (sha256 {manifest.tokenizer_sha256[:12]}…)")
    for source in manifest.sources:
        table.add_row("source", f"{source.path} ({source.num_files:,} files, {source.size_bytes:,} bytes)")
    if manifest.adopted:
        without = manifest.documents_without_end
        table.add_row("source", f"adopted; {without:,} documents without an end-of-document token")
    else:
        table.add_row("text sha256", manifest.text_sha256)
    table.add_row(".bin sha256", manifest.bin_sha256)
    table.add_row("written", f"{manifest.created}, sas_megatron {manifest.package_version}")
    Console().print(table)


@contextmanager
def show_progress() -> Iterator[Callable[[PreparationProgress], None]]:
    """Yield a progress callback that shows a bar on a terminal and prints occasional lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _LineReporter()
        return
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        started = time.monotonic()

        def report(state: PreparationProgress) -> None:
            progress.update(
                task,
                completed=state.source_bytes_read,
                total=state.source_bytes,
                description=_describe(state, time.monotonic() - started),
            )

        yield report


class _LineReporter:
    """Print a line at most every `SECONDS_BETWEEN_LINES`, so that logs stay short."""

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()

    def __call__(self, state: PreparationProgress) -> None:
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            percent = 100 * state.source_bytes_read / max(state.source_bytes, 1)
            print(f"{percent:.0f}% {_describe(state, now - self._started)}", file=sys.stderr, flush=True)


def _describe(state: PreparationProgress, seconds: float) -> str:
    speed = state.num_tokens / max(seconds, 1e-9)
    return f"{state.num_documents:,} documents, {state.num_tokens:,} tokens, {speed:,.0f} tokens/s"
