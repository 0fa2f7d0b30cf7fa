"""The commands as a user types them: real processes, real text."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from tests.end_to_end.started_processes import environment_with
from tests.small_data import SmallData

ROOT = Path(__file__).parents[2]


def shell(*command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd or ROOT,
        env=environment_with(**environment),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def config_file(small_data: SmallData, tmp_path: Path) -> Path:
    config = small_data.run(tmp_path / "run", parallel={"tensor": 2}, training={"num_steps": 4})
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    return path


def test_torchrun_script_trains_with_two_processes(config_file: Path, tmp_path: Path) -> None:
    done = shell("launch/torchrun.sh", "2", str(config_file), "logging.interval=2")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "iteration" in line and "lm loss:" in line]
    assert len(lines) == 3, "steps 1, 2 and 4, on one rank only"
    for part in (
        "consumed samples:",
        "elapsed time per iteration (ms):",
        "throughput per GPU (TFLOP/s/GPU):",
    ):
        assert part in lines[0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("processes", "override", "message"),
    [
        ("3", "training.num_steps=4", "world size=3: must be a multiple of 2"),
        ("2", "attention.kernel_size=4", "attention.kernel_size=4: must be odd"),
        ("2", "data.tokenizer=missing.model", "missing.model"),
        ("2", "data.prefixes=[missing]", "missing"),
    ],
)
def test_what_the_user_can_mend_is_said_once_before_any_process_starts(
    config_file: Path, tmp_path: Path, processes: str, override: str, message: str
) -> None:
    done = shell("launch/torchrun.sh", processes, str(config_file), override)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("sas-megatron: error:") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("torchrun.sh", {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0: must be how many processes"),
        ("torchrun.sh", {"GPUS_PER_NODE": "h100"}, "GPUS_PER_NODE=h100: must be how many processes"),
        ("torchrun.sh", {"NNODES": "two"}, "NNODES=two: must be how many nodes"),
        ("torchrun.sh", {"NNODES": "1:"}, "NNODES=1:: must be how many nodes"),
        ("torchrun.sh", {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2: must be below NNODES=2"),
        ("torchrun.sh", {"NNODES": "2", "NODE_RANK": "a"}, "NODE_RANK=a: must be a node's place"),
        ("torchrun.sh", {"MAX_RESTARTS": "x"}, "MAX_RESTARTS=x: must be how often"),
        ("deepspeed.sh", {"GPUS_PER_NODE": "x"}, "GPUS_PER_NODE=x: must be how many processes"),
        ("deepspeed.sh", {"NNODES": "2:3"}, "NNODES=2:3: must be a number"),
    ],
)
def test_cluster_variables_of_another_form_are_told(
    script: str, variables: dict[str, str], message: str
) -> None:
    done = shell(f"launch/{script}", "run.yaml", **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"launch/{script}: error: {message}" in done.stderr


def test_deepspeed_on_one_node_names_a_taken_port_before_it_starts_processes(config_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = shell("launch/deepspeed.sh", "2", str(config_file), MASTER_PORT=port)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"error: MASTER_PORT={port}: cannot be listened at on " in done.stderr


def test_a_bare_process_is_told_how_to_start_two(config_file: Path) -> None:
    done = shell(sys.executable, "-m", "sas_megatron", "train", str(config_file))
    assert done.returncode == 2
    assert "start 2 or 4 processes (launch/torchrun.sh 2 CONFIG)" in done.stderr


def _columns(report: dict[str, Any], name: str) -> list[Any]:
    return [row[name] for row in report["rows"]]


def test_quickstart_ends_in_a_comparison_and_repeats_for_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sas_megatron",
        "quickstart",
        "--directory",
        "here",
        "--corpus-bytes",
        "900000",
    ]
    small = [
        "training.num_steps=6",
        "schedule.warmup_steps=2",
        "evaluation.interval=2",
        "evaluation.num_sequences=4",
    ]
    small += ["data.sequence_length=64", "model.vocab_size=1024", "data.split=[0.8, 0.2]"]
    done = shell(*command, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "Final validation loss" in done.stdout
    assert "At equal FLOPs" in done.stdout
    report = json.loads((tmp_path / "here" / "comparison.json").read_text())
    parameters = _columns(report, "parameters")
    assert abs(parameters[1] / parameters[0] - 1) <= 0.02
    assert (tmp_path / "here" / "comparison.png").stat().st_size > 10_000
    assert "</html>" in (tmp_path / "here" / "comparison.html").read_text()

    again = shell(*command, *small, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "trained already" in again.stdout
    assert "iteration" not in again.stdout

    other = shell(*command, *small, "optimizer.learning_rate=1e-3", cwd=tmp_path)
    assert other.returncode == 2
    assert "holds a run of another config" in other.stderr


SHELL_SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("launch/*.sh", "launch/*.sbatch", "tests/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_scripts_pass_the_shell_linter(script: str) -> None:
    done = shell("shellcheck", "-x", script)
    assert done.returncode == 0, done.stdout


def test_launch_scripts_hold_no_field_of_a_config() -> None:
    sections = "|".join(RunConfig.model_fields)
    for path in sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch")):
        code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        fields = set(re.findall(rf"\b(?:{sections})\.[a-z_]+", "\n".join(code)))
        # A job that is queued again goes on: where a run is, not what it is.
        assert fields <= ({"checkpoint.resume"} if path.name == "slurm_train.sbatch" else set()), path


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "docker_run.sh", "slurm_train.sbatch"])
def test_a_script_without_arguments_says_how_it_is_used(script: str) -> None:
    done = shell(f"launch/{script}")
    assert done.returncode == 2
    assert f"launch/{script}" in done.stderr
    assert "CONFIG [section.field=value ...]" in done.stderr


def test_the_table_of_launchers_names_scripts_and_variables_that_there_are() -> None:
    table = [
        line for line in (ROOT / "launch" / "README.md").read_text().splitlines() if line.startswith("| ")
    ]
    assert len(table) > 10
    for line in table:
        scripts = re.findall(r"\b(?:launch|docker)/[\w.]+\w", line)
        known = "".join((ROOT / script).read_text() for script in scripts)
        for variable in re.findall(r"\b([A-Z_]{3,})=", line):
            assert variable in known, line


def test_the_failing_ranks_traceback_comes_first_and_each_rank_has_a_log(
    config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()  # where the traces of a step are to have a folder
    done = shell(
        *("launch/torchrun.sh", "2", str(config_file), "logging.profile_steps=[2, 2]"),
        LOG_DIR=str(tmp_path / "logs"),
    )
    assert done.returncode == 1
    first, *_ = re.findall(r"^sas-megatron: rank (\d) on .*:\nTraceback", done.stderr, re.MULTILINE)
    assert done.stderr.index("Traceback") == done.stderr.index(
        "Traceback", done.stderr.index("sas-megatron: rank")
    )
    logs = {path.parts[-2]: path.read_text() for path in (tmp_path / "logs").rglob("stderr.log")}
    assert sorted(logs) == ["0", "1"]
    assert "Traceback" in logs[first]
    assert "training stopped after step 2" in "".join(logs.values())
    lines = [line for line in done.stdout.splitlines() if "lm loss:" in line]
    assert lines
    assert all(line.startswith(" iteration") for line in lines), "Megatron's form, with nothing in front"


@pytest.mark.parametrize(
    ("script", "variables", "lacking"),
    [
        ("torchrun", {}, "MASTER_ADDR"),
        ("deepspeed", {}, "NODE_RANK"),
        ("deepspeed", {"NODE_RANK": "1"}, "MASTER_ADDR"),
    ],
)
def test_one_of_several_nodes_is_told_what_it_must_know(
    config_file: Path, script: str, variables: dict[str, str], lacking: str
) -> None:
    done = shell(f"launch/{script}.sh", "1", str(config_file), NNODES="2", **variables)
    assert done.returncode == 2
    assert re.fullmatch(rf"{lacking}: is not set; with NNODES=2 it .*\n", done.stderr)
