"""Functions for ranks: models with roughened weights instead of trained ones, and their logits."""

from __future__ import annotations

from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from tests.model.model_parts import perturb_weights
from tests.rank_pool import in_layout


def roughened_model(config: RunConfig, tokenizer: Any = None, dtype: torch.dtype | None = None) -> Any:
    """Return the local `TrainedModel` after `perturb_weights`."""
    from sas_megatron.evaluation.trained_model import TrainedModel
    from sas_megatron.model.assembly import build_gpt_chunks

    topology = in_layout(config.parallel)
    (model_chunk,) = build_gpt_chunks(config, dtype=dtype)
    perturb_weights(model_chunk)
    return TrainedModel(config, model_chunk, tokenizer, topology, step=7)


def gather_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits [.., V] of hidden states [.., H], with the padded vocabulary. Last stage only."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    local = model.logits(hidden.flatten(0, -2))
    return gather_from_tensor_model_parallel_region(local).unflatten(0, hidden.shape[:-1])


def random_texts(config: RunConfig, lengths: list[int]) -> list[list[int]]:
    """Return random token sequences, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    size = config.model.vocab_size
    return [torch.randint(size, (length,), generator=generator).tolist() for length in lengths]
