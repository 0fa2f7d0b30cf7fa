"""Time of the training loop outside of the engine, that is, without forward, backward and optimizer.

The benchmark runs a real training run and measures each step from its start to the start of the next one. It
also measures the calls of the engine, each until the device has finished. The difference is the time of the
loop, which reads and moves batches, reduces and checks the loss and the gradient norm, writes records and
console lines, checks the health, and runs other Python code. In a normal run some of this overlaps with the
work of the device; here nothing does.
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


def prepare_run(config: RunConfig, folder: Path, *, num_steps: int) -> RunConfig:
    """Prepare a small corpus in `folder`, and return the run on it.

    The run has `num_steps` steps after the warm-up, logs each step, and neither evaluates nor saves.
    """
    corpus = builtin_corpus(folder, max_bytes=CORPUS_BYTES)
    tokenizer, prefix = folder / "tokenizer.model", folder / "text"
    train_tokenizer(stream_documents([corpus]), vocab_size=512, model_path=tokenizer)
    prepare_token_files([corpus], tokenizer_path=tokenizer, prefix=prefix, num_workers=1)
    steps = WARM_UP_STEPS + num_steps
    sections: dict[str, dict[str, Any]] = {
        # Half for validation, since a smaller share of so few documents can be shorter than one sample.
        "data": {"prefixes": [str(prefix)], "tokenizer": str(tokenizer), "split": [0.5, 0.5]},
        # The save at the end cannot be switched off, and is not measured.
        "schedule": {"warmup_steps": 1},
        "training": {"num_steps": steps, "stop_after_steps": None},
        "evaluation": {"interval": None, "num_sequences": config.training.micro_batch_size},
        "checkpoint": {"interval": None, "resume": False},
        "logging": {"run_directory": str(folder / "run"), "interval": 1},
    }
    changed = {name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    return config.model_copy(update=changed)


def measure_loop(config: RunConfig, topology: Topology) -> dict[str, Any]:
    """Run the training and measure its steps.

    Returns:
        Median seconds of a step, of its engine calls, of the loop, and of the loop's measured components; and
        the median of the loop's share of its step.
    """
    run = Run(config, topology)
    timer = EngineTimer(run.engine, topology.device)
    run.complete()
    steps = timer.steps()[WARM_UP_STEPS:]
    medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    return {
        "seconds": medians,
        "share_of_step": statistics.median(step["loop"] / step["step"] for step in steps),
        "steps": len(steps),
    }


class EngineTimer:
    """Time the calls of an engine within a run, by replacing its methods with timed ones."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._device = device
        self._start_times: list[float] = []
        self._engine_seconds: list[float] = []
        self._batch_seconds: list[float] = []
        accumulate = engine.forward_backward

        def timed_accumulate(batches: Iterator[Batch], *, num_microbatches: int) -> Any:
            self._start_times.append(self._now())
            self._engine_seconds.append(0.0)
            self._batch_seconds.append(0.0)
            reports = self._timed(accumulate)(self._timed_batches(batches), num_microbatches=num_microbatches)
            self._engine_seconds[-1] -= self._batch_seconds[-1]
            return reports

        # The methods of this instance are replaced, so that the run calls the timed ones.
        engine.forward_backward = timed_accumulate  # type: ignore[method-assign]
        timed_norm = self._timed(engine.compute_gradient_norm)
        engine.compute_gradient_norm = timed_norm  # type: ignore[method-assign]
        engine.update = self._timed(engine.update)  # type: ignore[method-assign]

    def steps(self) -> list[dict[str, float]]:
        """Return the seconds of each step. The last step has no following step, so it is left out."""
        return [
            {
                "step": end - start,
                "engine": engine,
                "loop": end - start - engine,
                "loop: batches": batches,
                "loop: the rest": end - start - engine - batches,
            }
            for start, end, engine, batches in zip(
                self._start_times,
                self._start_times[1:],
                self._engine_seconds,
                self._batch_seconds,
                strict=False,
            )
        ]

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = self._now()
            result = call(*args, **options)
            self._engine_seconds[-1] += self._now() - start
            return result

        return timed

    def _timed_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = self._now()
            batch = next(batches, None)
            self._batch_seconds[-1] += self._now() - start
            if batch is None:
                return
            yield batch

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
