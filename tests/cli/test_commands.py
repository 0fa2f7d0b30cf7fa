"""Tests of the command line: exit status, standard error, and imports and time of the help."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sas_megatron.cli.costs import format_amount
from sas_megatron.cli.main import COMMANDS, cli
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.loading import dump_yaml, load_run_config
from sas_megatron.costs.activations import count_peak_activation_bytes
from sas_megatron.costs.communication import count_communication_bytes
from sas_megatron.costs.flops import count_forward_flops, count_recompute_flops
from sas_megatron.costs.parameters import count_parameters
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
        "attention.kernel_size=4: must be odd, so that the convolution preserves head_dim; use 3 or 5\n"
        f"sas-megatron: try: sas-megatron train {QUICKSTART} training.num_steps=50 attention.kernel_size=5",
        tmp_path,
    )


def test_wrong_world_size_ends_training_before_it_starts(tmp_path: Path) -> None:
    check_refused(
        command("train", QUICKSTART, folder=tmp_path, WORLD_SIZE="3", RANK="0"),
        "world size=3: must be a multiple of 2, the ranks of one model (parallel.tensor=2); "
        "start 2 processes (launch/torchrun.sh 2 CONFIG), or change the parallel degrees\n"
        "sas-megatron: try: torchrun --standalone --nproc-per-node 2 -m sas_megatron train "
        f"{QUICKSTART}",
        tmp_path,
    )


def test_only_rank_0_of_a_launcher_prints_the_error(tmp_path: Path) -> None:
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = command("train", "missing.yaml", folder=tmp_path, **launched)
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["costs", "missing.yaml"], {"RANK": "1", "WORLD_SIZE": "2"}),
        (["data", "inspect", "missing"], {"RANK": "3", "WORLD_SIZE": "4"}),
        (["train", "missing.yaml"], {"RANK": "1", "WORLD_SIZE": "2"}),
        # A command that does not join the ranks of the launcher that started its shell.
        (["fit", "missing.csv"], {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}),
        (["checkpoint", "verify", "missing"], {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_rank_that_a_cluster_operator_sets_silences_no_error(
    arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    done = command(*arguments, folder=tmp_path, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("sas-megatron: error: missing")


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


def commands_below(command: click.Command, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the names of a command and of all its subcommands."""
    yield names
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            subcommand = command.get_command(click.Context(command), name)
            assert subcommand is not None, name
            yield from commands_below(subcommand, (*names, name))


def test_every_help_fits_80_columns_in_complete_sentences_without_python_sections() -> None:
    for names in commands_below(cli):
        done = CliRunner().invoke(cli, [*names, "--help"], terminal_width=80)
        assert done.exit_code == 0, names
        _, *lines = done.output.splitlines()
        assert max(map(len, lines)) <= 80, names
        assert not [line for line in lines if line.endswith("...") or "Raises:" in line], names


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "attention", "--repeats", "0"],
        ["bench", "checkpoint", "--directory", "nowhere"],
        ["bench", "checkpoint", "--gigabytes", "-1"],
        ["bench", "loop", "--steps", "0"],
        ["fit", "points.csv", "--seed", "-1"],
        ["match", "base.yaml", "--variants", "sas", "--equal", "params", "--tolerance", "-1"],
        ["estimate", "run.yaml", "--world-size", "2", "--search", "--memory-gib", "-1"],
        ["estimate", "run.yaml", "--world-size", "2", "--search", "--top", "0"],
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


def test_costs_prints_terms_and_totals_as_json() -> None:
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
        # With 256 tokens, a token attends to 128.5 tokens on average.
        skipped = (flops["scores"] + flops["values"]) * (1 - 257 / 512)
        assert counted[path]["forward_flops_per_token"]["totals"] == {
            "total": sum(flops.values()),
            "with the causal half of scores and values": round(sum(flops.values()) - skipped),
            "without embeddings": sum(flops.values()) - flops["head"],
        }
        # Four layers of four heads of 32 features, for keys and for values, of two bytes each.
        assert counted[path]["kv_cache_bytes_per_token"]["totals"] == {"total": 4 * 4 * 32 * 2 * 2}


