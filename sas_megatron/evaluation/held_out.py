"""Loss on fixed validation windows, per token and per byte."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sas_megatron.data.batches import ByteLengths
from sas_megatron.data.validation_sets import UNNAMED
from sas_megatron.distributed.topology import Topology
from sas_megatron.model.language_loss import Batch, token_losses

# Runs the model with a forward step on microbatches, and returns the reports of the last stage.
RunForward = Callable[[Callable[..., Any], Iterator[Batch]], list[dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss per token in nats, the number of tokens, and the number of bytes of their text.

    `sets` are the losses of named validation sets, of which this is the loss of all tokens; empty without
    named sets.
    """

    loss: float
    num_tokens: int
    num_bytes: int
    sets: Mapping[str, HeldOutLoss] = field(default_factory=dict)

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
    def results(self) -> dict[str, Any]:
        """The measured values by name in metrics.jsonl; infinite values are None, as JSON requires."""
        values: dict[str, Any] = {f"validation_{name}": value for name, value in self._measured().items()}
        if self.sets:
            values["validation_sets"] = {
                name: {**found._measured(), "num_tokens": found.num_tokens}
                for name, found in self.sets.items()
            }
        return values

    def _measured(self) -> dict[str, float | None]:
        values = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def evaluate_held_out(
    run_forward: RunForward,
    batches_by_set: Mapping[str, Iterator[Batch]],
    *,
    byte_lengths: ByteLengths,
    topology: Topology,
) -> HeldOutLoss:
    """Compute the loss on the batches of all data-parallel ranks.

    Args:
        run_forward: Runs the model on batches of this rank.
        batches_by_set: The batches of this rank by validation set; `UNNAMED` without named sets.
        byte_lengths: Counts the bytes of tokens.
        topology: The process groups.

    Returns:
        The loss of all tokens with those of the named sets, the same on every rank.
    """
    # Summed loss, tokens and bytes of each set.
    totals = torch.zeros(len(batches_by_set), 3, dtype=torch.float64, device=topology.device)
    for index, batches in enumerate(batches_by_set.values()):
        for report in run_forward(functools.partial(_held_out_step, byte_lengths=byte_lengths), batches):
            totals[index] += report["totals"]
    topology.sum_over_data_and_pipeline(totals)
    found = [
        HeldOutLoss(total_loss / num_tokens, int(num_tokens), int(num_bytes))
        for total_loss, num_tokens, num_bytes in totals.tolist()
    ]
    if list(batches_by_set) == [UNNAMED]:
        return found[0]
    return combine_losses(dict(zip(batches_by_set, found, strict=True)))


def combine_losses(sets: Mapping[str, HeldOutLoss]) -> HeldOutLoss:
    """Return the loss of all tokens of the sets: the mean of their losses, weighted by tokens."""
    num_tokens = sum(found.num_tokens for found in sets.values())
    total_loss = math.fsum(found.loss * found.num_tokens for found in sets.values())
    return HeldOutLoss(
        total_loss / num_tokens, num_tokens, sum(found.num_bytes for found in sets.values()), sets
    )


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
