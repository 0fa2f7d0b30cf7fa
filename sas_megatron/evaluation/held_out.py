"""Loss on fixed validation windows, by token and by byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sas_megatron.data.batches import ByteLengths
from sas_megatron.model.language_loss import Batch
from sas_megatron.parallel.topology import Topology


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss by token in nats, and the bytes that the same tokens stand for."""

    loss: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """e to the loss by token; depends on the tokenizer."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Total loss in bits over total bytes; comparable between tokenizers."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes


@torch.no_grad()
def evaluate_held_out(
    model: Any, batches: Iterator[Batch], *, byte_lengths: ByteLengths, topology: Topology
) -> HeldOutLoss:
    """Loss over the batches of all data-parallel ranks; the model is left in training mode."""
    totals = torch.zeros(3, dtype=torch.float64, device=topology.device)
    model.eval()
    for batch in batches:
        losses = model(
            batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"]
        )
        mask = batch["loss_mask"]
        totals[0] += (losses * mask).sum(dtype=torch.float64)
        totals[1] += mask.sum()
        totals[2] += byte_lengths(batch["labels"])
    model.train()
    dist.all_reduce(totals, group=topology.data_group)
    total_loss, num_tokens, num_bytes = totals.tolist()
    return HeldOutLoss(total_loss / num_tokens, int(num_tokens), int(num_bytes))
