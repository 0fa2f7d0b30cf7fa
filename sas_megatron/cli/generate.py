"""`sas-megatron generate`: continue prompts with a trained model."""

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
@click.option("--prompt", "prompts", multiple=True, help="Text to continue. Repeat it for several texts.")
@click.option(
    "--prompts",
    "prompt_files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="File or folder of documents, one prompt each (Parquet, Arrow, JSON lines, text).",
)
@click.option(
    "--max-new-tokens",
    type=int,
    default=128,
    show_default=True,
    help="Largest number of new tokens per text.",
)
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="0 selects the most likely token."
)
@click.option("--top-k", type=int, help="Sample from this number of the most likely tokens.")
@click.option("--top-p", type=float, help="Sample from the most likely tokens with this total probability.")
@click.option("--stop", multiple=True, help="End the text before this string. Repeat it for several.")
@click.option("--seed", type=int, default=1234, show_default=True, help="Seed of sampling.")
@click.option("--iteration", type=int, help="Step of the checkpoint; by default the newest.")
@click.option(
    "--batch-tokens",
    type=int,
    default=16384,
    show_default=True,
    help="Largest number of cache slots of a batch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
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
    """Continue prompts with the model of SOURCE, a run directory or a checkpoint.

    OVERRIDES have the form section.field=value. They select the cache of SAS (attention.kv_cache=simulated)
    or the layout of several processes, for example:

    torchrun --standalone --nproc-per-node 2 -m sas_megatron generate … parallel.tensor=2
    """
    from sas_megatron.platform.launcher import set_rank_from_slurm

    set_rank_from_slurm()
    configure_logging()
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.evaluation.model_source import find_model_source, load_model
    from sas_megatron.evaluation.settings import GenerationSettings, Sampling, encode_prompts

    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        stop=stop,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        batch_tokens=batch_tokens,
    )
    model_source = find_model_source(source, iteration=iteration, overrides=overrides)
    in_files = stream_documents(prompt_files) if prompt_files else None
    texts = [*prompts, *(in_files or ())]
    num_empty = 0 if in_files is None else in_files.num_empty
    encoded = encode_prompts(texts, model_source.tokenizer, context=model_source.config.data.sequence_length)
    with load_model(model_source) as model:
        from sas_megatron.evaluation.generation import generate as generate_texts

        begin = time.perf_counter()
        generated = generate_texts(model, encoded, settings)
        seconds = time.perf_counter() - begin
        if model.topology.is_rank0:
            result = _to_dict(model, texts, generated, seconds=seconds) | {"empty_prompts": num_empty}
            if as_json:
                click.echo(json.dumps(result, indent=2))
            else:
                _show(result)


def _to_dict(
    model: TrainedModel, prompts: list[str], generated: Generated, *, seconds: float
) -> dict[str, Any]:
    num_tokens = sum(len(completion.tokens) for completion in generated.completions)
    return {
        "step": model.step,
        "completions": [
            {
                "prompt": prompt,
                "text": completion.text,
                "num_tokens": len(completion.tokens),
                "finish": completion.finish,
            }
            for prompt, completion in zip(prompts, generated.completions, strict=True)
        ],
        "kv_cache": {
            # Only SAS has different kinds of cache.
            "kind": getattr(model.config.attention, "kv_cache", None),
            "bytes_per_token_and_rank": generated.cache_bytes_per_token,
        },
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
    }


def _show(result: dict[str, Any]) -> None:
    completions, cache = result["completions"], result["kv_cache"]
    for number, completion in enumerate(completions, start=1):
        if len(completions) > 1:
            click.secho(f"--- {number} ({completion['finish']})", dim=True)
        click.echo(click.style(completion["prompt"], bold=True) + completion["text"])
    kind = "" if cache["kind"] is None else f" (attention.kv_cache={cache['kind']})"
    num_tokens = sum(completion["num_tokens"] for completion in completions)
    # With several texts, the reason is printed above each text.
    finish = f" ({completions[0]['finish']})" if len(completions) == 1 else ""
    click.echo(
        f"\n{num_tokens:,} tokens{finish} by the model of step {result['step']:,}\n"
        f"{result['seconds']:.1f} s, {result['tokens_per_second']:,.1f} tokens/s\n"
        f"KV cache: {cache['bytes_per_token_and_rank']:,} bytes per token and rank{kind}"
        + (f"\n{result['empty_prompts']:,} empty prompts left out" if result["empty_prompts"] else ""),
        err=True,
    )
