"""With `data.reset_at_document_ends`, a model's loss and gradients are those of its documents, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.model.model_parts import WeightPart, joined_weights, perturb_weights, weight_parts
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import cases
from tests.tolerances import (
    LOSS_AFTER_FIVE_STEPS,
    WHOLE_MODEL_GRADIENT,
    assert_near,
    assert_within,
)
from tests.training.layouts import LAYOUTS as TRAINED_LAYOUTS
from tests.training.training_runs import take_steps, tensor_groups

# Ends of documents in samples of 16 tokens: documents of one token, boundaries at the edges of context shards
# (chunks of 4 tokens on two ranks, of 2 on four), one within, and a document longer than its sample.
ENDS = [[0, 3, 8], [], [7, 8, 15], [4]]
LENGTH = 16


class DocumentSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random samples with documents that end after the tokens of `ENDS`, read by Megatron-core's function."""

    def __init__(self, config: RunConfig) -> None:
        self.vocab_size = config.model.vocab_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

        generator = torch.Generator().manual_seed(index)
        text = torch.randint(1, self.vocab_size, (LENGTH + 1,), generator=generator)
        text[ENDS[index % len(ENDS)]] = 0
        tokens, labels = text[:-1], text[1:]
        # Documents are separated by positions; the mask is what this package no longer builds.
        _, loss_mask, positions = _get_ltor_masks_and_position_ids(tokens, 0, True, False, False, False)
        return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": positions}


def batches_of(config: RunConfig, topology: Any, *, reset: bool = True) -> Iterator[Any]:
    """Return this rank's microbatches of the four samples."""
    from sas_megatron.data.batches import microbatches

    return microbatches(
        DocumentSamples(config),
        first_sample=0,
        num_samples=len(ENDS),
        num_microbatches=len(ENDS) // config.training.micro_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        data_rank=0,
        data_size=1,
        device=topology.device,
        context_group=topology.context_group,
        with_segments=reset,
    )


def build_chunks(config: RunConfig) -> list[Any]:
    from sas_megatron.model.assembly import build_gpt_chunks

    chunks = build_gpt_chunks(config, dtype=torch.float64)
    for chunk in chunks:
        perturb_weights(chunk)
        chunk.config.calculate_per_token_loss = True
    return chunks


def documents_one_by_one(config: RunConfig) -> tuple[float, dict[str, WeightPart]]:
    """Return the summed loss and the gradients of each document in a pass of its own, without segments."""
    from sas_megatron.model.language_loss import token_losses

    topology = in_layout(config.parallel)
    (chunk,) = build_chunks(config)
    total = 0.0
    for batch in batches_of(config, topology, reset=False):
        for row, positions in enumerate(batch["position_ids"]):
            starts = (positions == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], LENGTH], strict=True):
                document = {name: value[row : row + 1, start:end] for name, value in batch.items()}
                loss = token_losses(chunk, document).sum()
                loss.backward()
                total += loss.item()
    return total, weight_parts([chunk], lambda parameter: parameter.grad)


def documents_in_samples(config: RunConfig) -> tuple[float, dict[str, WeightPart], int, int]:
    """Return this rank's loss and gradients of the samples, by Megatron-core's schedule of the layout."""
    import itertools

    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from sas_megatron.model.language_loss import forward_step

    topology = in_layout(config.parallel)
    chunks = build_chunks(config)
    batches = itertools.tee(batches_of(config, topology), len(chunks))
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(batches),
        model=chunks,
        num_microbatches=len(ENDS) // config.training.micro_batch_size,
        seq_length=LENGTH,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=False,
    )
    # The reductions of the engines, over tensor ranks with sequence parallelism and over context ranks.
    for parameter in itertools.chain(*(chunk.parameters() for chunk in chunks)):
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())
        dist.all_reduce(parameter.grad, group=topology.context_group)
    total = torch.tensor(float(sum(report["loss"][0] for report in reports)), dtype=torch.float64)
    dist.all_reduce(total, group=topology.context_group)
    gradients = weight_parts(chunks, lambda parameter: parameter.grad)
    return total.item(), gradients, topology.tensor_rank, topology.pipeline_rank * 8 + topology.context_rank


