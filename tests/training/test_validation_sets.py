"""Named validation sets: fixed windows of each, in the records of a run, in `evaluate` and in studies."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.config.loading import dump_yaml
from sas_megatron.data.epochs import count_data_use
from sas_megatron.data.prepare import prepare_token_files
from sas_megatron.data.validation_sets import list_validation_sets
from sas_megatron.evaluation.held_out import HeldOutLoss, combine_losses
from sas_megatron.scaling.runs import load_run
from sas_megatron.scaling.study.study_table import read_table, write_table
from sas_megatron.training.entry import check_run
from tests.fork_server import run_command
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.scaling.study.synthetic_tables import build_synthetic_table
from tests.selection import exhaustive
from tests.small_data import SmallData

NUM_WINDOWS = 5


@pytest.fixture
def prose(small_data: SmallData, tmp_path: Path) -> Path:
    """Return the prefix of token files that are not trained on: words, which code has few of."""
    text = tmp_path / "prose.txt"
    words = "the sea and the sky were grey and the long road led down to the harbour where nobody waited "
    text.write_text(words * 120)
    prepare_token_files([text], tokenizer_path=small_data.tokenizer, prefix=tmp_path / "prose", num_workers=1)
    return tmp_path / "prose"


def config_with_sets(small_data: SmallData, folder: Path, prose: Path, **sections: Any) -> Any:
    sets = {"code": str(small_data.prefix), "prose": [str(prose)]}
    evaluation = {"num_sequences": NUM_WINDOWS, "interval": 2, "sets": sets}
    return small_data.run(folder / "run", evaluation=evaluation, training={"num_steps": 4}, **sections)


def read_windows(config: Any) -> dict[str, list[list[int]]]:
    """Return the labels of each set's windows, on a rank."""
    from sas_megatron.training.run_data import RunData

    data = RunData(config, in_layout(config.parallel))
    rows: dict[str, list[list[int]]] = {}
    for name, batches in data.validation_batches().items():
        for batch in batches:
            for labels, mask in zip(batch["labels"], batch["loss_mask"], strict=True):
                if mask.any():
                    rows.setdefault(name, []).append(labels.tolist())
    return rows


def test_each_set_has_fixed_windows_of_its_own_documents(
    ranks: Any, small_data: SmallData, tmp_path: Path, prose: Path
) -> None:
    config = config_with_sets(small_data, tmp_path, prose)
    [windows] = ranks(1).run(read_windows, config)
    assert {name: len(rows) for name, rows in windows.items()} == {"code": NUM_WINDOWS, "prose": NUM_WINDOWS}
    # Those of the training prefix are the windows of a run without sets: its validation documents.
    alone = small_data.run(tmp_path / "alone", evaluation={"num_sequences": NUM_WINDOWS})
    [unnamed] = ranks(1).run(read_windows, alone)
    assert unnamed == {"validation": windows["code"]}
    # Those of other token files are from all their documents, and the same for another seed.
    tokens = np.fromfile(f"{prose}.bin", dtype=np.uint16).tolist()
    stream = tokens + tokens
    for row in windows["prose"]:
        assert any(stream[start : start + len(row)] == row for start in range(len(tokens)))
    seeded = config.replaced({"training.seed": 77})
    assert ranks(1).run(read_windows, seeded) == [windows]


def test_a_run_with_sets_records_evaluates_and_collects_them(
    small_data: SmallData, tmp_path: Path, prose: Path
) -> None:
    config = config_with_sets(small_data, tmp_path, prose)
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(config))
    done = run_command("train", path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "validation"][-1]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation_sets"] == last["validation_sets"]
    sets = last["validation_sets"]
    assert list(sets) == ["code", "prose"]
    num_tokens = {name: found["num_tokens"] for name, found in sets.items()}
    assert num_tokens == dict.fromkeys(sets, NUM_WINDOWS * config.data.sequence_length)
    weighted = sum(found["loss"] * found["num_tokens"] for found in sets.values()) / sum(num_tokens.values())
    assert math.isclose(last["validation_loss"], weighted, rel_tol=1e-12)
    assert sets["code"]["loss"] != sets["prose"]["loss"]
    assert set(json.loads((run / "run.json").read_text())["validation_sets"]) == {"code", "prose"}
    assert f" prose: {sets['prose']['loss']:.6E} |" in done.stdout
    assert {name: found.loss for name, found in load_run(run).summary.validation_sets.items()} == {  # type: ignore[union-attr]
        name: found["loss"] for name, found in sets.items()
    }
    # `evaluate` measures the same losses.
    done = run_command("evaluate", run, "--json")
    assert done.returncode == 0, done.stderr
    domains = json.loads(done.stdout)["validation"]["by_length"][0]
    for name, found in sets.items():
        assert math.isclose(domains["domains"][name]["loss"], found["loss"], rel_tol=1e-5)
    assert math.isclose(domains["all"]["loss"], last["validation_loss"], rel_tol=1e-5)


