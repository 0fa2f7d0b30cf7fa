"""On ranks: models with roughened weights, as if trained, and what they compute."""

from __future__ import annotations

from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from tests.model.model_parts import perturb_weights
from tests.rank_pool import in_layout


def roughened_model(config: RunConfig, tokenizer: Any = None, dtype: torch.dtype | None = None) -> Any:
    """A `TrainedModel` of this rank."""
    from sas_megatron.evaluation.trained_model import TrainedModel
    from sas_megatron.model.assembly import build_gpt_chunks

    topology = in_layout(config.parallel)
    (piece,) = build_gpt_chunks(config, dtype=dtype)
    perturb_weights(piece)
    return TrainedModel(config, piece, tokenizer, topology, step=7)


def whole_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[.., H] -> [.., V], padding columns included, on the last stage."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    part = model.logits(hidden.flatten(0, -2))
    return gather_from_tensor_model_parallel_region(part).unflatten(0, hidden.shape[:-1])


def random_texts(config: RunConfig, lengths: list[int]) -> list[list[int]]:
    """Tokens of sequences, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    size = config.model.vocab_size
    return [torch.randint(size, (length,), generator=generator).tolist() for length in lengths]
