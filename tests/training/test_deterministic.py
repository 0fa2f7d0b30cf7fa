"""`training.deterministic=true` reaches torch, NCCL and Megatron-core."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from tests.fork_server import run_command
from tests.small_data import SmallData
from tests.training.test_runs import complete, records


def complete_with_settings(config: RunConfig) -> bool:
    """Run on a rank with the settings that `train` applies; return the embedding's mode."""
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

    from sas_megatron.platform.gpu_settings import apply_gpu_settings

    modes: list[bool] = []
    forward = VocabParallelEmbedding.forward

    def observe(module: Any, *arguments: Any) -> torch.Tensor:
        modes.append(module.deterministic_mode)
        output: torch.Tensor = forward(module, *arguments)
        return output

    VocabParallelEmbedding.forward = observe
    try:
        apply_gpu_settings(config.training)
        complete(config)
        (mode,) = set(modes)
        return mode
    finally:
        VocabParallelEmbedding.forward = forward
        torch.use_deterministic_algorithms(False)


def test_deterministic_runs_learn_as_others_do(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    losses = []
    for deterministic in (True, False):
        config = small_data.run(
            tmp_path / str(deterministic),
            parallel={"tensor": 2},
            training={"num_steps": 5, "micro_batch_size": 4, "deterministic": deterministic},
        )
        assert ranks(2).run(complete_with_settings, config) == [deterministic] * 2
        losses.append([record["train_loss"] for record in records(config)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_train_refuses_an_nccl_algorithm_that_is_not_deterministic(
    small_data: SmallData, tmp_path: Path
) -> None:
    config = small_data.run(tmp_path / "run", training={"deterministic": True})
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    done = run_command("train", path, environment={**os.environ, "NCCL_ALGO": "NVLS"})
    assert done.returncode == 2
    assert "NCCL_ALGO=NVLS: may sum in a varying order" in done.stderr
