"""`sas-megatron tokenizer`: train a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sas_megatron.cli.data import document_limit


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def tokenizer() -> None:
    """Train a tokenizer."""


@tokenizer.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--vocab-size",
    type=int,
    default=8192,
    show_default=True,
    help="Number of tokens, including control tokens.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The file to write, such as tokenizer.model, or tokenizer.json with --kind bpe.",
)
@click.option("--text-column", default="text", show_default=True, help="Column with the text.")
@document_limit
@click.option(
    "--sample-bytes",
    type=int,
    default=10_000_000,
    show_default=True,
    help="Maximum size of the sample of the text.",
)
@click.option(
    "--kind",
    type=click.Choice(["sentencepiece", "bpe"]),
    default="sentencepiece",
    show_default=True,
    help="bpe is a byte-level BPE in the format tokenizer.json of Hugging Face.",
)
@click.option(
    "--model-type",
    type=click.Choice(["bpe", "unigram"]),
    help="Of sentencepiece: bpe, the default, trains ten times faster; unigram encodes four times faster.",
)
@click.option(
    "--special-token",
    "special_tokens",
    multiple=True,
    metavar="NAME",
    help="A special token in addition to the one after each document. May be repeated.",
)
@click.option("--overwrite", is_flag=True, help="Replace another tokenizer.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    sources: tuple[str, ...],
    *,
    vocab_size: int,
    output: Path,
    text_column: str,
    max_document_bytes: int,
    sample_bytes: int,
    kind: str,
    model_type: str | None,
    special_tokens: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train a tokenizer that reproduces every text exactly.

    SOURCE is a file or folder of documents (Parquet, Arrow, JSON Lines, text), or the word builtin for the
    source code of the Python standard library.
    """
    from sas_megatron.config.errors import FieldError
    from sas_megatron.data.corpus import resolve_sources
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.data.tokenizer_training import record_training, train_tokenizer

    if kind == "bpe" and model_type is not None:
        raise FieldError(
            "--model-type", model_type, "is an option of sentencepiece", "leave it out with --kind bpe"
        )
    documents = stream_documents(
        resolve_sources(list(sources)), text_column=text_column, max_document_bytes=max_document_bytes
    )
    trained = train_tokenizer(
        documents,
        vocab_size=vocab_size,
        model_path=output,
        sample_bytes=sample_bytes,
        kind="bpe" if kind == "bpe" else "sentencepiece",
        model_type="unigram" if model_type == "unigram" else "bpe",
        special_tokens=special_tokens,
        overwrite=overwrite,
    )
    if as_json:
        click.echo(json.dumps({"model_path": str(trained.model_path), **record_training(trained)}, indent=2))
        return
    name = "byte-level bpe" if trained.kind == "bpe" else trained.model_type
    click.echo(
        f"{trained.model_path}: {trained.vocab_size} tokens ({name}), trained on "
        f"{trained.sampled_bytes:,} of {trained.corpus_bytes:,} bytes, sha256 {trained.sha256}"
        + (f" ({documents.num_empty:,} empty documents left out)" if documents.num_empty else "")
    )
