"""`sas-megatron checkpoint`: verify checkpoints, export models to Hugging Face, and import them."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def checkpoint() -> None:
    """Verify checkpoints, export models for transformers, and import Hugging Face models.

    To resume a run with another layout, change parallel.* in its config; no command is needed.
    """


@checkpoint.command(short_help="Read every file and compare its checksum.")
@click.argument("path", type=click.Path(path_type=Path))
def verify(path: Path) -> None:
    """Read every file of a checkpoint, or of all checkpoints of a run, and compare its checksum.

    PATH is a checkpoint, a run directory or its checkpoints/ folder. The exit status is 2 if files are
    damaged.

    \f
    Raises:
        FileProblem: A checkpoint is damaged or cannot be read.
    """
    from sas_megatron.checkpoint.manifest import find_run_checkpoints, verify_checkpoint
    from sas_megatron.config.errors import FileProblem

    checkpoints = find_run_checkpoints(path)
    damaged = []
    for each in sorted(checkpoints) or [path]:
        try:
            manifest = verify_checkpoint(each)
        except FileProblem as problem:
            if not checkpoints:
                raise
            click.echo(str(problem))
            damaged.append(each.name)
            continue
        size = sum(record.size_bytes for record in manifest.files.values())
        num_files = len(manifest.files)
        click.echo(f"{each.resolve().name}: intact, step {manifest.step}, {num_files} files, {size:,} bytes")
    if damaged:
        raise FileProblem(
            path,
            f"contains damaged checkpoints: {', '.join(damaged)}",
            "restore them from a copy, or remove them",
        )


@checkpoint.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the written weights; by default the type in the checkpoint.",
)
@click.option("--iteration", type=int, help="Step of the checkpoint; by default the newest.")
@click.option(
    "--tokenizer",
    "tokenizer_path",
    help="The tokenizer of the model; by default that of the config, or the copy in the run directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export_command(
    source: Path,
    output: Path,
    *,
    dtype: str | None,
    iteration: int | None,
    tokenizer_path: str | None,
    as_json: bool,
) -> None:
    """Export a model to a folder that transformers loads.

    SOURCE is a run directory, whose newest checkpoint is exported, or a checkpoint. Multi-head, grouped-query
    and multi-query models are written in the format of Llama, Qwen2, Qwen3 or GPT-NeoX that can express them.
    Exports of all other models include their code and need trust_remote_code=True.
    """
    _prepare()
    import torch

    from sas_megatron.checkpoint.export import export_model
    from sas_megatron.checkpoint.trained_run import open_model_tokenizer
    from sas_megatron.checkpoint.unsharded_weights import open_run_weights

    trained = open_run_weights(source, iteration=iteration)
    tokenizer = open_model_tokenizer(
        trained.config, trained.checkpoint, option="--tokenizer PATH", given=tokenizer_path
    )
    exported = export_model(
        trained.weights,
        trained.config,
        folder=output,
        tokenizer=tokenizer,
        dtype=None if dtype is None else getattr(torch, dtype),
        origin=trained.origin,
    )
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": str(exported.folder),
                    "model_class": exported.model_class,
                    "obstacle": exported.obstacle,
                    "weights_sha256": exported.weights_sha256,
                },
                indent=2,
            )
        )
        return
    model_format = (
        "without model code"
        if exported.obstacle is None
        else f"with its code, because the Llama format has no {exported.obstacle}"
    )
    click.echo(
        f"{exported.folder}: {exported.model_class}, {model_format}\n"
        f"SHA-256 of the weights: {exported.weights_sha256}"
    )


@checkpoint.command("import", short_help="Write unsharded weights for a new run.")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder.")
@click.option(
    "--upcycle",
    "sas_config",
    type=click.Path(),
    help="Config with attention.kind=sas and attention.initialization=identity: upcycle the model to it.",
)
@click.option("--vocab-multiple", type=int, help="Pad the embedding with zeros to a multiple of this.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def import_command(
    source: Path, output: Path, sas_config: str | None, vocab_multiple: int | None, as_json: bool
) -> None:
    """Write unsharded weights from which training starts with checkpoint.initial_weights=OUTPUT.

    SOURCE is the folder of a Hugging Face model (Llama, Qwen2, Qwen3, GPT-NeoX, or exported by this package),
    a run directory or a checkpoint. model.yaml in OUTPUT contains the sections that the config of the run
    needs.

    \f
    Raises:
        FieldError: --vocab-multiple is not positive.
    """
    _prepare()
    from sas_megatron.checkpoint.importing import open_model, write_model
    from sas_megatron.checkpoint.tokenizer_files import open_source_tokenizer
    from sas_megatron.checkpoint.unsharded_weights import open_run_weights
    from sas_megatron.checkpoint.upcycling import upcycle
    from sas_megatron.config.errors import FieldError
    from sas_megatron.config.loading import load_run_config

    if vocab_multiple is not None and vocab_multiple < 1:
        raise FieldError("--vocab-multiple", vocab_multiple, "must be positive", "use 128, for example")
    target = None if sas_config is None else load_run_config(sas_config)
    if (source / "config.json").exists():
        multiple = vocab_multiple or (None if target is None else target.model.vocab_multiple)
        imported = open_model(source, vocab_multiple=multiple)
    else:
        imported = open_run_weights(source, has_iteration=False).to_unsharded_model()
    if target is not None:
        imported = upcycle(imported, target)
    tokenizer = open_source_tokenizer(source)
    record = write_model(imported, output, tokenizer=tokenizer)
    if as_json:
        click.echo(json.dumps({"folder": str(output), **record.model_dump(mode="json")}, indent=2))
        return
    model = imported.model
    click.echo(
        f"{output}: {imported.attention.kind}, {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"vocabulary {model.vocab_size}\n"
        + (
            "no tokenizer in the source\n"
            if tokenizer is None
            else f"tokenizer: {output / next(iter(tokenizer.files))}, round trip {tokenizer.round_trip}\n"
        )
        + f"Start training from it with checkpoint.initial_weights={output}"
    )


def _prepare() -> None:
    """Configure the log, and prepare the device, as is needed on CPU before Megatron-core is imported."""
    from sas_megatron.cli.log_setup import configure_logging
    from sas_megatron.platform.device import prepare_device

    configure_logging()
    prepare_device()
