"""Any layout resumes from checkpoints of any other, with bit-identical states and equal losses."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.saved_runs import (
    read_unsharded_tensors,
    resume,
    train_and_save,
    train_with_initial_weights,
)
from tests.model.model_parts import joined_weights
from tests.selection import cases
from tests.tolerances import LOSS_AFTER_FIVE_STEPS
from tests.training.layouts import ATTENTIONS, OVERLAP, SHARDED, TIED, Layout

STEPS = 2
MORE = 3
FOLDER = f"iter_{STEPS:07d}"


# With four ranks, gqa and sas have fewer key/value heads than ranks; these cases are in the default run.
@pytest.mark.parametrize(
    ("attention", "world_size"),
    cases(
        itertools.product(ATTENTIONS, (2, 4)),
        default=[
            ("mha", 2),
            ("gqa", 4),
            ("mla", 2),
            ("sas-gather", 2),
            ("sas-all_to_all", 4),
            ("mfa", 2),
            ("modified", 4),
            ("diff", 2),
            ("tpa", 2),
        ],
    ),
)
def test_tensor_ranks_save_all_weights_of_every_attention(
    ranks: Any, tmp_path: Path, attention: str, world_size: int
) -> None:
    """Check that no weights are missing, replicated or in another order."""
    from sas_megatron.checkpoint.unsharded_weights import load_unsharded_weights

    config = Layout(world_size, {"tensor": world_size, "sequence": True}, SHARDED).config(attention)
    by_rank = ranks(world_size).run(train_and_save, config, tmp_path, 1)
    expected = joined_weights([weights for _, weights in by_rank])
    tree, weights = load_unsharded_weights(tmp_path / "iter_0000001")
    assert tree == config.model_dump(mode="json")
    assert weights.keys() == expected.keys()
    assert {name: list(shape) for name, shape in weights.shapes.items()} == {
        name: list(tensor.shape) for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    ((one_rank, _),) = ranks(1).run(
        train_with_initial_weights, Layout(1).config(attention), tmp_path / "iter_0000001"
    )
    for name, part in one_rank.items():
        assert torch.equal(part.tensor, expected[name]), f"{name} on one rank"


# A pipeline of two interleaved stages then has one layer per model chunk.
FOUR_LAYERS = {"num_layers": 4}
ALL = Layout(8, {"tensor": 2, "sequence": True, "pipeline": 2, **OVERLAP}, SHARDED)
OTHERS = {
    "one rank": Layout(1, model=FOUR_LAYERS),
    "tensor 4": Layout(4, {"tensor": 4}, model=FOUR_LAYERS),
    "data 4, distributed optimizer": Layout(4, optimizer=SHARDED, model=FOUR_LAYERS),
    "context 2": Layout(2, {"context": 2}, model=FOUR_LAYERS),
    "tensor 2, pipeline 2 interleaved": Layout(4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.fixture(scope="module")
def uninterrupted(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a layout to the losses of an uninterrupted run of the same model on one rank."""

    @functools.cache
    def losses(model: tuple[tuple[str, Any], ...]) -> list[float]:
        config = Layout(1, model=dict(model)).config("sas-all_to_all")
        return ranks(1).run(train_and_save, config, tmp_path_factory.mktemp("uninterrupted"), STEPS + MORE)[
            0
        ][0]

    return lambda layout: losses((*layout.model.items(), ("num_layers", layout.num_layers)))


def assert_resumes(ranks: Any, saved: Path, layout: Layout, expected: list[float], again: Path) -> None:
    """Resume on `layout`, save to `again`, and compare tensors and losses."""
    path = saved / FOLDER
    by_rank = ranks(layout.world_size).run(resume, layout.config("sas-all_to_all"), path, STEPS, MORE, again)
    before, after = read_unsharded_tensors(path), read_unsharded_tensors(again / FOLDER)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    for losses in by_rank:
        assert losses == pytest.approx(expected[STEPS:], rel=LOSS_AFTER_FIVE_STEPS)


