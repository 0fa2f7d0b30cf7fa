from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import load_run_config
from sas_megatron.scaling.matching import counted_costs
from tests.conftest import ROOT

BASE = ROOT / "configs" / "quickstart_mha.yaml"


def match(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["match", str(BASE), *map(str, arguments)])


def test_written_configs_have_the_printed_costs(tmp_path: Path) -> None:
    done = match(
        "--variants", "sas,mla", "--equal", "flops", "--tolerance", 0.02, "--output", tmp_path, "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    base = counted_costs(load_run_config(BASE))
    for kind in ("sas", "mla"):
        config = load_run_config(tmp_path / f"{kind}.yaml")
        assert config.attention.kind == kind
        assert config.logging.run_directory == f"quickstart/runs/{kind}"
        costs = counted_costs(config)
        assert found[kind]["ratios"] == {axis: costs[axis] / base[axis] for axis in base}
        assert abs(found[kind]["ratios"]["flops"] - 1) <= 0.02


def test_table_shows_the_cost_ratios_on_all_axes() -> None:
    done = match("--variants", "gqa", "--equal", "params")
    assert done.exit_code == 0, done.output
    # Equal parameters within one percent, and half the cache.
    (row,) = [line for line in done.stdout.splitlines() if "│ gqa" in line]
    params, _, cache = (float(cell) for cell in row.split("│")[2:5])
    assert abs(params - 1) <= 0.01
    assert cache == 0.5
    assert "model.ffn_hidden_size 344 →" in row


def test_overrides_apply_to_the_base_and_the_match(tmp_path: Path) -> None:
    done = match("model.num_layers=3", "--variants", "mqa", "--equal", "params", "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert load_run_config(tmp_path / "mqa.yaml").model.num_layers == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "ring", "--equal", "params"], "attention.kind=ring: is not a known variant"),
        (
            ["--variants", "gqa", "--equal", "params", "--tensor", "2,x"],
            "--tensor=2,x: must be positive whole",
        ),
        (["--variants", "gqa", "--equal", "params", "--tensor", "0"], "--tensor=0: must be positive whole"),
        (
            ["--variants", "gqa", "--equal", "params", "--tensor", "3"],
            "must be divisible by parallel.tensor=3",
        ),
        (["--variants", "gqa", "--equal", "params", "--free", "model.vocab_size"], "cannot be solved for"),
        (
            ["--variants", "gqa", "--equal", "time", "--free", "attention.num_heads"],
            "cannot be solved for by time",
        ),
    ],
)
def test_failed_match_raises_and_writes_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = match(*arguments, "--output", tmp_path / "configs")
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())
