"""`sas-megatron checkpoint`: whether saved files are as written; models to transformers and back."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def checkpoint() -> None:
    """Check saved checkpoints; take models to transformers, and from it.

    (To go on at another layout needs no command: change parallel.*.)
    """


@checkpoint.command()
@click.argument("path", type=click.Path(path_type=Path))
def verify(path: Path) -> None:
    """Read every file of the checkpoint PATH, or of all in a run's folder, and compare checksums.

    Exit status 2 if anything is damaged.
    """
    from sas_megatron.checkpoint.manifest import GO_BACK, checkpoints_of, verify_checkpoint
    from sas_megatron.config.errors import FileProblem

    within = checkpoints_of(path)
    damaged = []
    for each in sorted(within) or [path]:
        try:
            manifest = verify_checkpoint(each)
        except FileProblem as problem:
            if not within:
                raise
            click.echo(str(problem))
            damaged.append(each.name)
            continue
        size = sum(record.size_bytes for record in manifest.files.values())
        click.echo(f"{each}: {len(manifest.files)} files, {size:,} bytes, as written at step {manifest.step}")
    if damaged:
        raise FileProblem(path, f"holds damaged checkpoints: {', '.join(damaged)}", GO_BACK)


@checkpoint.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to make.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the written weights; without it, as they were trained.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export_command(source: Path, output: Path, dtype: str | None, as_json: bool) -> None:
    """Write a model that transformers loads.

    SOURCE is a run's directory (its newest checkpoint is taken) or one of its checkpoints. Multi-head,
    grouped-query and multi-query models with RMSNorm and SwiGLU become plain Llamas, all others bring
    their code along (trust_remote_code=True).
    """
    _prepare()
    import torch

    from sas_megatron.checkpoint.export import export_model
    from sas_megatron.checkpoint.run_weights import open_run_weights

    trained = open_run_weights(source)
    done = export_model(
        trained.weights,
        trained.config,
        folder=output,
        dtype=None if dtype is None else getattr(torch, dtype),
        origin=trained.origin,
    )
    if as_json:
        click.echo(
            json.dumps(
                {
                    "folder": str(done.folder),
                    "model_class": done.model_class,
                    "obstacle": done.obstacle,
                    "weights_sha256": done.weights_sha256,
                },
                indent=2,
            )
        )
        return
    form = "a plain Llama" if done.obstacle is None else f"with its code, since {done.obstacle} is no Llama's"
    click.echo(f"{done.folder}: {done.model_class}, {form}; sha256 of the weights {done.weights_sha256}")


@checkpoint.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder to make.")
@click.option(
    "--upcycle",
    "sas_config",
    type=click.Path(),
    help="A run's config with attention.kind=sas and attention.initialization=identity: the model is "
    "continued as that.",
)
@click.option("--vocab-multiple", type=int, help="Round the tables' rows up to a multiple of it, with zeros.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def import_command(
    source: Path, output: Path, sas_config: str | None, vocab_multiple: int | None, as_json: bool
) -> None:
    """Write whole weights that training starts from: checkpoint.initial_weights=OUTPUT.

    SOURCE is the folder of a transformers model (Llama, GPT-NeoX, or exported by this package), or a run's
    directory or checkpoint. model.yaml in OUTPUT holds the sections that a config needs.
    """
    _prepare()
    from sas_megatron.checkpoint.importing import open_model, write_model
    from sas_megatron.checkpoint.run_weights import open_run_weights
    from sas_megatron.checkpoint.upcycling import upcycle
    from sas_megatron.config.errors import FieldError
    from sas_megatron.config.loading import load_run_config

    if vocab_multiple is not None and vocab_multiple < 1:
        raise FieldError("--vocab-multiple", vocab_multiple, "must be positive", "use 128, for example")
    target = None if sas_config is None else load_run_config(sas_config)
    if (source / "config.json").exists():
        multiple = vocab_multiple or (None if target is None else target.model.vocab_multiple)
        whole = open_model(source, vocab_multiple=multiple)
    else:
        whole = open_run_weights(source).as_model()
    if target is not None:
        whole = upcycle(whole, target)
    record = write_model(whole, output)
    if as_json:
        click.echo(json.dumps({"folder": str(output), **record.model_dump(mode="json")}, indent=2))
        return
    model = whole.model
    click.echo(
        f"{output}: {whole.attention.kind}, {model.num_layers} layers, hidden size {model.hidden_size}, "
        f"vocabulary {model.vocab_size}; start from it with checkpoint.initial_weights={output}"
    )


def _prepare() -> None:
    """Megatron-core, which the layers are built on, needs the stand-in before it is imported on CPU."""
    from sas_megatron.platform.device import prepare_device

    prepare_device()
