"""Dropout: masks are equal in replicated regions and independent in sharded ones; runs are reproducible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.config.run import RunConfig
from tests.model.model_parts import random_tokens
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import cases
from tests.small_data import SmallData
from tests.training.layouts import ATTENTIONS
from tests.training.test_runs import assert_same_final_state, complete, records


def config_of(**parallel: Any) -> RunConfig:
    return small_config(
        attention=ATTENTIONS["sas-all_to_all"],
        model={"num_layers": 2, "hidden_dropout": 0.5},
        data={"sequence_length": 16},
        parallel=parallel,
    )


def embedding_mask_and_hidden_states(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, on a rank, the elements of the embedding that dropout keeps, and the last hidden states."""
    from sas_megatron.model.assembly import build_gpt_chunks

    topology = in_layout(config.parallel)
    (model,) = build_gpt_chunks(config)
    seen: dict[str, torch.Tensor] = {}
    model.embedding.register_forward_hook(lambda _module, _input, output: seen.update(mask=output != 0))
    model.decoder.layers[-1].register_forward_hook(
        lambda _module, _input, output: seen.update(hidden=output[0].detach())
    )
    local_tokens = random_tokens(config).chunk(topology.context_group.size(), dim=1)[0]
    positions = torch.arange(local_tokens.shape[1]).expand_as(local_tokens)
    model.train()(local_tokens, positions, None)
    return seen["mask"], seen["hidden"]


def test_tensor_ranks_have_equal_masks_for_replicated_activations(ranks: Any) -> None:
    (mask, hidden), (other_mask, other_hidden) = ranks(2).run(
        embedding_mask_and_hidden_states, config_of(tensor=2)
    )
    assert 0.4 < mask.float().mean() < 0.6
    assert torch.equal(mask, other_mask)
    # Each rank has its own mask for its attention heads; the all-reduced sum is the same on both.
    assert torch.equal(hidden, other_hidden)


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2, "sequence": True}, {"context": 2}, {}],
    ids=["tokens of a tensor rank", "tokens of a context rank", "samples of a data rank"],
)
def test_ranks_have_independent_masks_for_sharded_activations(ranks: Any, parallel: dict[str, Any]) -> None:
    (mask, _), (other_mask, _) = ranks(2).run(embedding_mask_and_hidden_states, config_of(**parallel))
    assert mask.shape == other_mask.shape
    # Independent masks agree in half of their elements; the tolerance is 5 standard deviations.
    agreeing = (mask == other_mask).float().mean().item()
    assert abs(agreeing - 0.5) < 5 * 0.5 / mask.numel() ** 0.5


def stage_mask(config: RunConfig) -> torch.Tensor:
    """Return, on a rank, the mask of the first dropout after the seeding."""
    in_layout(config.parallel)
    return torch.nn.functional.dropout(torch.ones(1000), 0.5) != 0


def test_pipeline_stages_have_independent_masks(ranks: Any) -> None:
    first, second = ranks(2).run(stage_mask, config_of(pipeline=2))
    assert abs((first == second).float().mean().item() - 0.5) < 5 * 0.5 / 1000**0.5


REPEATED: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor, sequence, pipeline": (4, {"parallel": {"tensor": 2, "sequence": True, "pipeline": 2}}),
    "context, data": (4, {"parallel": {"context": 2}, "optimizer": {"distributed": True}}),
    "DeepSpeed": (2, {"training": {"engine": "deepspeed"}, "deepspeed": {"zero_stage": 2}}),
    "recompute": (2, {"parallel": {"tensor": 2}, "training": {"recompute": "selective"}}),
}


@pytest.mark.parametrize("layout", cases(REPEATED, default=["tensor, sequence, pipeline", "DeepSpeed"]))
def test_a_run_is_bit_reproducible(ranks: Any, small_data: SmallData, tmp_path: Path, layout: str) -> None:
    world_size, sections = REPEATED[layout]
    training = {"num_steps": 4, **sections.get("training", {})}
    dropout = {"model": {"hidden_dropout": 0.1}, "attention": {"dropout": 0.1}}
    runs = [
        small_data.run(tmp_path / name, **{**sections, "training": training, **dropout})
        for name in ("first", "second")
    ]
    for config in runs:
        ranks(world_size).run(complete, config)
    first, second = runs
    assert_same_final_state(second, first)
    losses = [[record["train_loss"] for record in records(config)] for config in runs]
    assert losses[0] == losses[1]


def test_recomputation_reuses_the_masks_of_the_forward_pass(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    losses = {}
    for recompute in ("none", "selective", "full"):
        config = small_data.run(
            tmp_path / recompute,
            model={"hidden_dropout": 0.1},
            attention={"dropout": 0.1},
            parallel={"tensor": 2, "sequence": True},
            training={"num_steps": 4, "recompute": recompute},
        )
        ranks(2).run(complete, config)
        losses[recompute] = [record["train_loss"] for record in records(config)]
    assert losses["selective"] == pytest.approx(losses["none"], rel=1e-6)
    assert losses["full"] == pytest.approx(losses["none"], rel=1e-6)
