"""`doctor --layout` finds a layer that computes something else on several ranks, and accepts the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FieldError
from sas_megatron.config.loading import dump_yaml
from sas_megatron.preflight.layout_versions import NUM_STEPS, one_process_version, small_version
from tests import small_attentions as small
from tests.end_to_end.test_launching import shell
from tests.fork_server import ForkedCommand
from tests.run_configs import SHIPPED, small_config
from tests.selection import cases, exhaustive
from tests.small_data import SmallData
from tests.tolerances import LOSS_AFTER_FIVE_STEPS, RELATIVE_ERROR, WHOLE_MODEL_GRADIENT

SAS: small.Attention = {**small.SAS_GROUPED, "head_expansion": 2, "exchange": "all_to_all"}
# The authors' output projection starts at 0, which would hide the gradients of the other weights.
TPA: small.Attention = {**small.TPA, "dropout": 0.1}
TENSOR = {"tensor": 2, "sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "tensor 2, sequence": (2, {"attention": SAS, "parallel": TENSOR}),
    "tensor 2, no positions": (2, {"attention": {**SAS, "rotary": "none"}, "parallel": {"tensor": 2}}),
    "data 2, distributed, bfloat16": (
        2,
        {
            "attention": small.GQA,
            "optimizer": {"learning_rate": 0.01, "distributed": True},
            "training": {"precision": "bfloat16"},
        },
    ),
    "pipeline 2 interleaved, tied": (
        2,
        {
            "attention": TPA,
            "model": {"num_layers": 8, "tie_embeddings": True},
            "parallel": {"pipeline": 2, "virtual_pipeline": 2},
        },
    ),
    "DeepSpeed stage 3": (
        2,
        {"attention": SAS, "training": {"engine": "deepspeed"}, "deepspeed": {"zero_stage": 3}},
    ),
    "tensor 2, context 2": (4, {"attention": SAS, "parallel": {"tensor": 2, "context": 2}}),
}


def check(
    folder: Path, world_size: int, *, module: str = "sas_megatron", **sections: Any
) -> tuple[int, dict[str, dict[str, str]]]:
    """Run `doctor --layout` on forked ranks; return its exit status and its findings by check."""
    path = folder / "run.yaml"
    path.write_text(dump_yaml(small_config(**sections)))
    command = ForkedCommand(
        *(folder / "pids", world_size, module, "doctor", "--layout", "--json", path),
        module="tests.end_to_end.fork_launcher",
    )
    try:
        status = command.wait(240)
        record = json.loads(command.output())
        return status, {found["check"]: found for found in record["findings"]}
    finally:
        command.kill()


@pytest.mark.parametrize(
    "case", cases(LAYOUTS, default=("tensor 2, sequence", "pipeline 2 interleaved, tied"))
)
def test_layouts_compute_what_one_process_computes(tmp_path: Path, case: str) -> None:
    world_size, sections = LAYOUTS[case]
    status, found = check(tmp_path, world_size, **sections)
    assert [finding["verdict"] for finding in found.values()] == 3 * ["fine"], found
    assert status == 0
    assert list(found) == ["layout weights", "layout gradients", "layout losses"]
    assert f"{NUM_STEPS} steps as in one process" in found["layout losses"]["observed"]


def test_a_layer_without_its_sum_over_ranks_is_found_and_named(tmp_path: Path) -> None:
    status, found = check(tmp_path, 2, module="tests.preflight.broken_layer", attention=SAS, parallel=TENSOR)
    assert status == 1
    assert found["layout weights"]["verdict"] == "fine"
    gradients = found["layout gradients"]
    assert gradients["verdict"] == "failure"
    first = "gradient of decoder.layers.0.self_attention.simulation.heads."
    assert gradients["observed"].startswith(first)
    assert "parameters differ from those of one process" in gradients["observed"]
    assert "do not train with this layout" in gradients["remedy"]


@exhaustive
def test_torchrun_script_checks_the_layout(small_data: SmallData, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(small_data.run(tmp_path / "run", attention=SAS, parallel=TENSOR)))
    done = shell("launch/torchrun.sh", "2", str(path), CHECK_LAYOUT="1")
    assert done.returncode == 0, done.stderr
    assert "✓ layout gradients" in done.stdout
    assert not (tmp_path / "run").exists(), "it writes nothing"


def test_a_layout_without_a_config_is_refused() -> None:
    refused = CliRunner().invoke(cli, ["doctor", "--layout"])
    assert isinstance(refused.exception, FieldError)
    assert str(refused.exception) == "--layout=True: needs a config; name one: doctor --layout CONFIG"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_has_a_small_version_for_eight_ranks(path: Path) -> None:
    from sas_megatron.config.loading import load_run_config

    config = load_run_config(path)
    world_size = 8 * config.parallel.model_size
    config = config.replaced(
        {"training.micro_batch_size": 1, "training.global_batch_size": 16 * config.parallel.pipeline}
    )
    reduced = small_version(config, world_size=world_size)
    assert reduced.parallel == config.parallel
    assert reduced.attention.query_key_dim == config.attention.query_key_dim
    assert reduced.model.hidden_size <= 256
    alone = one_process_version(reduced)
    assert alone.parallel.model_size == 1
    assert alone.training.global_batch_size == reduced.training.global_batch_size


def test_the_tolerances_are_those_of_the_tests_of_all_layouts() -> None:
    from sas_megatron.preflight.layout_check import TOLERANCES

    assert TOLERANCES["float32"].gradient == WHOLE_MODEL_GRADIENT
    assert TOLERANCES["float32"].loss == LOSS_AFTER_FIVE_STEPS
    assert TOLERANCES["bfloat16"].gradient == RELATIVE_ERROR[torch.bfloat16]