def test_costs_include_the_communication_of_a_rank_for_the_given_world_size() -> None:
    path = str(ROOT / "configs" / "2.7b" / "sas.yaml")
    done = CliRunner().invoke(cli, ["costs", path, "--world-size", "4", "--json"])
    assert done.exit_code == 0, done.output
    counted = json.loads(done.stdout)[path]["communication_bytes_per_step"]
    sent = count_communication_bytes(load_run_config(path), world_size=4)
    assert counted["terms"]["data: gradients"] == sent["data"]["gradients"] > 0
    assert counted["totals"] == {"total": sum(sum(terms.values()) for terms in sent.values())}


def test_costs_separate_recomputation_from_model_flops() -> None:
    path = str(ROOT / "configs" / "1.3b" / "sas.yaml")
    config = load_run_config(path)
    for device in ("gpu", "cpu"):
        done = CliRunner().invoke(cli, ["costs", path, "--device", device, "--json"])
        assert done.exit_code == 0, done.output
        counted = json.loads(done.stdout)[path]
        training = counted["training_flops_per_token"]
        recomputed = sum(count_recompute_flops(config, device=device).values())
        assert training["terms"]["recompute"] == recomputed > 0
        assert training["totals"]["of the model"] == 3 * sum(count_forward_flops(config).values())
        saved = count_peak_activation_bytes(config, device=device, num_microbatches=128)
        assert counted["activation_bytes_of_a_rank"]["terms"] == saved


def test_costs_reject_a_world_size_that_does_not_fit_the_layout() -> None:
    done = CliRunner().invoke(cli, ["costs", str(QUICKSTART), "--world-size", "3"])
    assert isinstance(done.exception, FieldError)
    assert str(done.exception).startswith("world size=3: must be a multiple of 2")


def test_costs_are_counted_at_another_sequence_length() -> None:
    done = CliRunner().invoke(cli, ["costs", str(QUICKSTART), "data.sequence_length=1024", "--json"])
    flops = json.loads(done.stdout)[str(QUICKSTART)]["forward_flops_per_token"]["terms"]
    assert flops == count_forward_flops(load_run_config(QUICKSTART), sequence_length=1024)


def test_costs_reject_overrides_without_a_config() -> None:
    done = CliRunner().invoke(cli, ["costs", "data.sequence_length=1024"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("data.sequence_length=1024: is an override without a config")


def test_costs_prints_a_compact_table_first_and_terms_on_request() -> None:
    configs = [str(ROOT / "configs" / "125m" / f"{kind}.yaml") for kind in KINDS if kind != "diff"]
    compact, full = (CliRunner().invoke(cli, ["costs", *configs, *flag]).output for flag in ([], ["--terms"]))
    assert full.startswith(compact.split("At ")[0])
    totals = [sum(count_parameters(load_run_config(path)).values()) for path in configs]
    assert f"125m/mha {totals[0] / 1e6:9.1f} M" in compact
    assert f"{totals[1] / totals[0]:.2f}×" in compact
    assert f"{totals[0]:,}" in full
    assert f"{totals[0]:,}" not in compact
    assert "head_simulation" in full
    assert "head_simulation" not in compact


@pytest.mark.parametrize("flag", [[], ["--terms"]], ids=["compact", "terms"])
def test_each_line_of_costs_fits_in_eighty_columns(flag: list[str], tmp_path: Path) -> None:
    configs = [str(path) for path in sorted((ROOT / "configs" / "6.7b").glob("*.yaml"))]
    long_name = tmp_path / f"{'a_folder_with_a_long_name' * 3}" / f"{'and_a_long_config' * 3}.yaml"
    long_name.parent.mkdir()
    long_name.write_text(dump_yaml(load_run_config(configs[0])))
    done = CliRunner().invoke(cli, ["costs", *configs, str(long_name), "--world-size", "64", *flag])
    assert done.exit_code == 0, done.output
    assert len(configs) > 5
    assert not [line for line in done.output.splitlines() if len(line) > 80]


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.000 k"),
        (999_949, "999.9 k"),
        (999_960, "1.000 M"),
        (134_105_856, "134.1 M"),
        (1_232_520_192, "1.233 G"),
    ],
)
def test_amounts_have_four_digits_and_a_prefix(amount: int, text: str) -> None:
    assert format_amount(amount) == text


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
