"""Any layout resumes from the checkpoint of any other: every weight and moment to the bit, and the losses."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.saved_runs import begin_with_weights, resume, train_and_save, whole_tensors
from tests.model.model_parts import joined_weights
from tests.selection import cases
from tests.tolerances import LOSS_AFTER_FIVE_STEPS
from tests.training.layouts import ATTENTIONS, OVERLAP, SHARDED, TIED, Layout

STEPS = 2
MORE = 3
FOLDER = f"iter_{STEPS:07d}"


# Four ranks are more than the key/value heads of some: those in the default run.
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
            ("tpa", 2),
        ],
    ),
)
def test_every_attention_saved_by_tensor_ranks_is_whole(
    ranks: Any, tmp_path: Path, attention: str, world_size: int
) -> None:
    """In particular: nothing is left out, replicated, doubled or out of order."""
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
    ((alone, _),) = ranks(1).run(begin_with_weights, Layout(1).config(attention), tmp_path / "iter_0000001")
    for name, part in alone.items():
        assert torch.equal(part.tensor, expected[name]), f"{name} on one rank"


# As many as a pipeline of two interleaved stages has pieces.
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
def alone(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`alone(layout)`: the losses of one process that is not interrupted."""

    @functools.cache
    def losses(model: tuple[tuple[str, Any], ...]) -> list[float]:
        config = Layout(1, model=dict(model)).config("sas-all_to_all")
        return ranks(1).run(train_and_save, config, tmp_path_factory.mktemp("alone"), STEPS + MORE)[0][0]

    return lambda layout: losses((*layout.model.items(), ("num_layers", layout.num_layers)))


def assert_resumes(ranks: Any, saved: Path, layout: Layout, expected: list[float], again: Path) -> None:
    path = saved / FOLDER
    by_rank = ranks(layout.world_size).run(resume, layout.config("sas-all_to_all"), path, STEPS, MORE, again)
    before, after = whole_tensors(path), whole_tensors(again / FOLDER)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    for losses in by_rank:
        assert losses == pytest.approx(expected[STEPS:], rel=LOSS_AFTER_FIVE_STEPS)


@pytest.fixture(scope="module")
def saved_by_all(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of eight ranks: tensor, sequence, pipeline, data, distributed optimizer."""
    folder = tmp_path_factory.mktemp("all")
    ranks(8).run(train_and_save, ALL.config("sas-all_to_all"), folder, STEPS)
    return folder


@pytest.mark.parametrize("name", cases(OTHERS, default=OTHERS.keys() - {"one rank", "context 2"}))
def test_other_layouts_resume_from_eight_ranks(
    ranks: Any, alone: Any, saved_by_all: Path, tmp_path: Path, name: str
) -> None:
    assert_resumes(ranks, saved_by_all, OTHERS[name], alone(ALL), tmp_path)


def test_eight_ranks_resume_from_one(ranks: Any, alone: Any, tmp_path: Path) -> None:
    ranks(1).run(
        train_and_save, Layout(1, model=FOUR_LAYERS).config("sas-all_to_all"), tmp_path / "one", STEPS
    )
    assert_resumes(ranks, tmp_path / "one", ALL, alone(ALL), tmp_path / "again")


def test_tied_embeddings_are_saved_once_and_loaded_twice(ranks: Any, alone: Any, tmp_path: Path) -> None:
    # So large that the data ranks share it; both stages must cut it alike.
    model = {**TIED, "vocab_size": 597}
    uneven = {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3}
    tied = Layout(4, uneven, SHARDED, model=model)
    ranks(4).run(train_and_save, tied.config("sas-all_to_all"), tmp_path / "tied", STEPS)
    assert "output_layer.weight" not in whole_tensors(tmp_path / "tied" / FOLDER)
    expected = alone(tied)
    assert_resumes(
        ranks, tmp_path / "tied", Layout(1, model={**model, **FOUR_LAYERS}), expected, tmp_path / "one"
    )
    assert_resumes(ranks, tmp_path / "one", tied, expected, tmp_path / "again")


def test_bfloat16_keeps_its_float32_weights_between_plain_and_distributed_optimizers(
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
    expected = whole_tensors(tmp_path / "0" / FOLDER)
    main = expected["optimizer.state.fp32_param.embedding.word_embeddings.weight"]
    weight = expected["embedding.word_embeddings.weight"]
    assert main.dtype == torch.float32
    assert not torch.equal(main, weight.float())
    for index, layout in enumerate(layouts[1:]):
        path = tmp_path / str(index) / FOLDER
        ranks(layout.world_size).run(resume, layout.config("tpa"), path, STEPS, 0, tmp_path / str(index + 1))
        found = whole_tensors(tmp_path / str(index + 1) / FOLDER)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name} after layout {index + 1}"


@pytest.mark.parametrize("stage", cases([1, 3], default=[3]))
def test_weights_pass_between_the_engines(ranks: Any, tmp_path: Path, stage: int) -> None:
    megatron = Layout(4, {"tensor": 2}, SHARDED)
    deepspeed = Layout(4, {"tensor": 2, "sequence": True}, deepspeed={"zero_stage": stage})
    for folder, first, second in (("0", megatron, deepspeed), ("1", deepspeed, megatron)):
        by_rank = ranks(4).run(train_and_save, first.config("sas-gather"), tmp_path / folder, STEPS)
        path = tmp_path / folder / FOLDER
        expected = whole_tensors(path)
        for name, tensor in joined_weights([weights for _, weights in by_rank[:2]]).items():
            assert torch.equal(tensor, expected[name]), f"{name} as it is saved"
        outcomes = ranks(4).run(begin_with_weights, second.config("sas-gather"), path)
        weights = joined_weights([weights for weights, _ in outcomes[:2]])
        for name, tensor in weights.items():
            assert torch.equal(tensor, expected[name]), name
        ((_, losses),) = ranks(1).run(begin_with_weights, Layout(1).config("sas-gather"), path)
        for _, found in outcomes:
            assert found == pytest.approx(losses, rel=LOSS_AFTER_FIVE_STEPS)


def test_megatron_core_reads_the_tensors_itself(ranks: Any, tmp_path: Path) -> None:
    config = Layout(2, {"tensor": 2}).config("sas-gather")
    ranks(2).run(train_and_save, config, tmp_path, STEPS)
    expected = whole_tensors(tmp_path / FOLDER)
    for tensors in ranks(1).run(megatron_tensors, tmp_path / FOLDER):
        assert {name for name in tensors if not name.startswith("random.")} == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name


def megatron_tensors(path: Path) -> dict[str, torch.Tensor]:
    """On a rank."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    return {name: tensor for name, tensor in load_plain_tensors(str(path)).items() if torch.is_tensor(tensor)}
