"""The state of a trainer as plain containers, and back; exact on the same layout."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from sas_megatron.training.assembly import Trainer
from sas_megatron.training.metrics import Progress


def capture_state(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """Weights, optimizer with its float32 copies, schedule and progress of this rank."""
    return {
        "model": [_weights(chunk) for chunk in trainer.model_chunks],
        "optimizer": [
            {
                "inner": optimizer.optimizer.state_dict(),
                "main": [p.detach() for p in _main_parameters(optimizer)],
            }
            for optimizer in _optimizers(trainer)
        ],
        "schedule_steps": trainer.schedule.num_steps,
        "progress": asdict(progress),
    }


@torch.no_grad()
def restore_state(trainer: Trainer, state: dict[str, Any]) -> Progress:
    """Puts a captured state into a freshly assembled trainer; returns its progress."""
    for chunk, weights in zip(trainer.model_chunks, state["model"], strict=True):
        for name, parameter in chunk.module.named_parameters():
            parameter.copy_(weights[name])
    for optimizer, saved in zip(_optimizers(trainer), state["optimizer"], strict=True):
        optimizer.optimizer.load_state_dict(saved["inner"])
        for parameter, main in zip(_main_parameters(optimizer), saved["main"], strict=True):
            parameter.copy_(main)
    trainer.schedule.step(state["schedule_steps"])
    return Progress(**state["progress"])


def _weights(chunk: Any) -> dict[str, torch.Tensor]:
    # Parameters and not the state dictionary: Megatron-core's holds opaque extra states beside them.
    return {name: parameter.detach() for name, parameter in chunk.module.named_parameters()}


def _optimizers(trainer: Trainer) -> list[Any]:
    return list(getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]))


def _main_parameters(optimizer: Any) -> list[torch.Tensor]:
    """What the inner AdamW updates: the weights, their float32 copies, or this rank's shards of those."""
    return [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
