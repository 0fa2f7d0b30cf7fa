"""The commands of a user: launch scripts, `train` and `quickstart`, in real processes and with real text."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from tests.end_to_end.jobs import LAUNCHERS, MEGATRON_LINE, TORCHRUN
from tests.end_to_end.started_processes import environment_with
from tests.fork_server import ForkedCommand, run_command
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


@pytest.mark.parametrize(
    ("processes", "override", "message"),
    [
        ("3", "training.num_steps=4", "world size=3: must be a multiple of 2"),
        ("2", "attention.kernel_size=4", "attention.kernel_size=4: must be odd"),
        ("2", "data.tokenizer=missing.model", "missing.model"),
        ("2", "data.prefixes=[missing]", "missing"),
    ],
)
def test_user_errors_are_reported_once_before_any_process_starts(
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
        ("torchrun.sh", {"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0: must be the number of processes"),
        ("torchrun.sh", {"GPUS_PER_NODE": "h100"}, "GPUS_PER_NODE=h100: must be the number of processes"),
        ("torchrun.sh", {"NNODES": "two"}, "NNODES=two: must be the number of nodes"),
        ("torchrun.sh", {"NNODES": "1:"}, "NNODES=1:: must be the number of nodes"),
        ("torchrun.sh", {"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2: must be below NNODES=2"),
        ("torchrun.sh", {"NNODES": "2", "NODE_RANK": "a"}, "NODE_RANK=a: must be the rank of this node"),
        ("torchrun.sh", {"MAX_RESTARTS": "x"}, "MAX_RESTARTS=x: must be the number of restarts"),
        ("deepspeed.sh", {"GPUS_PER_NODE": "x"}, "GPUS_PER_NODE=x: must be the number of processes"),
        ("deepspeed.sh", {"NNODES": "2:3"}, "NNODES=2:3: must be a number"),
    ],
)
def test_invalid_cluster_variables_are_reported(script: str, variables: dict[str, str], message: str) -> None:
    done = shell(f"launch/{script}", "run.yaml", **variables)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"launch/{script}: error: {message}" in done.stderr


def test_deepspeed_on_one_node_names_a_taken_port_before_it_starts_processes(config_file: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = shell("launch/deepspeed.sh", "2", str(config_file), MASTER_PORT=port)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"error: MASTER_PORT={port}: is not available on " in done.stderr


def test_a_process_without_a_launcher_reports_how_to_start_two(config_file: Path) -> None:
    done = run_command("train", config_file)
    assert done.returncode == 2
    assert "start 2 or 4 processes (launch/torchrun.sh 2 CONFIG)" in done.stderr


def train_by_forks(command: list[str], *, env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """Run the command line of torchrun with forked ranks."""
    from torch.distributed.run import get_args_parser

    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    options = get_args_parser().parse_args(command[3:])
    assert (options.standalone, options.module, options.local_addr) == (True, True, "127.0.0.1")
    with tempfile.NamedTemporaryFile() as pids:
        ranks = ForkedCommand(
            *(pids.name, options.nproc_per_node, options.training_script, *options.training_script_args),
            module="tests.end_to_end.fork_launcher",
            environment=env,
        )
        return subprocess.CompletedProcess(command, ranks.wait(240))


def quickstart(launcher: str, directory: Path, *overrides: str) -> tuple[int, str]:
    """Run quickstart; return the exit status and the output with errors."""
    arguments = ["quickstart", "--directory", str(directory), "--corpus-bytes", "900000", *overrides]
    if launcher == TORCHRUN:
        done = shell(sys.executable, "-m", "sas_megatron", *arguments)
        return done.returncode, done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sas_megatron.cli.quickstart.subprocess", SimpleNamespace(run=train_by_forks))
        result = CliRunner().invoke(cli, arguments)
    assert result.exception is None or isinstance(result.exception, UserError | SystemExit), result.exc_info
    status = 2 if isinstance(result.exception, UserError) else result.exit_code
    return status, f"{result.output}{result.exception or ''}"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_quickstart_reports_a_comparison_and_trains_only_once(launcher: str, tmp_path: Path) -> None:
    small = [
        "training.num_steps=6",
        "schedule.warmup_steps=2",
        "evaluation.interval=2",
        "evaluation.num_sequences=4",
    ]
    small += ["data.sequence_length=64", "model.vocab_size=1024", "data.split=[0.8, 0.2]"]
    directory = tmp_path / "quickstart"
    status, output = quickstart(launcher, directory, *small)
    assert status == 0, output
    assert "Final validation loss" in output
    assert "At equal FLOPs" in output
    rows = json.loads((directory / "comparison.json").read_text())["rows"]
    parameters = [row["parameters"] for row in rows]
    assert abs(parameters[1] / parameters[0] - 1) <= 0.02
    assert (directory / "comparison.png").stat().st_size > 10_000
    assert "</html>" in (directory / "comparison.html").read_text()
    metrics = {path: path.read_text() for path in (directory / "runs").glob("*/metrics.jsonl")}
    assert len(metrics) == 2

    status, output = quickstart(launcher, directory, *small)
    assert status == 0, output
    assert output.count("already trained") == 2
    assert "iteration" not in output
    assert {path: path.read_text() for path in metrics} == metrics

    status, output = quickstart(launcher, directory, *small, "optimizer.learning_rate=1e-3")
    assert status == 2
    assert "holds a run of another config" in output


SHELL_SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("launch/**/*.sh", "launch/*.sbatch", "tests/*.sh", ".ci/run")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_scripts_pass_the_shell_linter(script: str) -> None:
    done = shell("shellcheck", "-x", script)
    assert done.returncode == 0, done.stdout


def test_launch_scripts_contain_no_config_fields() -> None:
    sections = "|".join(RunConfig.model_fields)
    for path in sorted(path for path in (ROOT / "launch").rglob("*") if path.suffix in (".sh", ".sbatch")):
        code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        fields = set(re.findall(rf"\b(?:{sections})\.[a-z_]+", "\n".join(code)))
        # Repeated commands, requeued jobs and replaced pods resume, which does not change the results.
        resumes = path.name in ("cluster_variables.sh", "slurm_train.sbatch", "run_pod.sh")
        assert fields <= ({"checkpoint.resume"} if resumes else set()), path


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "docker_run.sh", "slurm_train.sbatch"])
def test_a_script_without_arguments_prints_its_usage(script: str) -> None:
    done = shell(f"launch/{script}")
    assert done.returncode == 2
    assert f"launch/{script}" in done.stderr
    assert "CONFIG [section.field=value ...]" in done.stderr


def test_the_table_of_launchers_names_existing_scripts_and_variables() -> None:
    table = [
        line for line in (ROOT / "launch" / "README.md").read_text().splitlines() if line.startswith("| ")
    ]
    assert len(table) > 10
    for line in table:
        scripts = re.findall(r"\b(?:launch|docker)/[\w./]+\w", line)
        known = "".join((ROOT / script).read_text() for script in scripts)
        for variable in re.findall(r"\b([A-Z_]{3,})=", line):
            assert variable in known, line


@pytest.mark.exhaustive
def test_the_failing_ranks_traceback_comes_first_and_each_rank_has_a_log(
    config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()  # a file at the path of the folder for traces
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
    assert all(MEGATRON_LINE.match(line) for line in lines), "Megatron's form, without a launcher's prefix"


@pytest.mark.parametrize(
    ("script", "variables", "missing"),
    [
        ("torchrun", {}, "MASTER_ADDR"),
        ("deepspeed", {}, "NODE_RANK"),
        ("deepspeed", {"NODE_RANK": "1"}, "MASTER_ADDR"),
    ],
)
def test_one_of_several_nodes_reports_the_variable_that_is_missing(
    config_file: Path, script: str, variables: dict[str, str], missing: str
) -> None:
    done = shell(f"launch/{script}.sh", "1", str(config_file), NNODES="2", **variables)
    assert done.returncode == 2
    assert re.fullmatch(rf"{missing}: is not set; with NNODES=2 it .*\n", done.stderr)
