"""The CPU replacements for the CUDA calls of Megatron-core."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from sas_megatron.config.parallel import ParallelConfig
from tests.fork_server import fork_context
from tests.rank_pool import in_layout


def _devices() -> None:
    import torch

    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(3, device=torch.cuda.current_device()).device.type == "cpu"
    torch.cuda.set_device(1)
    torch.cuda.synchronize()
    torch.cuda.synchronize(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.cuda.device(0):
        assert not torch.cuda.is_available()


def _streams_and_events() -> None:
    import torch

    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    assert isinstance(event, torch.cuda.Event)
    assert isinstance(torch.cuda.current_stream(), torch.cuda.Stream)
    assert isinstance(torch.cuda.default_stream(0), torch.cuda.Stream)
    with torch.cuda.stream(stream):
        event.record(stream)
        stream.record_event(event)
        assert isinstance(stream.record_event(), torch.cuda.Stream)
    stream.wait_event(event)
    stream.wait_stream(torch.cuda.current_stream())
    event.wait()
    event.synchronize()
    stream.synchronize()
    assert event.query()


def _profiler_ranges() -> None:
    import torch

    torch.cuda.nvtx.range_push("forward")
    torch.cuda.nvtx.mark("middle")
    torch.cuda.nvtx.range_pop()


def _random_states() -> None:
    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(5)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(5, device="cuda"), first)

    in_layout(ParallelConfig())  # seeds the tracker
    torch.manual_seed(7)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(5)
    assert torch.equal(torch.rand(5), first), "a fork must restore the outer random state"
    with get_cuda_rng_tracker().fork():
        assert not torch.equal(torch.rand(5), inside), (
            "a fork must continue from the state of the previous one"
        )


def _factories() -> None:
    import torch

    tensor = torch.arange(3.0)
    for created in (
        torch.zeros(2, device="cuda"),
        torch.empty(2, 3, device="cuda:0"),
        torch.ones(2, device=torch.device("cuda", 1)),
        torch.tensor([1.5], device="cuda"),
        torch.arange(4, device="cuda"),
        torch.full((2,), 3.0, device="cuda"),
        torch.randn(2, device="cuda"),
        torch.as_tensor([1, 2], device="cuda"),
        torch.zeros_like(tensor, device="cuda"),
        tensor.new_zeros(2, device="cuda"),
    ):
        assert created.device.type == "cpu"
    assert torch.zeros(2, device="meta").device.type == "meta"


def _moves() -> None:
    import torch

    tensor = torch.arange(3.0)
    assert tensor.cuda() is tensor
    for moved in (
        tensor.to("cuda"),
        tensor.to("cuda:0", torch.float64),
        tensor.to(torch.device("cuda")),
        tensor.to(device="cuda", dtype=torch.float64),
        tensor.cuda(0),
        tensor.cuda(non_blocking=True),
    ):
        assert moved.device.type == "cpu"
        assert moved.tolist() == tensor.tolist()
    assert tensor.to("cuda:0", torch.float64).dtype == torch.float64
    assert tensor.to(torch.int64).dtype == torch.int64
    assert tensor.to("meta").device.type == "meta"
    assert tensor.to(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    for module in (torch.nn.Linear(2, 3).cuda(), torch.nn.Linear(2, 3).to("cuda")):
        assert module.weight.device.type == "cpu"
        assert isinstance(module.weight, torch.nn.Parameter)


def _type_names() -> None:
    import torch

    # Megatron-core groups parameters by these names.
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.nn.Parameter(torch.zeros(1)).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.zeros(1).type(dtype=torch.int32).dtype == torch.int32


def _install_again() -> None:
    import torch
    from torch.overrides import _get_current_function_mode_stack

    from sas_megatron.platform import cpu

    before, modes = dict(vars(torch.cuda)), len(_get_current_function_mode_stack())
    assert cpu.install()
    assert all(vars(torch.cuda)[name] is value for name, value in before.items())
    assert len(_get_current_function_mode_stack()) == modes == 1


@pytest.mark.parametrize(
    "check",
    [
        _devices,
        _streams_and_events,
        _profiler_ranges,
        _random_states,
        _factories,
        _moves,
        _type_names,
        _install_again,
    ],
    ids=lambda check: check.__name__.removeprefix("_"),
)
def test_cuda_calls_work_on_the_cpu(ranks: Any, check: Callable[[], None]) -> None:
    ranks(1).run(check)


def _compile() -> list[Any]:
    import torch
    import torch._dynamo

    compiled = torch.compile(lambda x: torch.relu(x) + 1, backend="eager")
    return [compiled(torch.tensor([-1.0, 2.0])).tolist(), torch._dynamo.utils.counters["frames"]["ok"]]


def test_torch_compile_works_with_the_replacements() -> None:
    with ProcessPoolExecutor(1, fork_context()) as process:
        assert process.submit(_compile).result() == [[1.0, 3.0], 1]