ATTENTIONS: dict[str, small.Attention] = {
    "mha": small.MHA,
    "gqa": {**small.GQA, **small.MODIFIERS},
    "mqa": small.MQA,
    "mla": small.MLA,
    "mfa": small.MFA,
    "tpa": {**small.TPA, "initialization": "normal"},
    "diff": small.DIFF_GROUPED,
    "sas": {**small.SAS, "head_expansion": 2, "exchange": "gather"},
    "sas-modified": {**small.SAS_GROUPED, **small.MODIFIERS, "exchange": "all_to_all"},
    # Without biases: without a later rotation, one of all keys has no effect, and a gradient of 0.
    "sas-before": {**small.SAS_GROUPED, "rotary": "before", "simulation_bias": False},
}
ATTENTIONS |= {
    f"{name}-window": {**ATTENTIONS[name], "window_size": 3, "window_pattern": ["window", "full", "window"]}
    for name in ("gqa", "mla", "sas")
}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one rank": ({}, {}),
    "one rank, full recompute": ({}, {"recompute": "full"}),
    "one rank, selective recompute": ({}, {"recompute": "selective"}),
    "tensor 2, sequence": ({"tensor": 2, "sequence": True}, {}),
    "context 2": ({"context": 2}, {}),
    "context 4": ({"context": 4}, {}),
    "pipeline 2, interleaved": ({"pipeline": 2, "virtual_pipeline": 2}, {}),
    "pipeline 2, uneven": ({"pipeline": 2, "first_stage_layers": 1}, {"recompute": "full"}),
    "tensor 2, sequence, context 2": ({"tensor": 2, "sequence": True, "context": 2}, {}),
}
CASES = [(layout, name) for layout in LAYOUTS for name in ATTENTIONS]
# Every attention and every layout.
DEFAULT = [
    (list(LAYOUTS)[number % len(LAYOUTS)], list(ATTENTIONS)[number % len(ATTENTIONS)])
    for number in range(len(ATTENTIONS))
]


def config_of(attention: str, layout: str) -> RunConfig:
    parallel, training = LAYOUTS[layout]
    return small_config(
        attention=ATTENTIONS[attention],
        # Megatron-core's own cross entropy is float32.
        model={"num_layers": 4, "output_loss": "chunked"},
        data={"sequence_length": LENGTH, "reset_at_document_ends": True},
        parallel=parallel,
        training={"micro_batch_size": 2, "global_batch_size": 4, **training},
    )


@pytest.mark.parametrize(("layout", "attention"), cases(CASES, default=DEFAULT))
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(
    ranks: Any, layout: str, attention: str
) -> None:
    [(loss, expected)] = ranks(1).run(documents_one_by_one, config_of(attention, "one rank"))
    config = config_of(attention, layout)
    by_rank = ranks(config.parallel.model_size).run(documents_in_samples, config)
    groups: dict[int, list[Any]] = {}
    for result in sorted(by_rank, key=lambda result: result[2]):
        groups.setdefault(result[3], []).append(result)
    seen: set[str] = set()
    for results in groups.values():
        gradients = joined_weights([part for _, part, _, _ in results])
        for name, gradient in gradients.items():
            assert_near(gradient, expected[name].tensor, torch.float64, f"gradient of {name}")
        seen |= gradients.keys()
    assert seen == expected.keys()
    losses = [total for total, *_ in by_rank if total]
    assert losses == [pytest.approx(loss, rel=1e-12)] * len(losses)
    assert losses


SEPARATED: dict[str, Any] = {
    "data.reset_at_document_ends": True,
    "attention.window_size": 5,
    "attention.window_pattern": ["full", "window"],
}


