"""Tests of the command line: exit status, standard error, and imports and time of the help."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import COMMANDS, cli
from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.loading import load_run_config
from sas_megatron.costs.activations import count_peak_activation_bytes
from sas_megatron.costs.communication import count_communication_bytes
from sas_megatron.costs.model_costs import count_forward_flops, count_parameters, count_recompute_flops
from tests.conftest import ROOT

HELP_CPU_SECONDS = 0.5
QUICKSTART = ROOT / "configs" / "quickstart_sas.yaml"


def command(*arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sas_megatron", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def check_refused(done: subprocess.CompletedProcess[str], message: str, folder: Path) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip() == f"sas-megatron: error: {message}"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(folder.iterdir()), "a refused command must not leave files"


def test_invalid_override_ends_training_before_it_starts(tmp_path: Path) -> None:
    check_refused(
        command("train", QUICKSTART, "attention.kernel_size=4", "training.num_steps=50", folder=tmp_path),
        "attention.kernel_size=4: must be odd, so that the convolution keeps head_dim; use 3 or 5",
        tmp_path,
    )


def test_wrong_world_size_ends_training_before_it_starts(tmp_path: Path) -> None:
    check_refused(
        command("train", QUICKSTART, folder=tmp_path, WORLD_SIZE="3", RANK="0"),
        "world size=3: must be a multiple of 2, the ranks of one model (parallel.tensor=2); "
        "start 2 processes (launch/torchrun.sh 2 CONFIG), or change the parallel degrees",
        tmp_path,
    )


def test_only_rank_0_prints_the_error(tmp_path: Path) -> None:
    done = command("train", "missing.yaml", folder=tmp_path, RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["-h"],
        ["--version"],
        ["train", "--help"],
        ["costs", "--help"],
        ["fit", "--help"],
        ["checkpoint", "import", "-h"],
    ],
)
def test_help_imports_neither_torch_nor_pydantic(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom sas_megatron.cli.main import cli\n"
        f"cli.main({arguments!r}, standalone_mode=False)\n"
        "heavy = ('torch', 'megatron', 'pydantic', 'numpy', 'ruamel', 'rich')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "attention", "--repeats", "0"],
        ["bench", "checkpoint", "--directory", "nowhere"],
        ["bench", "checkpoint", "--gigabytes", "-1"],
        ["bench", "loop", "--steps", "0"],
        ["fit", "points.csv", "--hold-out", "1.5"],
        ["fit", "points.csv", "--seed", "-1"],
        ["match", "base.yaml", "--variants", "sas", "--equal", "params", "--tolerance", "-1"],
        ["simulate", "run.yaml", "--world-size", "2", "--search", "--memory-gib", "-1"],
        ["simulate", "run.yaml", "--world-size", "2", "--search", "--top", "0"],
    ],
    ids=" ".join,
)
def test_error_names_the_option_of_an_invalid_number_or_folder(arguments: list[str]) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2
    *_, option, value = arguments
    assert f"Invalid value for '{option}'" in done.output
    assert value in done.output


def test_help_is_fast_and_lists_every_command(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = command("--help", folder=tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert min(seconds) < HELP_CPU_SECONDS, f"{min(seconds):.2f} s of CPU"


def test_costs_prints_json_that_programs_can_read() -> None:
    paths = [str(QUICKSTART), str(ROOT / "configs" / "quickstart_mha.yaml")]
    done = CliRunner().invoke(cli, ["costs", *paths, "--json"])
    assert done.exit_code == 0, done.output
    counted = json.loads(done.stdout)
    assert list(counted) == paths
    for path in paths:
        config = load_run_config(path)
        parameters, flops = count_parameters(config), count_forward_flops(config)
        assert counted[path]["parameters"]["terms"] == parameters
        assert counted[path]["forward_flops_per_token"]["terms"] == flops
        tables = parameters["embedding"] + parameters["head"]
        assert counted[path]["parameters"]["totals"] == {
            "total": sum(parameters.values()),
            "without embeddings": sum(parameters.values()) - tables,
        }
        # Of 256 tokens the average one attends to 128.5.
        skipped = (flops["scores"] + flops["values"]) * (1 - 257 / 512)
        assert counted[path]["forward_flops_per_token"]["totals"] == {
            "total": sum(flops.values()),
            "with the causal half of scores and values": round(sum(flops.values()) - skipped),
            "without embeddings": sum(flops.values()) - flops["head"],
        }
        # Four layers of four heads of 32 features, keys and values, two bytes each.
        assert counted[path]["kv_cache_bytes_per_token"]["totals"] == {"total": 4 * 4 * 32 * 2 * 2}


def test_costs_include_what_a_rank_sends_in_a_world_of_that_size() -> None:
    path = str(ROOT / "configs" / "2.7b" / "sas.yaml")
    done = CliRunner().invoke(cli, ["costs", path, "--world-size", "4", "--json"])
    assert done.exit_code == 0, done.output
    wire = json.loads(done.stdout)[path]["wire_bytes_per_step"]
    sent = count_communication_bytes(load_run_config(path), world_size=4)
    assert wire["terms"]["data: gradients"] == sent["data"]["gradients"] > 0
    assert wire["totals"] == {"total": sum(sum(terms.values()) for terms in sent.values())}


def test_costs_tell_what_is_computed_again_from_the_models_own_work() -> None:
    path = str(ROOT / "configs" / "1.3b" / "sas.yaml")
    config = load_run_config(path)
    for device in ("gpu", "cpu"):
        done = CliRunner().invoke(cli, ["costs", path, "--device", device, "--json"])
        assert done.exit_code == 0, done.output
        counted = json.loads(done.stdout)[path]
        training = counted["training_flops_per_token"]
        again = sum(count_recompute_flops(config, device=device).values())
        assert training["terms"]["recompute"] == again > 0
        assert training["totals"]["of the model"] == 3 * sum(count_forward_flops(config).values())
        kept = count_peak_activation_bytes(config, device=device, num_microbatches=128)
        assert counted["activation_bytes_of_a_rank"]["terms"] == kept


def test_a_world_that_does_not_fit_is_refused_by_costs() -> None:
    done = CliRunner().invoke(cli, ["costs", str(QUICKSTART), "--world-size", "3"])
    assert isinstance(done.exception, FieldError)
    assert str(done.exception).startswith("world size=3: must be a multiple of 2")


def test_costs_are_counted_at_another_sequence_length() -> None:
    done = CliRunner().invoke(cli, ["costs", str(QUICKSTART), "data.sequence_length=1024", "--json"])
    flops = json.loads(done.stdout)[str(QUICKSTART)]["forward_flops_per_token"]["terms"]
    assert flops == count_forward_flops(load_run_config(QUICKSTART), sequence_length=1024)


def test_costs_of_overrides_alone_are_refused() -> None:
    done = CliRunner().invoke(cli, ["costs", "data.sequence_length=1024"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("data.sequence_length=1024: is an override, of no config")


def test_costs_prints_tables_with_totals() -> None:
    done = CliRunner().invoke(cli, ["costs", str(QUICKSTART)])
    assert done.exit_code == 0, done.output
    total = sum(count_parameters(load_run_config(QUICKSTART)).values())
    assert f"{total:,}" in done.stdout


def test_dry_run_prints_the_config_and_its_costs_and_leaves_no_files(tmp_path: Path) -> None:
    done = command("train", QUICKSTART, "model.num_layers=3", "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "num_layers: 3" in done.stdout
    assert "head_simulation" in done.stdout
    assert not list(tmp_path.iterdir())


def test_unwritable_output_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "configs"
    done = command(
        "match", QUICKSTART, "--variants", "mha", "--equal", "params", "--output", output, folder=ROOT
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith(
        f"error: {output}: cannot be written (Not a directory); name another --output\n"
    )
    assert "Traceback" not in done.stderr