@pytest.fixture(scope="module")
def saved_by_eight_ranks(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps on eight ranks with all kinds of parallelism and the distributed optimizer."""
    folder = tmp_path_factory.mktemp("all")
    ranks(8).run(train_and_save, ALL.config("sas-all_to_all"), folder, STEPS)
    return folder


@pytest.mark.parametrize("name", cases(OTHERS, default=OTHERS.keys() - {"one rank", "context 2"}))
def test_other_layouts_resume_from_eight_ranks(
    ranks: Any, uninterrupted: Any, saved_by_eight_ranks: Path, tmp_path: Path, name: str
) -> None:
    assert_resumes(ranks, saved_by_eight_ranks, OTHERS[name], uninterrupted(ALL), tmp_path)


def test_eight_ranks_resume_from_one(ranks: Any, uninterrupted: Any, tmp_path: Path) -> None:
    ranks(1).run(
        train_and_save, Layout(1, model=FOUR_LAYERS).config("sas-all_to_all"), tmp_path / "one", STEPS
    )
    assert_resumes(ranks, tmp_path / "one", ALL, uninterrupted(ALL), tmp_path / "again")


def test_tied_embeddings_are_saved_once_and_loaded_on_both_stages(
    ranks: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    # The vocabulary is large enough that the table is sharded over the data ranks. Both stages must
    # shard it identically.
    model = {**TIED, "vocab_size": 597}
    uneven = {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3}
    tied = Layout(4, uneven, SHARDED, model=model)
    ranks(4).run(train_and_save, tied.config("sas-all_to_all"), tmp_path / "tied", STEPS)
    assert "output_layer.weight" not in read_unsharded_tensors(tmp_path / "tied" / FOLDER)
    expected = uninterrupted(tied)
    assert_resumes(
        ranks, tmp_path / "tied", Layout(1, model={**model, **FOUR_LAYERS}), expected, tmp_path / "one"
    )
    assert_resumes(ranks, tmp_path / "one", tied, expected, tmp_path / "again")


def test_float32_main_weights_of_bfloat16_survive_resharding_between_optimizers(
    ranks: Any, tmp_path: Path
) -> None:
    bfloat16 = {"precision": "bfloat16"}
    layouts = [
        Layout(2, {"tensor": 2}, training=bfloat16),
        Layout(4, {"tensor": 2, "sequence": True}, SHARDED, training=bfloat16),
        Layout(2, optimizer=SHARDED, training=bfloat16),
        Layout(1, training=bfloat16),
    ]
    ranks(2).run(train_and_save, layouts[0].config("tpa"), tmp_path / "0", STEPS)
    expected = read_unsharded_tensors(tmp_path / "0" / FOLDER)
    main = expected["optimizer.state.fp32_param.embedding.word_embeddings.weight"]
    weight = expected["embedding.word_embeddings.weight"]
    assert main.dtype == torch.float32
    assert not torch.equal(main, weight.float())
    for index, layout in enumerate(layouts[1:]):
        path = tmp_path / str(index) / FOLDER
        ranks(layout.world_size).run(resume, layout.config("tpa"), path, STEPS, 0, tmp_path / str(index + 1))
        found = read_unsharded_tensors(tmp_path / str(index + 1) / FOLDER)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} after layout {index + 1}"


@pytest.mark.parametrize("stage", cases([1, 3], default=[3]))
def test_each_engine_loads_weights_that_the_other_saved(ranks: Any, tmp_path: Path, stage: int) -> None:
    megatron = Layout(4, {"tensor": 2}, SHARDED)
    deepspeed = Layout(4, {"tensor": 2, "sequence": True}, deepspeed={"zero_stage": stage})
    for folder, first, second in (("0", megatron, deepspeed), ("1", deepspeed, megatron)):
        by_rank = ranks(4).run(train_and_save, first.config("sas-gather"), tmp_path / folder, STEPS)
        path = tmp_path / folder / FOLDER
        expected = read_unsharded_tensors(path)
        for name, tensor in joined_weights([weights for _, weights in by_rank[:2]]).items():
            assert torch.equal(tensor, expected[name]), f"{name} in the checkpoint"
        outcomes = ranks(4).run(train_with_initial_weights, second.config("sas-gather"), path)
        weights = joined_weights([weights for weights, _ in outcomes[:2]])
        for name, tensor in weights.items():
            assert torch.equal(tensor, expected[name]), name
        ((_, losses),) = ranks(1).run(train_with_initial_weights, Layout(1).config("sas-gather"), path)
        for _, found in outcomes:
            assert found == pytest.approx(losses, rel=LOSS_AFTER_FIVE_STEPS)


def test_megatron_core_reads_the_tensors(ranks: Any, tmp_path: Path) -> None:
    config = Layout(2, {"tensor": 2}).config("sas-gather")
    ranks(2).run(train_and_save, config, tmp_path, STEPS)
    expected = read_unsharded_tensors(tmp_path / FOLDER)
    for tensors in ranks(1).run(load_with_megatron, tmp_path / FOLDER):
        assert {name for name in tensors if not name.startswith("random.")} == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name


def load_with_megatron(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that Megatron-core reads from a checkpoint."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    return {name: tensor for name, tensor in load_plain_tensors(str(path)).items() if torch.is_tensor(tensor)}
