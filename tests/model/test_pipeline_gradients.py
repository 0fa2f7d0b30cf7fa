"""Two pipeline stages give the gradients of one process in float64, for every kind with all modifiers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.model.model_parts import WeightPart, joined_weights, perturb_weights, weight_parts
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import cases
from tests.tolerances import assert_near
from tests.training.training_runs import batches_of_step

HEADWISE = {**small.MODIFIERS, "output_gate": "headwise"}
ATTENTIONS: dict[str, small.Attention] = {
    "mha": {**small.MHA, **HEADWISE},
    "gqa": {**small.GQA, **small.MODIFIERS},
    "mqa": {**small.MQA, **HEADWISE},
    "diff": {**small.DIFF_GROUPED, **HEADWISE},
    "mla": {**small.MLA, **small.MODIFIERS},
    "mfa": {**small.MFA, **HEADWISE},
    "tpa": {**small.TPA, **small.MODIFIERS},
    "sas": {**small.SAS_GROUPED, "head_expansion": 2, **HEADWISE},
    "sas, rotary before": {**small.SAS, "simulation_bias": False, "rotary": "before", **small.MODIFIERS},
}
LAYOUTS: dict[str, dict[str, int]] = {
    "stages": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "virtual_pipeline": 2},
}


def gradients(config: RunConfig) -> dict[str, WeightPart]:
    """Return this rank's gradients of the summed loss of a step, in float64, which engines do not support."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from sas_megatron.model.assembly import build_gpt_chunks
    from sas_megatron.model.language_loss import forward_step

    topology = in_layout(config.parallel)
    chunks = build_gpt_chunks(config, dtype=torch.float64)
    for chunk in chunks:
        perturb_weights(chunk)
        chunk.config.calculate_per_token_loss = True
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(itertools.tee(batches_of_step(config, topology, 0), len(chunks))),
        model=chunks,
        num_microbatches=config.training.num_microbatches(1),
        seq_length=config.data.sequence_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=False,
    )
    return weight_parts(chunks, lambda parameter: parameter.grad)


@pytest.mark.parametrize(
    ("layout", "attention"),
    cases(
        list(itertools.product(LAYOUTS, ATTENTIONS)),
        default=[("stages" if number % 2 else "interleaved", name) for number, name in enumerate(ATTENTIONS)],
    ),
)
def test_pipeline_stages_have_the_gradients_of_one_process(ranks: Any, layout: str, attention: str) -> None:
    alone, staged = (
        small_config(
            attention=ATTENTIONS[attention],
            model={"num_layers": 4},
            parallel=parallel,
            training={"global_batch_size": 8},
        )
        for parallel in ({}, LAYOUTS[layout])
    )
    expected = joined_weights(ranks(1).run(gradients, alone))
    seen: set[str] = set()
    for parts in ranks(2).run(gradients, staged):
        of_stage = joined_weights([parts])
        assert not seen & of_stage.keys()
        seen |= of_stage.keys()
        for name, gradient in of_stage.items():
            assert expected[name].norm() > 0, f"{name} has no effect"
            assert_near(gradient, expected[name], torch.float64, f"gradient of {name}")
    assert seen == expected.keys()
