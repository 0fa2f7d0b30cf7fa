"""Probes of a model: equal to an independent computation in float64, and the same in every layout."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.attention import step_definitions as definitions
from tests.model.model_parts import perturb_weights
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import cases
from tests.small_data import SmallData
from tests.training.test_runs import complete, records
from tests.training.training_runs import probe_batches

SEQUENCES = 3
SAS = {**small.SAS_GROUPED, "head_expansion": 2}


def config_of(attention: dict[str, Any], *, num_layers: int = 2, **parallel: Any) -> RunConfig:
    return small_config(
        attention=attention,
        model={"num_layers": num_layers},
        data={"sequence_length": 16},
        parallel=parallel,
        evaluation={"num_sequences": 4, "probe_sequences": SEQUENCES},
        training={"global_batch_size": 8},
    )


class ForwardEngine:
    """Model chunks in float64 and their forward pass, as engines offer them; engines refuse float64."""

    def __init__(self, config: RunConfig) -> None:
        from sas_megatron.model.assembly import build_gpt_chunks

        self.config = config
        self.model_chunks = build_gpt_chunks(config, dtype=torch.float64)
        for chunk in self.model_chunks:
            perturb_weights(chunk)

    @torch.no_grad()
    def forward(self, forward_step: Any, batches: Any, *, num_microbatches: int) -> Any:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=list(itertools.tee(batches, len(self.model_chunks))),
            model=self.model_chunks,
            num_microbatches=num_microbatches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=True,
        )


def probed(config: RunConfig) -> tuple[list[dict[str, Any]], list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return the probe's results, and in one process the input of each attention layer and the weights."""
    from sas_megatron.evaluation.probes import probe_model

    topology = in_layout(config.parallel)
    engine = ForwardEngine(config)
    inputs: list[torch.Tensor] = []
    for chunk in engine.model_chunks:
        for layer in chunk.decoder.layers:
            layer.self_attention.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    found = probe_model(engine, probe_batches(config, topology), config=config, topology=topology)
    weights = {name: parameter.detach() for name, parameter in engine.model_chunks[0].named_parameters()}
    return found, inputs, weights


def probed_in_parts(config: RunConfig) -> Any:
    """Return what `probed` returns, with the scores of at most five queries at once."""
    from sas_megatron.evaluation import probes

    kept, probes.QUERIES = probes.QUERIES, 5
    try:
        return probed(config)
    finally:
        probes.QUERIES = kept


def base_heads(hidden_SBH: torch.Tensor, weights: Any, config: Any) -> dict[str, torch.Tensor]:
    """Return the projected heads [S, B, heads, D]."""
    groups, readers = config.num_key_value_heads, config.num_heads // config.num_key_value_heads
    columns = hidden_SBH @ weights["linear_qkv.weight"].T
    grouped = columns.unflatten(2, (groups, readers + 2, config.head_dim))
    return {
        "query": grouped[..., :-2, :].flatten(2, 3),
        "key": grouped[..., -2, :],
        "value": grouped[..., -1, :],
    }


