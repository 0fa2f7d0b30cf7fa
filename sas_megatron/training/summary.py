"""The contents of run.json (where a run came from) and summary.json (its results)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.costs.parameters import count_parameters
from sas_megatron.data.epochs import DataUse
from sas_megatron.data.token_files import load_manifest, name_token_files
from sas_megatron.distributed.topology import Topology
from sas_megatron.evaluation.held_out import HeldOutLoss
from sas_megatron.fault_tolerance.stop_request import RunExit
from sas_megatron.platform.device import describe_machine, peak_memory_bytes
from sas_megatron.training.metrics import Progress, Throughput
from sas_megatron.training.run_files import describe_software
from sas_megatron.training.starting_point import StartingPoint
from sas_megatron.training.step import StepResult


def describe_provenance(
    config: RunConfig, topology: Topology, start: StartingPoint, data_use: DataUse
) -> dict[str, Any]:
    """Return this session's entry of run.json: machine, software, layout, initial weights, corpus and epochs.

    Raises:
        FileProblem: The manifest of the token files cannot be read.
    """
    return {
        "machine": describe_machine(topology.device),
        **describe_software(),
        "world_size": topology.world_size,
        "tensor_parallel": config.parallel.tensor,
        "context_parallel": config.parallel.context,
        "pipeline_parallel": config.parallel.pipeline,
        "data_parallel": topology.data_size,
        "initial_weights": None if start.initial_weights is None else start.initial_weights.describe(),
        "branched_from": None if start.branch is None else str(start.branch.checkpoint),
        # Epochs of the complete run.
        "data": data_use.record(),
        "corpus": {
            name: load_manifest(prefix).model_dump(mode="json")
            for prefix, name in name_token_files(config.data.prefixes).items()
        },
        # The token files of named validation sets.
        "validation_sets": {
            name: {prefix: load_manifest(prefix).model_dump(mode="json") for prefix in prefixes}
            for name, prefixes in (config.evaluation.sets or {}).items()
        },
    }


@dataclass(frozen=True)
class SessionResults:
    """The results of this session: the part of a run from its start, or from a resume, to its end."""

    run_exit: RunExit
    seconds: float
    # The last step; None if the session made none.
    last_step: StepResult | None
    # The evaluation after the last step; None if it is left to the resumed run.
    held_out: HeldOutLoss | None
    # One entry for each group of ranks that sent the same; None if it was not counted.
    bytes_sent: list[dict[str, Any]] | None
    health: dict[str, Any]


def build_summary(
    config: RunConfig,
    topology: Topology,
    progress: Progress,
    results: SessionResults,
    *,
    data_use: DataUse,
) -> dict[str, Any]:
    """Return the contents of summary.json."""
    position = Throughput(config, world_size=topology.world_size).position(progress)
    held_out = {} if results.held_out is None else results.held_out.results
    last_step = results.last_step
    return {
        # Schema 2 renamed `wire_bytes_sent` to `communication_bytes_sent`; schema 3 added the epochs, and
        # schema 4 the named validation sets.
        "schema": 4,
        "exit_reason": results.run_exit.reason,
        "steps": progress.step,
        "tokens": position["consumed_tokens"],
        # How many times the training part that the run repeats most often was read, and the validation part.
        "epochs": data_use.epochs_at(progress.step),
        "validation_epochs": data_use.validation_epochs,
        "training_flops": position["training_flops"],
        "training_flops_per_token": count_training_flops(config),
        "parameters": count_parameters(config),
        "training_seconds": progress.training_seconds,
        # From here on, a resumed run reports the values of its last session.
        "total_seconds": results.seconds,
        "median_step_seconds": progress.median_step_seconds(),
        "peak_memory_bytes": peak_memory_bytes(topology.device),
        "final_train_loss": None if last_step is None or not last_step.is_finite else last_step.loss,
        "final_validation_loss": held_out.get("validation_loss"),
        "best_validation_loss": progress.best_validation_loss,
        "validation_perplexity": held_out.get("validation_perplexity"),
        "validation_bits_per_byte": held_out.get("validation_bits_per_byte"),
        # The losses of named validation sets; the losses above are those of all their tokens.
        "validation_sets": held_out.get("validation_sets"),
        "world_size": topology.world_size,
        "communication_bytes_sent": results.bytes_sent,
        "health": results.health,
    }
