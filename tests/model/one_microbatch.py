"""A model with uninitialized weights, and a forward pass of one microbatch through one model chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sas_megatron.config.run import RunConfig


@contextlib.contextmanager
def undrawn_weights() -> Iterator[None]:
    """Build models without initializing their weights."""
    from sas_megatron.model import assembly

    initialize = assembly.initialize_weights
    assembly.initialize_weights = lambda *_arguments: None
    try:
        yield
    finally:
        assembly.initialize_weights = initialize


@dataclass(frozen=True)
class Microbatch:
    """A context rank's tokens [B, S/C], and one segment for each sample if document ends reset attention."""

    tokens: torch.Tensor
    segments: Any

    @staticmethod
    def of(config: RunConfig) -> Microbatch:
        batch, length = config.training.micro_batch_size, config.data.sequence_length
        tokens = torch.zeros(batch, length // config.parallel.context, dtype=torch.int64)
        segments = None
        if config.data.reset_at_document_ends:
            from sas_megatron.data.segments import Segments

            segments = Segments.build([[length]] * batch, tokens)
        return Microbatch(tokens, segments)

    def tensors(self) -> list[torch.Tensor]:
        return [self.tokens] if self.segments is None else [self.tokens, self.segments.cu_seqlens_q]

    def pass_through(self, config: RunConfig, chunk: Any) -> torch.Tensor:
        """Return the losses of the last chunk, or hidden states; chunks after the first start from zeros."""
        if not chunk.pre_process:
            rows = self.tokens.shape[1] // (config.parallel.tensor if config.parallel.sequence else 1)
            shape = (rows, self.tokens.shape[0], config.model.hidden_size)
            hidden = torch.zeros(shape, dtype=chunk.config.params_dtype, requires_grad=True)
            chunk.set_input_tensor(hidden)
        output: torch.Tensor = chunk(
            self.tokens, self.tokens, None, labels=self.tokens, packed_seq_params=self.segments
        )
        return output
