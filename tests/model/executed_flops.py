"""The FLOPs that a training step of one microbatch executes, by pass and cost term, on one rank."""

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
    """While entered, counts FLOPs by pass (`forward`, `again`, `backward`) and term.

    The backward pass of an operation is that operation's term: autograd gives each a number, which its
    node still has when it runs. Within the unfused attention products are scores and values by turns.
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
            name, term = self._place(func)
            self.counts[name][term] += flops
        return result

    def _place(self, func: Any) -> tuple[str, str]:
        node = torch._C._current_autograd_node()
        term = self._tracer.running_term()
        if term is None:
            return "backward", self._term_of_node[node._sequence_nr()]
        if term == "attention" and func.overloadpacket in MATRIX_PRODUCTS:
            term = ("scores", "values")[self._attention_products % 2]
            self._attention_products += 1
        # The operation's own node is the newest: it is made before the operation runs.
        self._term_of_node[torch._C._autograd._get_sequence_nr() - 1] = term
        return ("forward" if node is None else "again"), term


Flops = dict[str, dict[str, int]]


def executed_flops(config: RunConfig) -> Flops:
    """On a rank: of a step of one microbatch, by pass and term, as `torch.utils.flop_counter` counts.

    That is two FLOPs a multiply-add; a convolution counts every tap at every feature, those that
    fall on padding included; biases, norms, softmax and other element-wise work count nothing; scores
    are counted in full, without the causal half.
    """
    in_layout(config.parallel)
    return _executed_by_pieces(config)


def simulated_flops_of_stages(config: RunConfig) -> list[Flops]:
    """In a process that is in no group: the same of each pipeline stage of one copy of the model."""
    from sas_megatron.planning.fake_world import fake_world

    stages, world_size = [], config.parallel.model_size
    for rank in range(world_size):
        with fake_world(config.parallel, rank=rank, world_size=world_size), undrawn_weights():
            stages.append(_executed_by_pieces(config))
    return stages


def _executed_by_pieces(config: RunConfig) -> Flops:
    from sas_megatron.model.assembly import build_gpt_chunks

    pieces = build_gpt_chunks(config)
    microbatch = Microbatch.of(config)
    with FlopCounterMode(display=False) as counter, TermFlops(TermTracer(*pieces)) as flops:
        for piece in pieces:
            microbatch.pass_through(config, piece).sum().backward()
    counted = sum(terms.total() for terms in flops.counts.values())
    # torch's counter has no formula for the CPU's fused attention, and counts nothing.
    fused = sum(terms["attention"] for terms in flops.counts.values())
    assert counted - fused == counter.get_total_flops(), "torch counts something else"
    return {name: dict(terms) for name, terms in flops.counts.items()}