def expected_scores(query_SBME: torch.Tensor, key_SBGE: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return each head's largest score and mean entropy, query by query."""
    length, batch, heads, width = query_SBME.shape
    readers = heads // key_SBGE.shape[2]
    largest, entropies = [], []
    for head in range(heads):
        scores_of_head, entropies_of_head = [], []
        for sequence, position in itertools.product(range(batch), range(length)):
            keys = key_SBGE[: position + 1, sequence, head // readers]
            scores = keys @ query_SBME[position, sequence, head] / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum()
            scores_of_head.append(float(scores.max()))
            entropies_of_head.append(float(-(weights * weights.log()).sum()))
        largest.append(max(scores_of_head))
        entropies.append(sum(entropies_of_head) / len(entropies_of_head))
    return largest, entropies


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("rotary", ["after", "before"])
def test_the_probe_of_sas_equals_its_definition_in_float64(ranks: Any, rotary: str) -> None:
    config = config_of({**SAS, "rotary": rotary})
    attention: Any = config.attention
    [(found, inputs, all_weights)] = ranks(1).run(probed, config)
    assert [entry["layer"] for entry in found] == [1, 2]
    # Two microbatches of two sequences, of which three sequences are measured.
    hidden = torch.cat([inputs[1], inputs[3]], dim=1)[:, :SEQUENCES]
    prefix = "decoder.layers.1.self_attention."
    weights = {name.removeprefix(prefix): weight for name, weight in all_weights.items() if prefix in name}
    base = base_heads(hidden, weights, attention)
    if rotary == "before":
        base |= {name: definitions.rotate(base[name], attention.rotary_width) for name in ("query", "key")}
    heads, silent, similarity = {}, {}, {}
    for name, heads_SBND in base.items():
        flat = heads_SBND.flatten(0, 1)
        part = f"simulation.heads.{name}."
        units = definitions._convolve(flat, weights[part + "expand"], weights[part + "expand_bias"])
        silent[f"heads.{name}"] = float((units <= 0).all(dim=0).double().mean())
        simulated = definitions.simulate_heads(flat, weights, name)
        if name != "value":
            part = f"simulation.features.{name}."
            units = simulated @ weights[part + "expand"].T + weights[part + "expand_bias"]
            silent[f"features.{name}"] = float((units <= 0).flatten(0, 1).all(dim=0).double().mean())
            simulated = definitions.simulate_features(simulated, weights, name)
        first, second = simulated.chunk(2, dim=1)
        cosines = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
        similarity[name] = float(cosines.mean())
        heads[name] = simulated.unflatten(0, heads_SBND.shape[:2])
    if rotary == "after":
        heads |= {name: definitions.rotate(heads[name], attention.rotary_width) for name in ("query", "key")}
    largest, entropies = expected_scores(heads["query"], heads["key"])
    assert found[1]["largest_score"] == near(largest)
    assert found[1]["mean_entropy"] == near(entropies)
    assert found[1]["silent_units"] == near(silent)
    assert found[1]["copy_similarity"] == near(similarity)


def test_the_probe_of_grouped_attention_equals_its_definition_in_float64(ranks: Any) -> None:
    config = config_of(small.GQA)
    [(found, inputs, all_weights)] = ranks(1).run(probed, config)
    hidden = torch.cat([inputs[0], inputs[2]], dim=1)[:, :SEQUENCES]
    base = base_heads(
        hidden,
        {"linear_qkv.weight": all_weights["decoder.layers.0.self_attention.linear_qkv.weight"]},
        config.attention,
    )
    largest, entropies = expected_scores(
        *(definitions.rotate(base[name], config.attention.rotary_width) for name in ("query", "key"))
    )
    assert found[0]["largest_score"] == near(largest)
    assert found[0]["mean_entropy"] == near(entropies)
    assert found[0]["silent_units"] == found[0]["copy_similarity"] == {}
    assert all(found[0][f"{part}_rms"] > 0 for part in ("residual", "attention", "mlp"))


def test_scores_of_a_long_sequence_are_measured_in_parts(ranks: Any) -> None:
    config = config_of(small.GQA)
    [(at_once, _, _)] = ranks(1).run(probed, config)
    [(in_parts, _, _)] = ranks(1).run(probed_in_parts, config)
    for entry, expected in zip(in_parts, at_once, strict=True):
        assert entry["largest_score"] == near(expected["largest_score"])
        assert entry["mean_entropy"] == near(expected["mean_entropy"])


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "tensor 4": (4, {"tensor": 4}),
    "context 2": (2, {"context": 2}),
    "tensor 2, context 2": (4, {"tensor": 2, "context": 2}),
    "pipeline 2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "data 2": (2, {}),
    "tensor 2, sequence, pipeline 2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
}
ATTENTIONS: dict[str, small.Attention] = {
    "sas": {**small.SAS, "head_expansion": 2},
    "sas-grouped": SAS,
    "sas-multi-query": {**small.SAS, "num_kv_heads": 1},
    "gqa": small.GQA,
    "mla": small.MLA,
}
CASES = {
    f"{layout}-{attention}": (layout, attention)
    for layout, attention in itertools.product(LAYOUTS, ATTENTIONS)
}


@pytest.mark.parametrize(
    "case",
    cases(
        CASES,
        default=(
            "tensor 2-sas-grouped",
            "tensor 2, sequence-sas",
            "tensor 4-sas-multi-query",
            "context 2-sas-grouped",
            "tensor 2, context 2-sas",
            "tensor 2, context 2-gqa",
            "pipeline 2 interleaved-mla",
            "data 2-gqa",
            "tensor 2, sequence, pipeline 2-sas-grouped",
        ),
    ),
)
def test_every_layout_has_the_probe_of_one_process(ranks: Any, case: str) -> None:
    layout, attention = CASES[case]
    world_size, parallel = LAYOUTS[layout]
    [(alone, _, _)] = ranks(1).run(probed, config_of(ATTENTIONS[attention], num_layers=4))
    config = config_of(ATTENTIONS[attention], num_layers=4, **parallel)
    for found, _, _ in ranks(world_size).run(probed, config):
        assert len(found) == 4
        for entry, expected in zip(found, alone, strict=True):
            assert entry.keys() == expected.keys()
            for name, value in expected.items():
                assert entry[name] == near(value), f"{name} of layer {expected['layer']}"


@pytest.mark.parametrize("stage", cases((1, 3), default=(3,)))
def test_deepspeed_has_the_probes_of_megatron_core(
    ranks: Any, small_data: SmallData, tmp_path: Any, stage: int
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "attention": SAS,
        "evaluation": {"interval": 4, "num_sequences": 4, "probe_sequences": 2},
    }
    steps = {"num_steps": 4}
    megatron = small_data.run(tmp_path / "megatron", **sections, training=steps)
    deepspeed = small_data.run(
        tmp_path / "deepspeed",
        **sections,
        training={**steps, "engine": "deepspeed"},
        deepspeed={"zero_stage": stage},
    )
    for config in (megatron, deepspeed):
        ranks(2).run(complete, config)
    (expected,), (found,) = (records(config, "probe") for config in (megatron, deepspeed))
    for entry, of_megatron in zip(found["layers"], expected["layers"], strict=True):
        # A largest score may be near 0.
        assert entry["largest_score"] == pytest.approx(of_megatron["largest_score"], rel=1e-4, abs=1e-5)
        assert entry["copy_similarity"] == pytest.approx(of_megatron["copy_similarity"], rel=1e-4)


def test_more_probe_sequences_than_validation_sequences_are_refused() -> None:
    with pytest.raises(
        FieldError,
        match=r"^evaluation.probe_sequences=5: must be between 0 and evaluation.num_sequences=4; use 2",
    ):
        small_config(evaluation={"num_sequences": 4, "probe_sequences": 5})
