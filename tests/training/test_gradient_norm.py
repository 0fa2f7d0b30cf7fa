"""The gradient norm and clipping: Megatron-core's results, without reading the device for each parameter."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sas_megatron.config.run import RunConfig
from tests.run_configs import small_config
from tests.selection import cases
from tests.training.layouts import ATTENTIONS, SHARDED, TIED, Layout
from tests.training.training_runs import batches_of_step

# Results whose value, or whose size, the host reads from the device.
READING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
READING_METHODS = ("tolist", "numpy", "cpu")


class DeviceReads(TorchDispatchMode):
    """Counts the operations that read a tensor to the host, while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._methods = _ReadingMethods(self.counts)

    def __enter__(self) -> DeviceReads:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READING and not self._methods.assigns_number:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _ReadingMethods(TorchFunctionMode):
    """Counts the methods that read a tensor without dispatching an operation.

    In `tensor[mask] = 0`, torch makes a tensor of the number on the host, and reads that: `assigns_number`.
    """

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts
        self.assigns_number = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING_METHODS:
            self._counts[func.__name__] += 1
        self.assigns_number = func is torch.Tensor.__setitem__ and isinstance(args[2], int | float)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.assigns_number = False


def reads_of_a_step(config: RunConfig) -> tuple[int, Counter[str]]:
    """Return, on a rank, the number of parameters, and the reads of the second step."""
    from sas_megatron.training.build import build_engine
    from sas_megatron.training.step import train_step
    from tests.rank_pool import in_layout

    topology = in_layout(config.parallel)
    engine = build_engine(config)
    num_microbatches = config.training.num_microbatches(topology.data_size)
    for step in range(2):
        # Batches come from the host.
        batches = iter(list(batches_of_step(config, topology, step)))
        with DeviceReads() as reads:
            result = train_step(engine, batches, num_microbatches=num_microbatches, topology=topology)
        assert result.is_applied
        assert result.gradient_norm > config.optimizer.clip_gradient_norm, "nothing was clipped"
    return sum(len(list(chunk.parameters())) for chunk in engine.model_chunks), reads.counts


CLIPPED = {"clip_gradient_norm": 1e-3}
READ_CASES = {
    "mha": Layout(1),
    "sas-gather": Layout(1),
    "sas-all_to_all": Layout(2, {"tensor": 2, "sequence": True}),
    "mla": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}, model=TIED),
    "gqa": Layout(2, optimizer=SHARDED, training={"precision": "bfloat16"}),
}


@pytest.mark.parametrize("name", cases(READ_CASES, default=("sas-all_to_all", "mla", "gqa")))
def test_a_step_reads_the_device_once_however_many_parameters(ranks: Any, name: str) -> None:
    layout = READ_CASES[name]
    layout = Layout(
        layout.world_size,
        layout.parallel,
        {**layout.optimizer, **CLIPPED},
        layout.training,
        {**layout.model, "num_layers": 8},
    )
    for num_parameters, reads in ranks(layout.world_size).run(reads_of_a_step, layout.config(name)):
        assert num_parameters > 25
        assert reads == {"tolist": 1}


def norms_and_clipped_gradients(config: RunConfig) -> tuple[list[float], list[bool]]:
    """Return, on a rank, our norm and Megatron-core's, and whether clipped gradients are equal."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    from sas_megatron.training.build import build_engine
    from sas_megatron.training.gradient_norm import clip_gradients
    from tests.rank_pool import in_layout

    topology = in_layout(config.parallel)
    engine: Any = build_engine(config)
    engine.forward_backward(
        batches_of_step(config, topology, 0),
        num_microbatches=config.training.num_microbatches(topology.data_size),
    )
    norm = float(engine.compute_gradient_norm())
    expected_norm = float(engine.optimizer.get_grad_norm())
    parameters = [
        parameter
        for optimizer in engine.optimizers()
        for parameter in optimizer.get_parameters()
        if parameter.grad is not None
    ]
    before = [parameter.grad.clone() for parameter in parameters]
    equal = []
    for max_norm in (0.5 * norm, 2 * norm):
        clip_gradients(engine.optimizers(), max_norm=max_norm, gradient_norm=norm)
        clipped = [parameter.grad.clone() for parameter in parameters]
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad.copy_(gradient)
        clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=norm)
        equal.append(
            all(torch.equal(left, right.grad) for left, right in zip(clipped, parameters, strict=True))
        )
    return [norm, expected_norm], equal


@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        (1, {}),
        (2, {"parallel": {"tensor": 2}, "attention": ATTENTIONS["sas-gather"]}),
        (2, {"parallel": {"pipeline": 2}, "model": {**TIED, "num_layers": 2}}),
        (
            4,
            {
                "parallel": {"tensor": 2, "sequence": True},
                "optimizer": SHARDED,
                "attention": ATTENTIONS["mla"],
            },
        ),
    ],
    ids=["one rank", "tensor 2", "pipeline 2, tied", "tensor 2, sequence, data 2, distributed"],
)
def test_norm_and_clipping_are_megatron_cores(ranks: Any, world_size: int, sections: dict[str, Any]) -> None:
    config = small_config(**{"optimizer": {"learning_rate": 0.01}, **sections})
    for (norm, expected), equal in ranks(world_size).run(norms_and_clipped_gradients, config):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert equal == [True, True]
