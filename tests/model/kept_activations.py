"""What autograd keeps of forward passes, by cost term: each storage once, without parameters and batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from sas_megatron.model.language_loss import Batch
from tests.model.one_microbatch import Microbatch, undrawn_weights
from tests.model.term_tracing import TermTracer
from tests.rank_pool import in_layout


class _Kept:
    """A tensor as autograd holds it; says when it lets go."""

    def __init__(self, tensor: torch.Tensor, meter: KeptMeter) -> None:
        # The tensor itself would hold the operation that holds this, and neither would ever go.
        self.tensor, self.meter = tensor.detach(), meter

    def __del__(self) -> None:
        self.meter.release(self.tensor.untyped_storage())


class KeptMeter:
    """While entered, follows what autograd keeps: `terms` now, `peak` when it was the most.

    A storage belongs to the term that kept it first. Those of `known` tensors are not counted.
    """

    def __init__(self, tracer: TermTracer) -> None:
        self.terms: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._tracer = tracer
        self._known: dict[int, torch.UntypedStorage] = {}
        self._kept: Counter[int] = Counter()
        self._term_of: dict[int, str] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def leave_out(self, *tensors: torch.Tensor) -> None:
        """Does not count the storages of `tensors`."""
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
        place = storage._cdata
        if place not in self._known:
            if not self._kept[place]:
                term = self._term_of[place] = str(self._tracer.running_term())
                self.terms[term] += storage.nbytes()
                if self.terms.total() > self.peak.total():
                    self.peak = self.terms.copy()
            self._kept[place] += 1
        return _Kept(tensor, self)

    def release(self, storage: torch.UntypedStorage) -> None:
        """To be called for each time that a tensor was kept."""
        place = storage._cdata
        if place not in self._known:
            self._kept[place] -= 1
            if not self._kept[place]:
                self.terms[self._term_of[place]] -= storage.nbytes()


def simulated_kept_bytes(config: RunConfig, *, rank: int = 0) -> dict[str, int]:
    """In a process that is in no group: what `rank` of one copy of the model keeps of a microbatch."""
    from sas_megatron.planning.fake_world import fake_world

    world_size = config.parallel.model_size
    with fake_world(config.parallel, rank=rank, world_size=world_size), undrawn_weights():
        return _kept_by_pieces(config)


def kept_bytes(config: RunConfig) -> dict[str, int]:
    """On a rank: what its part of the model keeps of a microbatch."""
    in_layout(config.parallel)
    return _kept_by_pieces(config)


def _kept_by_pieces(config: RunConfig) -> dict[str, int]:
    from sas_megatron.model.assembly import build_gpt_chunks

    pieces = build_gpt_chunks(config)
    microbatch = Microbatch.of(config)
    meter = _meter_of(pieces, fused=_is_fused(config))
    meter.leave_out(*microbatch.tensors())
    with meter:
        outputs = [microbatch.pass_through(config, piece) for piece in pieces]
    kept = {name: size for name, size in meter.terms.items() if size}
    del outputs
    assert not meter.terms.total(), "something is kept without the result"
    return kept


def _is_fused(config: RunConfig) -> bool:
    return getattr(config.attention, "kernel", "plain") == "fused"


def _meter_of(pieces: list[Any], *, fused: bool) -> KeptMeter:
    """A meter that leaves out what the pieces hold anyway."""
    meter = KeptMeter(TermTracer(*pieces))

    def leave_out_angles(_module: Any, _inputs: Any, angles: torch.Tensor) -> None:
        # Made once, for as long as the model lives; so is the fused kernels' table of them.
        meter.leave_out(angles)
        if fused:
            from sas_megatron.attention.sas.fused.features import turns_of

            meter.leave_out(turns_of(angles))

    for piece in pieces:
        meter.leave_out(*piece.parameters())
        if hasattr(piece, "rotary_pos_emb"):
            piece.rotary_pos_emb.register_forward_hook(leave_out_angles)
    return meter


def simulated_peak_bytes(config: RunConfig, rank: int, num_microbatches: int) -> dict[str, int]:
    """In a process that is in no group: the most that `rank` keeps in a step of the real engine."""
    from sas_megatron.planning.fake_world import fake_world
    from sas_megatron.training.build import build_engine

    def batches(meter: KeptMeter) -> Iterator[Batch]:
        while True:
            tokens = Microbatch.of(config).tokens
            batch = {"tokens": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": tokens.float()}
            meter.leave_out(*batch.values())
            yield batch

    world_size = config.parallel.model_size
    with fake_world(config.parallel, rank=rank, world_size=world_size), undrawn_weights():
        engine = build_engine(config)
        with _meter_of(engine.model_chunks, fused=_is_fused(config)) as meter:
            engine.forward_backward(batches(meter), num_microbatches=num_microbatches)
        assert not meter.terms.total(), "something is kept of a step that is done"
        return {name: size for name, size in meter.peak.items() if size}
