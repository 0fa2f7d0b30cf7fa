"""What the training loop itself takes of a step: everything but forward, backward and optimizer.

A real run, of which each step is measured twice: from the beginning of one to that of the next, and within,
what the engine is at work, each call until the device is done. The difference is batches read and moved, loss
and norm agreed on and judged, records, the console, health, and Python in between. Nothing of that is hidden
behind the device here, as some of it would be in a run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from sas_megatron.data.corpus import builtin_corpus
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.prepare import prepare_token_files
from sas_megatron.data.tokenizer_training import train_tokenizer
from sas_megatron.distributed.topology import Topology
from sas_megatron.model.language_loss import Batch
from sas_megatron.training.engine import Engine
from sas_megatron.training.loop import Run

CORPUS_BYTES = 2_000_000
WARM_UP_STEPS = 3


def on_made_up_data(config: RunConfig, folder: Path, *, num_steps: int) -> RunConfig:
    """The run on a small corpus in `folder`, of so many steps, each logged, without evaluation and saving."""
    corpus = builtin_corpus(folder, max_bytes=CORPUS_BYTES)
    tokenizer, prefix = folder / "tokenizer.model", folder / "text"
    train_tokenizer(stream_documents([corpus]), vocab_size=512, model_path=tokenizer)
    prepare_token_files([corpus], tokenizer_path=tokenizer, prefix=prefix, num_workers=1)
    steps = WARM_UP_STEPS + num_steps
    sections: dict[str, dict[str, Any]] = {
        # Half for validation, since a smaller share of so few documents can be shorter than one sample.
        "data": {"prefixes": [str(prefix)], "tokenizer": str(tokenizer), "split": [0.5, 0.5]},
        # Saving at the end cannot be left out, and is not measured.
        "schedule": {"warmup_steps": 1},
        "training": {"num_steps": steps, "stop_after_steps": None},
        "evaluation": {"interval": None, "num_sequences": config.training.micro_batch_size},
        "checkpoint": {"interval": None, "resume": False},
        "logging": {"run_directory": str(folder / "run"), "interval": 1},
    }
    changed = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=changed)


def measure_loop(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """Trains, and measures.

    Returns:
        Median seconds of a step, of the engine in it and of the loop around it; the median of the loop's
        share of its step, and the parts of the loop that can be told apart.
    """
    run = Run(config, topology)
    watch = EngineWatch(run.engine, topology.device)
    run.complete()
    steps = watch.steps()[WARM_UP_STEPS:]
    medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return {
        "seconds": medians,
        "share_of_step": statistics.median(step["loop"] / step["step"] for step in steps),
        "steps": len(steps),
    }


class EngineWatch:
    """Times an engine's calls from within a run."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._device = device
        self._begun: list[float] = []
        self._engine_seconds: list[float] = []
        self._batch_seconds: list[float] = []
        accumulate = engine.forward_backward

        def timed_accumulate(batches: Iterator[Batch], *, num_microbatches: int) -> Any:
            self._begun.append(self._now())
            self._engine_seconds.append(0.0)
            self._batch_seconds.append(0.0)
            reports = self._timed(accumulate)(self._timed_batches(batches), num_microbatches=num_microbatches)
            self._engine_seconds[-1] -= self._batch_seconds[-1]
            return reports

        # Of this one engine: the run and its helpers go on calling what they have.
        engine.forward_backward = timed_accumulate  # type: ignore[method-assign]
        engine.compute_gradient_norm = self._timed(engine.compute_gradient_norm)  # type: ignore[method-assign]
        engine.update = self._timed(engine.update)  # type: ignore[method-assign]

    def steps(self) -> list[dict[str, float]]:
        """Of each step but the last, whose end is not that of a step."""
        return [
            {
                "step": following - begun,
                "engine": in_engine,
                "loop": following - begun - in_engine,
                "loop: batches": of_batches,
                "loop: the rest": following - begun - in_engine - of_batches,
            }
            for begun, following, in_engine, of_batches in zip(
                self._begun, self._begun[1:], self._engine_seconds, self._batch_seconds, strict=False
            )
        ]

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begun = self._now()
            result = call(*args, **options)
            self._engine_seconds[-1] += self._now() - begun
            return result

        return timed

    def _timed_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            begun = self._now()
            batch = next(batches, None)
            self._batch_seconds[-1] += self._now() - begun
            if batch is None:
                return
            yield batch

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
