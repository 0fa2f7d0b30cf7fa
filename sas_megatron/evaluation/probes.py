"""What happens inside a model, measured on a fixed probe batch: activations, attention, and SAS's simulation.

    validation windows -> a forward pass without gradients or dropout, in which modules are wrapped
      -> sums and extremes of this rank's tokens and heads -> merged over ranks -> one entry per layer

Every data rank measures the same windows, so that the result does not depend on the layout. The pass is in
addition to the one that computes the validation loss, and changes neither it nor the training.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from sas_megatron.attention.sas.layer import SimulatedSelfAttention
from sas_megatron.attention.sas.simulated_attention import simulate_features, simulate_heads
from sas_megatron.attention.sas.simulation_kernels import NAMES
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.head_sharding import shard_heads
from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.distributed.topology import Topology
from sas_megatron.model.language_loss import forward_step

# Queries whose scores are computed together, so that no tensor has S² elements.
QUERIES = 256
# The parts of a layer whose results are measured, by their name in Megatron-core; "" is the layer itself.
PARTS = {"residual": "", "attention": "self_attention", "mlp": "mlp"}


@dataclass
class LayerSums:
    """Sums over this rank's part of the probe batch in one layer.

    Attributes:
        squares: Sum of squares and number of elements of the results of each of `PARTS`.
        heads: Largest score, sum of entropies and number of queries of each query head.
        fired: For each map of the simulation, which units of its ReLU were positive for some token.
        similarities: For query, key and value, the sum of cosines between simulated copies of a head, and
            their number.
    """

    squares: dict[str, tuple[float, int]] = field(default_factory=dict)
    heads: dict[int, tuple[float, float, int]] = field(default_factory=dict)
    fired: dict[str, torch.Tensor] = field(default_factory=dict)
    similarities: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add(self, other: LayerSums) -> None:
        """Add the sums over other tokens or heads."""
        for mine, theirs in ((self.squares, other.squares), (self.similarities, other.similarities)):
            for name, (total, count) in theirs.items():
                before = mine.get(name, (0.0, 0))
                mine[name] = (before[0] + total, before[1] + count)
        for head, (largest, entropy, count) in other.heads.items():
            old = self.heads.get(head, (largest, 0.0, 0))
            self.heads[head] = (max(old[0], largest), old[1] + entropy, old[2] + count)
        for name, units in other.fired.items():
            self.fired[name] = units | self.fired.get(name, units)

    def results(self) -> dict[str, Any]:
        """Return the measured values by name in metrics.jsonl; None for values that are not finite."""
        heads = [values for _, values in sorted(self.heads.items())]
        silent = {name: 1 - units.double().mean().item() for name, units in sorted(self.fired.items())}
        return {
            **{f"{name}_rms": _mean(*sums, root=0.5) for name, sums in sorted(self.squares.items())},
            "largest_score": [_mean(largest, 1) for largest, _, _ in heads],
            "mean_entropy": [_mean(entropy, count) for _, entropy, count in heads],
            "silent_units": silent,
            "copy_similarity": {name: _mean(*sums) for name, sums in sorted(self.similarities.items())},
        }


def probe_model(engine: Any, data: Any, *, config: RunConfig, topology: Topology) -> list[dict[str, Any]]:
    """Return an entry for each layer, the same on every rank; every rank must call this.

    Args:
        engine: The engine that trains the model (`training.engine`).
        data: Gives the microbatches of the probe, the same on all data ranks (`training.run_data`).
        config: The run. Of `evaluation.probe_sequences` windows, rows that fill the last microbatch are left
            out.
        topology: The process groups.
    """
    sums: dict[int, LayerSums] = {}
    with contextlib.ExitStack() as stack:
        for chunk in engine.model_chunks:
            for layer in chunk.decoder.layers:
                found = sums.setdefault(layer.layer_number, LayerSums())
                stack.enter_context(_Probe(layer, found, config, topology).installed())
        batches, num_microbatches = data.probe_batches()
        engine.forward(forward_step, batches, num_microbatches=num_microbatches)
    # All data ranks measure the same, and one of them counts.
    merged: dict[int, LayerSums] = {}
    for of_rank in gather_from_ranks(sums if topology.data_rank == 0 else {}):
        for number, found in of_rank.items():
            merged.setdefault(number, LayerSums()).add(found)
    return [{"layer": number, **found.results()} for number, found in sorted(merged.items())]


class _Probe:
    """Measures one layer in the forward passes of the probe batch."""

    def __init__(self, layer: Any, sums: LayerSums, config: RunConfig, topology: Topology) -> None:
        self.layer, self.sums, self.config, self.topology = layer, sums, config, topology
        self.attention = layer.self_attention
        # Sequences that each hook has not measured yet.
        num_sequences = config.evaluation.probe_sequences
        self.remaining: dict[str, int] = dict.fromkeys([*PARTS, "scores", "simulation"], num_sequences)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the layer's modules for the duration of the context."""
        parts = {name: self.layer.get_submodule(path) for name, path in PARTS.items()}
        hooks = [
            part.register_forward_hook(functools.partial(self._measure_result, name))
            for name, part in parts.items()
        ]
        core = self.attention.core_attention
        wrapped: list[tuple[Any, str, Callable[..., None]]] = [(core.backend, "attend", self._measure_scores)]
        if isinstance(self.attention, SimulatedSelfAttention):
            wrapped.append((self.attention, "project", self._measure_simulation))
        for owner, name, measure in wrapped:
            setattr(owner, name, functools.partial(self._call, getattr(owner, name), measure))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for owner, name, _ in wrapped:
                delattr(owner, name)

    def _call(
        self, original: Callable[..., Any], measure: Callable[..., None], *args: Any, **options: Any
    ) -> Any:
        measure(*args, **options)
        return original(*args, **options)

    def _take(self, hook: str, batch: int) -> int:
        """Return the number of sequences of this microbatch that belong to the probe."""
        taken = min(batch, self.remaining[hook])
        self.remaining[hook] -= taken
        return taken

    def _measure_result(self, name: str, _module: Any, _inputs: Any, result: Any) -> None:
        hidden_SBH = result[0] if isinstance(result, tuple) else result
        measured = hidden_SBH[:, : self._take(name, hidden_SBH.shape[1])]
        is_sharded = self.layer.config.sequence_parallel
        if measured.numel() and (is_sharded or self.topology.tensor_rank == 0):
            total = measured.double().square().sum().item()
            self.sums.add(LayerSums(squares={name: (total, measured.numel())}))

    def _measure_scores(
        self,
        query_BMSE: torch.Tensor,
        key_BGSE: torch.Tensor,
        _value: torch.Tensor,
        *,
        allowed: torch.Tensor | None = None,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        batch = self._take("scores", query_BMSE.shape[0])
        if not batch:
            return
        readers = query_BMSE.shape[1] // key_BGSE.shape[1]
        length, num_keys = query_BMSE.shape[2], key_BGSE.shape[2]
        scale = self.attention.core_attention.backend.scale
        for start in range(0, length, QUERIES):
            rows = slice(start, min(start + QUERIES, length))
            num_rows = rows.stop - start
            visible = torch.ones(num_rows, num_keys, dtype=torch.bool, device=query_BMSE.device)
            visible = visible.tril(num_keys - length + start) if causal else visible
            if allowed is not None:
                visible = visible & allowed[:batch, 0, rows]
            for index, head in enumerate(self._attended_heads()):
                query = _widened(query_BMSE[:batch, index, rows])
                key = _widened(key_BGSE[:batch, index // readers])
                scores = (scale * query @ key.transpose(1, 2)).masked_fill(~visible, float("-inf"))
                log_weights = scores.log_softmax(dim=-1)
                # 0·log 0 is 0.
                terms = (log_weights.exp() * log_weights).masked_fill(~visible, 0.0)
                heads = {head: (scores.max().item(), -terms.sum().item(), batch * num_rows)}
                self.sums.add(LayerSums(heads=heads))

    def _attended_heads(self) -> list[int]:
        """Return the numbers, in the full layer, of the query heads that this rank attends with."""
        parallel, num_blocks = self.config.parallel, self.attention.core_attention.num_blocks
        heads, sharding = shard_heads(self.config.attention, tensor=parallel.tensor, context=parallel.context)
        # A tensor rank has consecutive heads of each block.
        full = torch.arange(heads.num_queries * parallel.tensor).view(num_blocks, parallel.tensor, -1)
        local = full[:, self.topology.tensor_rank].flatten()
        by_rank = local.view(sharding.num_blocks, parallel.context, -1)
        return [int(number) for number in by_rank[:, self.topology.context_rank].flatten()]

    def _measure_simulation(
        self, hidden_states: torch.Tensor, rope: torch.Tensor | None, *, is_decoding: bool
    ) -> None:
        """Simulate all heads of this context rank's tokens again, with torch's operations."""
        layer: SimulatedSelfAttention = self.attention
        columns_SBW, _ = layer.linear_qkv(hidden_states)
        gathered = layer.gather.gather_columns(columns_SBW.flatten(0, 1))
        batch = columns_SBW.shape[1]
        measured = self._take("simulation", batch)
        if not measured or self.topology.tensor_rank > 0:
            return
        heads = [part.unflatten(0, (-1, batch)) for part in layer.kernels.split_columns(gathered)]
        base_rope, _ = layer._split_rope(rope)
        heads = [layer.apply_rope(part, base_rope) for part in heads[:2]] + heads[2:]
        for name, heads_SBND in zip(NAMES, heads, strict=True):
            self._measure_heads(name, _widened(heads_SBND[:, :measured].flatten(0, 1)))

    def _measure_heads(self, name: str, heads_TND: torch.Tensor) -> None:
        simulation, attention = self.attention.simulation, self.attention.attention
        weights = {
            key: type(part)(*(None if x is None else x.to(heads_TND.dtype) for x in part))
            for key, part in simulation.weights().items()
        }
        simulated = heads_TND.repeat(1, attention.head_expansion, 1)
        if f"heads.{name}" in weights:
            part = weights[f"heads.{name}"]
            units = F.conv1d(heads_TND, part.expand, part.expand_bias, padding=part.expand.shape[-1] // 2)
            self._note_fired(f"heads.{name}", (units > 0).any(dim=0), attention.head_activation)
            simulated = simulate_heads(heads_TND, part, activation=attention.head_activation)
        if f"features.{name}" in weights:
            part = weights[f"features.{name}"]
            units = F.linear(simulated, part.expand, part.expand_bias)
            self._note_fired(
                f"features.{name}", (units > 0).flatten(0, 1).any(dim=0), attention.feature_activation
            )
            simulated = simulate_features(simulated, part, activation=attention.feature_activation)
        blocks = simulated.unflatten(1, (attention.head_expansion, -1))
        pairs = [
            F.cosine_similarity(blocks[:, first], blocks[:, second], dim=-1)
            for first, second in itertools.combinations(range(attention.head_expansion), 2)
        ]
        if pairs:
            cosines = torch.stack(pairs)
            found = (cosines.double().sum().item(), cosines.numel())
            self.sums.add(LayerSums(similarities={name: found}))

    def _note_fired(self, name: str, units: torch.Tensor, activation: str) -> None:
        if activation == "relu":
            self.sums.add(LayerSums(fired={name: units.cpu()}))


def _mean(total: float, count: int, *, root: float = 1.0) -> float | None:
    """Return a mean, or its square root, as JSON allows it."""
    mean = total / count
    return float(mean**root) if math.isfinite(mean) else None


def _widened(heads: torch.Tensor) -> torch.Tensor:
    """Return heads in at least float32."""
    return heads.to(torch.promote_types(heads.dtype, torch.float32))
