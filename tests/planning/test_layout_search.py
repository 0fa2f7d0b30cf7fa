"""The search finds the layout that suits a hypothetical machine best, and reports why the others lose."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.platform.device import prepare_device
from tests.planning.toy_machines import toy_machine
from tests.run_configs import small_config
from tests.selection import exhaustive
from tests.training.layouts import ATTENTIONS


def _config(*, sequence_length: int = 12, batch_size: int = 4) -> Any:
    return small_config(
        model={
            "num_layers": 3,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "vocab_size": 64,
            "vocab_multiple": 8,
        },
        attention={**ATTENTIONS["mha"], "head_dim": 16},
        data={"sequence_length": sequence_length},
        training={"global_batch_size": batch_size, "micro_batch_size": 2},
    )


class _InThisProcess(concurrent.futures.Executor):
    """A pool of processes that runs each job in the process that submits it."""

    def __init__(self, _workers: int, _context: Any, *, initializer: Callable[[], Any]) -> None:
        assert initializer is prepare_device

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Any:
        job: concurrent.futures.Future[Any] = concurrent.futures.Future()
        job.set_result(function(*arguments, **options))
        return job


def _search(*, memory_gib: float = 1.0, recomputes: bool = True, **sizes: int) -> Any:
    """Search on a machine with slow links, so that communication decides.

    The process must not have joined a process group.
    """
    from sas_megatron.planning import layout_screening, layout_search

    machine = toy_machine(memory_gib=memory_gib)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", _InThisProcess)
        patch.setattr(os, "cpu_count", lambda: 1)
        if not recomputes:
            patch.setattr(layout_screening, "RECOMPUTED_SHARE", {"none": 0.0})
        return layout_search.search_layouts(_config(**sizes), world_size=2, hardware=machine)


def _search_with_a_pool(sequence_length: int) -> Any:
    """Search with a real pool of one process."""
    from sas_megatron.planning.layout_search import search_layouts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        return search_layouts(_config(sequence_length=sequence_length), world_size=2, hardware=toy_machine())


def _assert_tensor_parallelism_wins(search: Any) -> None:
    best = search.ranked[0]
    assert "parallel.tensor=2" in search.overrides(best)
    assert best.loses_by is None
    assert any("data +" in layout.loses_by for layout in search.ranked[1:])
    seconds = [layout.step.seconds for layout in search.ranked]
    assert seconds == sorted(seconds)
    assert search.num_estimated_families <= search.num_families <= search.num_legal


def test_where_activations_are_small_tensor_parallelism_wins(separate_process: Any) -> None:
    search = separate_process(functools.partial(_search, recomputes=False, batch_size=2))
    _assert_tensor_parallelism_wins(search)
    # Context, tensor and data parallelism; the rough cost of the last exceeds the best time.
    assert search.num_families == 3
    assert search.num_estimated_families == 2


def test_where_activations_outweigh_gradients_data_parallelism_wins(separate_process: Any) -> None:
    search = separate_process(_search_with_a_pool, 192)
    assert not any(override.startswith("parallel.") for override in search.overrides(search.ranked[0]))
    # The communication of the others alone takes longer, so they are not estimated.
    assert search.num_estimated_families < search.num_families


@exhaustive
def test_if_the_fastest_layout_does_not_fit_the_fastest_that_fits_wins(separate_process: Any) -> None:
    unlimited = separate_process(_search)
    _assert_tensor_parallelism_wins(unlimited)
    limit = unlimited.ranked[0].peak_bytes - 1
    tight = separate_process(functools.partial(_search, memory_gib=limit / 2**30))
    assert tight.ranked
    assert all(layout.peak_bytes <= limit for layout in tight.ranked)
    fitting = [layout.config for layout in unlimited.ranked if layout.peak_bytes <= limit]
    assert tight.ranked[0].config == fitting[0]
    assert tight.ranked[0].config != unlimited.ranked[0].config


def test_every_legal_layout_is_considered_once() -> None:
    from sas_megatron.planning.layout_screening import legal_layouts

    layouts = list(legal_layouts(_config(), world_size=8, hardware=toy_machine()))
    degrees = [
        (x.parallel.tensor, x.parallel.context, x.parallel.pipeline, x.training.micro_batch_size)
        for x in layouts
        if x.training.recompute == "none"
    ]
    assert len(set(degrees)) == len(degrees)
    # Four heads, four samples, twelve tokens and three layers allow only these layouts on eight ranks.
    assert set(degrees) == {
        (2, 1, 1, 1),
        (4, 1, 1, 1),
        (4, 1, 1, 2),
        (1, 2, 1, 1),
        (2, 2, 1, 1),
        (2, 2, 1, 2),
    }
    assert {x.training.recompute for x in layouts} == {"none", "selective", "full"}


def test_the_lack_of_a_legal_layout_is_an_error() -> None:
    from sas_megatron.planning.layout_search import search_layouts

    with pytest.raises(UserError, match="no layout of this model and batch is legal"):
        search_layouts(_config(), world_size=7, hardware=toy_machine())