@pytest.mark.parametrize("name", cases(TRAINED_LAYOUTS, default=["DeepSpeed stage 1, tensor 2, context 2"]))
def test_every_layout_and_engine_trains_on_documents_like_one_process(ranks: Any, name: str) -> None:
    layout = TRAINED_LAYOUTS[name]
    single = layout.single_process("sas-gather").replaced(SEPARATED)
    [expected] = ranks(1).run(take_steps, single)
    by_rank = ranks(layout.world_size).run(take_steps, layout.config("sas-gather").replaced(SEPARATED))
    for group in tensor_groups(by_rank):
        for parameter, gradient in joined_weights([steps.gradients for steps in group]).items():
            expected_gradient = expected.gradients[parameter].tensor
            assert_within(WHOLE_MODEL_GRADIENT, gradient, expected_gradient, f"gradient of {parameter}")
    for steps in by_rank:
        assert steps.losses == pytest.approx(expected.losses, rel=LOSS_AFTER_FIVE_STEPS)


class LargestSquare(TorchDispatchMode):
    """Finds the largest second-largest axis of all tensors that operations return."""

    largest, operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                side = sorted(value.shape)[-2]
                if side > self.largest:
                    self.largest, self.operation = side, str(func)
        return result


def largest_square(config: RunConfig) -> tuple[int, str]:
    """Return the side of the largest square in a tensor of a step, and the operation that returned it."""
    from sas_megatron.data.batches import microbatches
    from sas_megatron.model.assembly import build_gpt_chunks
    from sas_megatron.model.language_loss import token_losses

    topology = in_layout(config.parallel)
    (chunk,) = build_gpt_chunks(config)
    length = config.data.sequence_length
    tokens = torch.arange(length) % config.model.vocab_size
    positions = torch.cat([torch.arange(size) for size in (1, length // 2, length - length // 2 - 1)])
    documents = {"tokens": tokens, "labels": tokens, "loss_mask": tokens.float(), "position_ids": positions}
    whole = {**documents, "position_ids": torch.arange(length)}
    with LargestSquare() as squares:
        for samples in ([documents, whole], [whole, whole]):
            (batch,) = microbatches(
                samples,  # type: ignore[arg-type]
                first_sample=0,
                num_samples=2,
                num_microbatches=1,
                micro_batch_size=2,
                data_rank=0,
                data_size=1,
                device=topology.device,
                with_segments=config.data.reset_at_document_ends,
            )
            token_losses(chunk, batch).sum().backward()
    return squares.largest, squares.operation


@pytest.mark.parametrize("window", [{}, {"window_size": 70}], ids=["full", "window"])
@pytest.mark.parametrize(
    "attention", [small.MHA, {**small.GQA, "backend": "fused"}, small.SAS, small.MLA], ids=str
)
def test_no_tensor_has_a_row_and_a_column_for_each_token(
    ranks: Any, attention: small.Attention, window: dict[str, int]
) -> None:
    length = 512
    config = small_config(
        attention={**attention, **window},
        data={"sequence_length": length, "reset_at_document_ends": True},
    )
    [(side, operation)] = ranks(1).run(largest_square, config)
    assert 0 < side < length // 2, operation


@pytest.mark.parametrize(
    ("field", "sections"),
    [
        (r"data\.reset_at_document_ends", {"data": {"reset_at_document_ends": True}}),
        (r"attention\.window_size", {}),
    ],
    ids=str,
)
def test_cudnn_is_refused_with_segments_or_windows(field: str, sections: dict[str, Any]) -> None:
    window = {} if sections else {"window_size": 4}
    cudnn = {"kind": "mha", "num_heads": 4, "head_dim": 8, "backend": "cudnn", **window}
    with pytest.raises(FieldError, match=rf"^attention\.backend=cudnn: does not support {field}; use auto "):
        small_config(attention=cudnn, training={"precision": "bfloat16"}, **sections)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_size": 0}, r"window_size=0: must be positive"),
        ({"window_pattern": ["full"]}, r"window_pattern=\['full'\]: requires attention\.window_size"),
        ({"window_size": 4, "window_pattern": ["full"]}, "window_pattern=.*must contain a layer with a"),
        ({"window_size": 4, "window_pattern": []}, r"window_pattern=\[\]: must contain a layer with a"),
        (
            {"window_size": 4, "window_pattern": ["window", "full", "full"]},
            r"window_pattern=.*has 3 entries, more than model\.num_layers=2; use 2 or fewer",
        ),
    ],
    ids=str,
)
def test_windows_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=rf"^attention\.{message}"):
        small_config(attention={**small.MHA, **fields})
