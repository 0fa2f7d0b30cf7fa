"""The search finds the layout that a made-up machine was made for, and says why the others lose."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.errors import UserError
from tests.planning.toy_machines import toy_machine
from tests.run_configs import small_config
from tests.training.layouts import ATTENTIONS


def _config(*, sequence_length: int = 12) -> Any:
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
        training={"global_batch_size": 4, "micro_batch_size": 2},
    )


def _search(sequence_length: int, memory_gib: float) -> Any:
    from sas_megatron.planning.layout_search import search_layouts

    # Slow wires: what is sent decides.
    machine = toy_machine(memory_gib=memory_gib, wire_gigabytes_per_second=1.0)
    return search_layouts(_config(sequence_length=sequence_length), world_size=2, hardware=machine)


@pytest.fixture(scope="module")
def short(simulator: Any) -> Any:
    """The search for short sequences, with room for everything."""
    return simulator(_search, 12, 1.0)


def test_where_activations_are_small_tensor_parallelism_wins(short: Any) -> None:
    best = short.ranked[0]
    assert "parallel.tensor=2" in short.overrides(best)
    assert best.loses_by is None
    assert any("data +" in layout.loses_by for layout in short.ranked[1:])
    seconds = [layout.step.seconds for layout in short.ranked]
    assert seconds == sorted(seconds)
    assert short.num_simulated_families <= short.num_families <= short.num_legal


def test_where_activations_outweigh_gradients_data_parallelism_wins(simulator: Any) -> None:
    search = simulator(_search, 192, 1.0)
    assert not any(override.startswith("parallel.") for override in search.overrides(search.ranked[0]))
    # What the others send alone exceeds it, so they are left out.
    assert search.num_simulated_families < search.num_families


@pytest.mark.exhaustive
def test_without_room_for_the_fastest_the_fastest_that_fits_wins(simulator: Any, short: Any) -> None:
    room = short.ranked[0].peak_bytes - 1
    tight = simulator(_search, 12, room / 2**30)
    assert tight.ranked
    assert all(layout.peak_bytes <= room for layout in tight.ranked)
    fitting = [layout.config for layout in short.ranked if layout.peak_bytes <= room]
    assert tight.ranked[0].config == fitting[0]
    assert tight.ranked[0].config != short.ranked[0].config


def test_every_legal_layout_is_considered_once() -> None:
    from sas_megatron.planning.layout_screening import legal_layouts

    machine = toy_machine(memory_gib=1.0, wire_gigabytes_per_second=1.0)
    layouts = list(legal_layouts(_config(), world_size=8, hardware=machine))
    places = [
        (x.parallel.tensor, x.parallel.context, x.parallel.pipeline, x.training.micro_batch_size)
        for x in layouts
        if x.training.recompute == "none"
    ]
    assert len(set(places)) == len(places)
    # Four heads, four samples, twelve tokens, three layers: eight ranks in these ways alone.
    assert set(places) == {(2, 1, 1, 1), (4, 1, 1, 1), (4, 1, 1, 2), (1, 2, 1, 1), (2, 2, 1, 1), (2, 2, 1, 2)}
    assert {x.training.recompute for x in layouts} == {"none", "selective", "full"}


def test_no_legal_layout_is_said() -> None:
    from sas_megatron.planning.layout_search import search_layouts

    machine = toy_machine(memory_gib=1.0, wire_gigabytes_per_second=1.0)
    with pytest.raises(UserError, match="no layout of this model and batch is legal"):
        search_layouts(_config(), world_size=7, hardware=machine)
