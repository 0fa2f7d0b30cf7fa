"""The whole weights of a run's checkpoint, and the config that trained them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sas_megatron.checkpoint.importing import WholeModel
from sas_megatron.checkpoint.manifest import find_checkpoint
from sas_megatron.checkpoint.whole_weights import WholeWeights, load_whole_weights
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.loading import build_run_config
from sas_megatron.config.run import RunConfig


@dataclass(frozen=True)
class RunWeights:
    """Each weight is read when it is asked for; `origin` is the checkpoint."""

    config: RunConfig
    weights: WholeWeights
    origin: str

    def as_model(self) -> WholeModel:
        """As models of other formats are."""
        return WholeModel(self.config.model, self.config.attention, self.weights.items(), self.origin)


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
    tree, weights = load_whole_weights(checkpoint)
    return RunWeights(build_run_config(tree), weights, str(checkpoint.resolve()))
