"""The FLOPs that one rank executes in a training step of one microbatch, by pass and cost term."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sas_megatron.config.run import RunConfig
from sas_megatron.planning.operation_meter import FLOP_FORMULAS
from tests.model.one_microbatch import Microbatch, undrawn_weights
from tests.model.term_tracing import TermTracer
from tests.rank_pool import in_layout

aten = torch.ops.aten
MATRIX_PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)


class TermFlops(TorchDispatchMode):
    """Counts FLOPs by pass (`forward`, `again`, `backward`) and term, while entered.

    The backward pass of an operation counts for the term of that operation, which is found by the sequence
    number of its autograd node. In unfused attention, products alternate between scores and values.
    """

    def __init__(self, tracer: TermTracer) -> None:
        super().__init__()
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in ("forward", "again", "backward")}
        self._tracer = tracer
        self._term_of_node: dict[int, str] = {}
        self._attention_products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = FLOP_FORMULAS.get(func.overloadpacket)
        if formula is not None:
            flops = int(formula(*args, **(kwargs or {}), out_val=result))
            name, term = self._classify(func)
            self.counts[name][term] += flops
        return result

    def _classify(self, func: Any) -> tuple[str, str]:
        node = torch._C._current_autograd_node()
        term = self._tracer.running_term()
        if term is None:
            return "backward", self._term_of_node[node._sequence_nr()]
        if term == "attention" and func.overloadpacket in MATRIX_PRODUCTS:
            term = ("scores", "values")[self._attention_products % 2]
            self._attention_products += 1
        # The node of this operation is the newest, since it is created before the operation runs.
        self._term_of_node[torch._C._autograd._get_sequence_nr() - 1] = term
        return ("forward" if node is None else "again"), term


Flops = dict[str, dict[str, int]]


def executed_flops(config: RunConfig) -> Flops:
    """Return the FLOPs of a step of one microbatch on this rank, as `torch.utils.flop_counter` counts.

    A multiply-add is two FLOPs. A convolution counts all taps at all features, padding included. Biases,
    norms, softmax and other element-wise operations are not counted. Scores are counted for all pairs.
    """
    in_layout(config.parallel)
    return _run_model_chunks(config)


def simulated_flops_of_stages(config: RunConfig) -> list[Flops]:
    """Return the FLOPs of each pipeline stage of one model copy, in a process without process groups."""
    from sas_megatron.planning.fake_world import fake_world

    stages, world_size = [], config.parallel.model_size
    for rank in range(world_size):
        with fake_world(config.parallel, rank=rank, world_size=world_size), undrawn_weights():
            stages.append(_run_model_chunks(config))
    return stages


def _run_model_chunks(config: RunConfig) -> Flops:
    from sas_megatron.model.assembly import build_gpt_chunks

    chunks = build_gpt_chunks(config)
    microbatch = Microbatch.of(config)
    with FlopCounterMode(display=False) as counter, TermFlops(TermTracer(*chunks)) as flops:
        for chunk in chunks:
            microbatch.pass_through(config, chunk).sum().backward()
    counted = sum(terms.total() for terms in flops.counts.values())
    # torch's counter has no formula for the CPU's fused attention, and does not count it.
    fused = sum(terms["attention"] for terms in flops.counts.values())
    assert counted - fused == counter.get_total_flops(), "torch counts a different number of FLOPs"
    return {name: dict(terms) for name, terms in flops.counts.items()}
