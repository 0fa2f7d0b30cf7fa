"""Dropout knows the layout: replicated regions draw alike, sharded ones apart, and runs repeat to the bit."""

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


def kept_and_hidden(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """On a rank: which elements of the embedding dropout keeps, and the hidden states after all layers."""
    from sas_megatron.model.assembly import build_gpt_chunks

    topology = in_layout(config.parallel)
    (model,) = build_gpt_chunks(config)
    seen: dict[str, torch.Tensor] = {}
    model.embedding.register_forward_hook(lambda _module, _input, output: seen.update(kept=output != 0))
    model.decoder.layers[-1].register_forward_hook(
        lambda _module, _input, output: seen.update(hidden=output[0].detach())
    )
    mine = random_tokens(config).chunk(topology.context_group.size(), dim=1)[0]
    model.train()(mine, torch.arange(mine.shape[1]).expand_as(mine), None)
    return seen["kept"], seen["hidden"]


def test_tensor_ranks_drop_the_same_of_what_they_all_hold(ranks: Any) -> None:
    (kept, hidden), (kept_there, hidden_there) = ranks(2).run(kept_and_hidden, config_of(tensor=2))
    assert 0.4 < kept.float().mean() < 0.6
    assert torch.equal(kept, kept_there)
    # Attention drops other weights on each rank, and the sum over the ranks is the same on both.
    assert torch.equal(hidden, hidden_there)


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2, "sequence": True}, {"context": 2}, {}],
    ids=["tokens of a tensor rank", "tokens of a context rank", "samples of a data rank"],
)
def test_ranks_drop_apart_in_what_each_holds_alone(ranks: Any, parallel: dict[str, Any]) -> None:
    (kept, _), (kept_there, _) = ranks(2).run(kept_and_hidden, config_of(**parallel))
    assert kept.shape == kept_there.shape
    # Of independent masks a half agrees; 5 standard deviations of that.
    agreeing = (kept == kept_there).float().mean().item()
    assert abs(agreeing - 0.5) < 5 * 0.5 / kept.numel() ** 0.5


def mask_of_stage(config: RunConfig) -> torch.Tensor:
    """On a rank: what the first dropout after the seeding would keep, as its first layer draws it."""
    in_layout(config.parallel)
    return torch.nn.functional.dropout(torch.ones(1000), 0.5) != 0


def test_stages_of_a_pipeline_drop_apart(ranks: Any) -> None:
    first, second = ranks(2).run(mask_of_stage, config_of(pipeline=2))
    assert abs((first == second).float().mean().item() - 0.5) < 5 * 0.5 / 1000**0.5


REPEATED: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor, sequence, pipeline": (4, {"parallel": {"tensor": 2, "sequence": True, "pipeline": 2}}),
    "context, data": (4, {"parallel": {"context": 2}, "optimizer": {"distributed": True}}),
    "DeepSpeed": (2, {"training": {"engine": "deepspeed"}, "deepspeed": {"zero_stage": 2}}),
    "recompute": (2, {"parallel": {"tensor": 2}, "training": {"recompute": "selective"}}),
}


@pytest.mark.parametrize("layout", cases(REPEATED, default=["tensor, sequence, pipeline", "DeepSpeed"]))
def test_a_run_repeats_to_the_bit(ranks: Any, small_data: SmallData, tmp_path: Path, layout: str) -> None:
    world_size, sections = REPEATED[layout]
    training = {"num_steps": 4, **sections.get("training", {})}
    dropout = {"model": {"hidden_dropout": 0.1}, "attention": {"dropout": 0.1}}
    runs = [
        small_data.run(tmp_path / name, **{**sections, "training": training, **dropout})
        for name in ("once", "again")
    ]
    for config in runs:
        ranks(world_size).run(complete, config)
    once, again = runs
    assert_same_final_state(again, once)
    losses = [[record["train_loss"] for record in records(config)] for config in runs]
    assert losses[0] == losses[1]


def test_recomputation_drops_what_the_forward_pass_dropped(
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
