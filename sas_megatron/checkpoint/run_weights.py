"""The whole weights of a run's checkpoint, and the config that trained them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sas_megatron.checkpoint.importing import UnshardedModel
from sas_megatron.checkpoint.manifest import find_checkpoint
from sas_megatron.checkpoint.unsharded_weights import UnshardedWeights, load_unsharded_weights
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.loading import build_run_config
from sas_megatron.config.run import RunConfig


@dataclass(frozen=True)
class RunWeights:
    """Each weight is read when it is asked for; `origin` is the checkpoint."""

    config: RunConfig
    weights: UnshardedWeights
    origin: str

    def as_model(self) -> UnshardedModel:
        """As models of other formats are."""
        return UnshardedModel(self.config.model, self.config.attention, self.weights.items(), self.origin)


def open_run_weights(path: Path) -> RunWeights:
    """Verifies every file of a checkpoint, of any layout and engine, and opens its weights.

    Args:
        path: A run's directory, of which the newest checkpoint is taken, or a checkpoint.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise FileProblem(
            path, "holds no checkpoint", "name a run's directory, or a folder in its checkpoints/"
        )
    tree, weights = load_unsharded_weights(checkpoint)
    return RunWeights(build_run_config(tree), weights, str(checkpoint.resolve()))
