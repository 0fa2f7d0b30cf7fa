"""Loss on fixed validation windows, per token and per byte."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sas_megatron.data.batches import ByteLengths
from sas_megatron.distributed.topology import Topology
from sas_megatron.model.language_loss import Batch, token_losses

# Runs the model on microbatches with a forward step, and returns the reports of the last stage.
RunForward = Callable[[Callable[..., Any]], list[dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss per token in nats, the number of tokens, and the number of bytes of their text."""

    loss: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss); depends on the tokenizer. Infinite if it exceeds the range of a float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Total loss in bits divided by the number of bytes; comparable between tokenizers."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes

    @property
    def results(self) -> dict[str, float | None]:
        """The measured values by name in metrics.jsonl; infinite values are None, as JSON requires."""
        values = {
            "validation_loss": self.loss,
            "validation_perplexity": self.perplexity,
            "validation_bits_per_byte": self.bits_per_byte,
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def evaluate_held_out(
    run_forward: RunForward, *, byte_lengths: ByteLengths, topology: Topology
) -> HeldOutLoss:
    """Compute the loss on the batches of all data-parallel ranks.

    Args:
        run_forward: Runs the model on the validation batches of this rank.
        byte_lengths: Counts the bytes of tokens.
        topology: The process groups.

    Returns:
        The loss, the same on every rank.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=topology.device)
    for report in run_forward(functools.partial(_held_out_step, byte_lengths=byte_lengths)):
        totals += report["totals"]
    topology.sum_over_data_and_pipeline(totals)
    total_loss, num_tokens, num_bytes = totals.tolist()
    return HeldOutLoss(total_loss / num_tokens, int(num_tokens), int(num_bytes))


def _held_out_step(
    batches: Iterator[Batch], model: Any, *, byte_lengths: ByteLengths
) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Run a forward step of Megatron-core's schedules, which reports the sums of losses, tokens and bytes."""
    batch = next(batches)

    def report_totals(losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        mask = batch["loss_mask"]
        total = (losses_BS * mask).sum(dtype=torch.float64)
        num_bytes = byte_lengths(batch["tokens"], batch["labels"], mask)
        totals = torch.stack([total, mask.sum(dtype=torch.float64), num_bytes.double()])
        return total, mask.sum().to(torch.int), {"totals": totals}

    return token_losses(model, batch), report_totals