@exhaustive
def test_the_losses_of_sets_do_not_depend_on_the_layout(
    ranks: Any, small_data: SmallData, tmp_path: Path, prose: Path
) -> None:
    losses = []
    for world_size, parallel in ((1, {}), (2, {}), (2, {"pipeline": 2})):
        folder = tmp_path / f"{world_size}{len(parallel)}"
        config = config_with_sets(small_data, folder, prose, parallel=parallel)
        ranks(world_size).run(complete, config)
        losses.append(json.loads((folder / "run" / "summary.json").read_text())["validation_sets"])
    for other in losses[1:]:
        for name, found in losses[0].items():
            assert math.isclose(other[name]["loss"], found["loss"], rel_tol=1e-4)


def complete(config: Any) -> None:
    from sas_megatron.training.loop import Run

    Run(config, in_layout(config.parallel, seed=config.training.seed)).complete()


def test_the_loss_of_all_tokens_is_weighted_by_tokens() -> None:
    sets = {"a": HeldOutLoss(1.0, 300, 900), "b": HeldOutLoss(4.0, 100, 100)}
    total = combine_losses(sets)
    assert (total.loss, total.num_tokens, total.num_bytes) == (1.75, 400, 1000)
    assert total.results["validation_sets"]["b"]["num_tokens"] == 100
    assert math.isnan(combine_losses({"a": HeldOutLoss(math.nan, 3, 3), "b": sets["b"]}).loss)


def test_the_columns_of_a_table_hold_the_losses_of_sets(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = build_synthetic_table()
    first, *others = table.rows
    sets: dict[str, float | None] = {"code": 1.5, "prose": 2.5}
    path = tmp_path / "study.parquet"
    rows = (dataclasses.replace(first, set_losses=sets), *others)
    write_table(dataclasses.replace(table, rows=rows), path)
    columns = pq.read_table(path)
    assert columns["loss.code"].to_pylist()[:2] == [1.5, None]
    read = read_table(path).rows
    assert read[0].set_losses == sets
    assert all(not other.set_losses for other in read[1:])


def test_sets_that_repeat_their_text_are_reported(small_data: SmallData, tmp_path: Path, prose: Path) -> None:
    config = config_with_sets(small_data, tmp_path, prose)
    use = count_data_use(config)
    assert set(use.validation) == {f"code: {small_data.prefix}", f"prose: {prose}"}
    assert use.describe_repeated_windows() is None
    many = config.replaced({"evaluation.num_sequences": 200})
    assert "windows repeat" in str(count_data_use(many).describe_repeated_windows())


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, r"evaluation.sets={}: names no set; name one, or remove it"),
        ({"a b": "x"}, r"evaluation.sets=a b: becomes part of the names of columns"),
        ({"all": "x"}, r"evaluation.sets=all: is the name of the total; use another name"),
        ({"a": []}, r"evaluation.sets.a=\[\]: must be different prefixes"),
        ({"a": ["x", "x"]}, r"evaluation.sets.a=\['x', 'x'\]: must be different prefixes"),
        ({"a": "n" * 300}, r"evaluation.sets.a=n+: has a name of more than 230 bytes"),
    ],
)
def test_invalid_sets_are_refused(sets: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        small_config(evaluation={"sets": sets})


def test_values_of_another_type_are_refused() -> None:
    for sets in (["a"], {"a": 3}, "a"):
        with pytest.raises(UserError, match=r"evaluation\.sets.*: must be a valid"):
            small_config(evaluation={"sets": sets})


def test_token_files_of_sets_are_checked_before_the_run(
    small_data: SmallData, tmp_path: Path, prose: Path
) -> None:
    config = config_with_sets(small_data, tmp_path, prose)
    mixed = config.replaced({"evaluation.sets": {"both": [str(small_data.prefix), str(prose)]}})
    with pytest.raises(FieldError, match=r"evaluation.sets.both=.*has prefixes that are in data.prefixes"):
        list_validation_sets(mixed)
    for name, damage, error, message in (
        ("missing", lambda: None, FileProblem, r"missing\.json: does not exist"),
        (
            "prose",
            lambda: Path(f"{prose}.bin").write_bytes(b"abcd"),
            FileProblem,
            r"prose\.bin: is truncated",
        ),
    ):
        damage()
        broken = config.replaced({"evaluation.sets": {"x": [str(tmp_path / name)]}})
        with pytest.raises(error, match=message):
            check_run(broken, world_size=1)
    tiny = tmp_path / "tiny.txt"
    tiny.write_text("two words")
    prepare_token_files([tiny], tokenizer_path=small_data.tokenizer, prefix=tmp_path / "tiny", num_workers=1)
    with pytest.raises(FieldError, match=r"evaluation.sets.x=.*: data.sequence_length=40: must be less than"):
        check_run(config.replaced({"evaluation.sets": {"x": [str(tmp_path / "tiny")]}}), world_size=1)
