"""`sas-megatron generate`: a trained model goes on from prompts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sas_megatron.cli.log_setup import configure_logging

if TYPE_CHECKING:
    from sas_megatron.evaluation.generation import Generated
    from sas_megatron.evaluation.trained_model import TrainedModel


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--prompt", "prompts", multiple=True, help="Text to go on from; as often as there are texts.")
@click.option(
    "--prompts",
    "prompt_files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="File or folder of documents, each a prompt (Parquet, Arrow, JSON lines, text).",
)
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--top-k", type=int, help="Draw among so many of the likeliest tokens.")
@click.option("--top-p", type=float, help="Draw among the likeliest that have this probability together.")
@click.option("--stop", multiple=True, help="The text ends before this; may be given several times.")
@click.option("--seed", type=int, default=1234, show_default=True, help="Of what is drawn.")
@click.option("--iteration", type=int, help="The checkpoint after so many steps; by default the newest.")
@click.option(
    "--batch-tokens",
    type=int,
    default=16384,
    show_default=True,
    help="Tokens that the cache of a batch may hold.",
)
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the texts.")
def generate(
    source: Path,
    overrides: tuple[str, ...],
    *,
    prompts: tuple[str, ...],
    prompt_files: tuple[Path, ...],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: tuple[str, ...],
    seed: int,
    iteration: int | None,
    batch_tokens: int,
    as_json: bool,
) -> None:
    """Continue prompts with the model of SOURCE, a run's directory or a checkpoint.

    OVERRIDES read section.field=value: attention.kv_cache=simulated, of SAS, or the layout of several
    processes, as in torchrun --standalone --nproc-per-node 2 -m sas_megatron generate … parallel.tensor=2.
    """
    from sas_megatron.platform.launcher import set_rank_from_slurm

    set_rank_from_slurm()
    configure_logging()
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.evaluation.generation_settings import GenerationSettings, Sampling, encode_prompts
    from sas_megatron.evaluation.start import find_model, loaded

    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        stop=stop,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        batch_tokens=batch_tokens,
    )
    found = find_model(source, iteration=iteration, overrides=overrides)
    texts = [*prompts, *(stream_documents(prompt_files) if prompt_files else ())]
    encoded = encode_prompts(texts, found.tokenizer, context=found.config.data.sequence_length)
    with loaded(found) as model:
        from sas_megatron.evaluation.generation import generate as generate_texts

        begun = time.perf_counter()
        generated = generate_texts(model, encoded, settings)
        seconds = time.perf_counter() - begun
        if model.topology.is_rank0:
            result = _as_dict(model, texts, generated, seconds=seconds)
            if as_json:
                click.echo(json.dumps(result, indent=2))
            else:
                _show(result)


def _as_dict(
    model: TrainedModel, prompts: list[str], generated: Generated, *, seconds: float
) -> dict[str, Any]:
    num_tokens = sum(len(done.tokens) for done in generated.completions)
    return {
        "step": model.step,
        "completions": [
            {"prompt": prompt, "text": done.text, "num_tokens": len(done.tokens), "finish": done.finish}
            for prompt, done in zip(prompts, generated.completions, strict=True)
        ],
        "kv_cache": {
            # Only SAS has a choice.
            "kind": getattr(model.config.attention, "kv_cache", None),
            "bytes_per_token_and_rank": generated.cache_bytes_per_token,
        },
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
    }


def _show(result: dict[str, Any]) -> None:
    for number, done in enumerate(result["completions"], start=1):
        if len(result["completions"]) > 1:
            click.secho(f"--- {number} ({done['finish']})", dim=True)
        click.echo(click.style(done["prompt"], bold=True) + done["text"])
    kept = result["kv_cache"]
    kind = "" if kept["kind"] is None else f" (attention.kv_cache={kept['kind']})"
    num_tokens = sum(done["num_tokens"] for done in result["completions"])
    # Of several, each says above its text what has ended it.
    ended_by = f" ({result['completions'][0]['finish']})" if len(result["completions"]) == 1 else ""
    click.echo(
        f"\n{num_tokens:,} tokens{ended_by} in {result['seconds']:.1f} s "
        f"({result['tokens_per_second']:,.1f} a second) of the model after step {result['step']:,}; "
        f"the cache keeps {kept['bytes_per_token_and_rank']:,} bytes of a token on each rank{kind}",
        err=True,
    )
