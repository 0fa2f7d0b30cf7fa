"""The bytes that autograd saves in forward passes, by cost term, without parameters and the batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from sas_megatron.model.language_loss import Batch
from tests.model.one_microbatch import Microbatch, undrawn_weights
from tests.model.term_tracing import TermTracer
from tests.rank_pool import in_layout

SECONDS_UNTIL_RELEASED = 10.0


class _Kept:
    """A tensor saved by autograd, which notifies the meter when it is released."""

    def __init__(self, tensor: torch.Tensor, meter: KeptMeter) -> None:
        # Detached, since the tensor would refer to the operation that refers to this object.
        self.tensor, self.meter = tensor.detach(), meter

    def __del__(self) -> None:
        self.meter.release(self.tensor.untyped_storage())


class KeptMeter:
    """Measures the bytes that autograd saves, while entered: `terms` at present, `peak` at their maximum.

    A storage counts for the term that saved it first. Storages passed to `ignore` are not counted.
    """

    def __init__(self, tracer: TermTracer) -> None:
        self.terms: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._tracer = tracer
        self._known: dict[int, torch.UntypedStorage] = {}
        self._kept: Counter[int] = Counter()
        self._term_of: dict[int, str] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Exclude the storages of `tensors`."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def __enter__(self) -> KeptMeter:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> _Kept:
        storage = tensor.untyped_storage()
        pointer = storage._cdata
        if pointer not in self._known:
            if not self._kept[pointer]:
                term = self._term_of[pointer] = str(self._tracer.running_term())
                self.terms[term] += storage.nbytes()
                if self.terms.total() > self.peak.total():
                    self.peak = self.terms.copy()
            self._kept[pointer] += 1
        return _Kept(tensor, self)

    def release(self, storage: torch.UntypedStorage) -> None:
        """Count a release; called once for each time that a tensor was saved."""
        pointer = storage._cdata
        if pointer not in self._known:
            self._kept[pointer] -= 1
            if not self._kept[pointer]:
                self.terms[self._term_of[pointer]] -= storage.nbytes()


def simulated_kept_bytes(config: RunConfig, *, rank: int = 0) -> dict[str, int]:
    """Return the bytes that `rank` of one model copy saves of a microbatch, without process groups."""
    from sas_megatron.planning.fake_world import fake_world

    world_size = config.parallel.model_size
    with fake_world(config.parallel, rank=rank, world_size=world_size), undrawn_weights():
        return _measure_chunks(config)


def kept_bytes(config: RunConfig) -> dict[str, int]:
    """Return the bytes that this rank saves of a microbatch."""
    in_layout(config.parallel)
    return _measure_chunks(config)


def _measure_chunks(config: RunConfig) -> dict[str, int]:
    from sas_megatron.model.assembly import build_gpt_chunks

    chunks = build_gpt_chunks(config)
    microbatch = Microbatch.of(config)
    meter = _meter_of(chunks, fused=_is_fused(config))
    meter.ignore(*microbatch.tensors())
    with meter:
        outputs = [microbatch.pass_through(config, chunk) for chunk in chunks]
    kept = {name: size for name, size in meter.terms.items() if size}
    del outputs
    # The thread of a gloo group may hold the output of its last collective, and its graph, a little longer.
    deadline = time.monotonic() + SECONDS_UNTIL_RELEASED
    while meter.terms.total() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not meter.terms.total(), "tensors are saved after the result is released"
    return kept


def _is_fused(config: RunConfig) -> bool:
    return getattr(config.attention, "kernel", "plain") == "fused"


def _meter_of(chunks: list[Any], *, fused: bool) -> KeptMeter:
    """Return a meter that ignores the tensors that model chunks hold themselves."""
    meter = KeptMeter(TermTracer(*chunks))

    def ignore_angles(_module: Any, _inputs: Any, angles: torch.Tensor) -> None:
        # Computed once per model, like the fused kernels' table of cosines and sines.
        meter.ignore(angles)
        if fused:
            from sas_megatron.attention.sas.fused.features import build_rope_table

            meter.ignore(build_rope_table(angles))

    for chunk in chunks:
        meter.ignore(*chunk.parameters())
        if hasattr(chunk, "rotary_pos_emb"):
            chunk.rotary_pos_emb.register_forward_hook(ignore_angles)
    return meter


def simulated_peak_bytes(config: RunConfig, rank: int, num_microbatches: int) -> dict[str, int]:
    """Return the peak bytes that `rank` saves in a step of the engine, without process groups."""
    from sas_megatron.planning.fake_world import fake_world
    from sas_megatron.training.build import build_engine

    def batches(meter: KeptMeter) -> Iterator[Batch]:
        while True:
            tokens = Microbatch.of(config).tokens
            batch = {"tokens": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": tokens.float()}
            meter.ignore(*batch.values())
            yield batch

    world_size = config.parallel.model_size
    with fake_world(config.parallel, rank=rank, world_size=world_size), undrawn_weights():
        engine = build_engine(config)
        with _meter_of(engine.model_chunks, fused=_is_fused(config)) as meter:
            engine.forward_backward(batches(meter), num_microbatches=num_microbatches)
        assert not meter.terms.total(), "tensors are saved after the step"
        return {name: size for name, size in meter.peak.items() if size}
