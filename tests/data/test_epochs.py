"""A run, a study and a law report data that are read more than once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FieldError
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.data.epochs import check_repetition, count_data_use, format_epochs
from sas_megatron.scaling.outcomes import gather_points
from sas_megatron.scaling.run_comparison import compare_runs
from sas_megatron.scaling.runs import load_run
from sas_megatron.scaling.study.analysis import analyze
from sas_megatron.scaling.study.collecting import collect
from sas_megatron.scaling.study.grids import run_grid
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.study_table import read_table, write_table
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.data.preparing import prepare_two_documents
from tests.rank_pool import in_layout
from tests.scaling.conftest import write_run_directory
from tests.scaling.study.studies import leave_run, write_study
from tests.scaling.study.synthetic_tables import build_synthetic_table
from tests.scaling.synthetic import draw_grid
from tests.small_data import SmallData

EVEN = {"split": [0.5, 0.5]}


def count_epochs_of_megatron_core(config: RunConfig) -> float:
    """Return, on a rank, how many times Megatron-core lists the documents of the validation windows."""
    from sas_megatron.data.batches import build_validation_samples
    from sas_megatron.data.token_files import open_token_files

    in_layout(ParallelConfig())
    tokenizer = open_token_files(config.data, vocab_size=config.model.vocab_size)
    samples: Any = build_validation_samples(
        config.data, tokenizer, num_samples=config.evaluation.num_sequences
    )
    return len(samples.document_index) / len(samples.indices)


def test_windows_are_reported_as_repeated_from_the_first_that_megatron_core_repeats(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    num_distinct = count_data_use(small_data.run(tmp_path)).num_distinct_windows
    for count, epochs in ((num_distinct, 1), (num_distinct + 1, 2)):
        cache = {"index_cache": str(tmp_path / str(count))}
        config = small_data.run(tmp_path, data=cache, evaluation={"num_sequences": count})
        assert ranks(1).run(count_epochs_of_megatron_core, config) == [epochs]
        use = count_data_use(config)
        assert (use.validation_epochs > 1) is (epochs > 1)
        assert (use.describe_repeated_windows() is not None) is (epochs > 1)


def complete(config: RunConfig) -> None:
    """Complete a run on this rank of the pool."""
    from sas_megatron.training.loop import Run

    Run(config, in_layout(config.parallel, seed=config.training.seed)).complete()


def test_a_run_over_several_epochs_of_two_prefixes_reports_them(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    """Without weights, Megatron-core's builder ends after one epoch of several prefixes."""
    prefixes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prefixes.append(str(prepare_two_documents(small_data, tmp_path / name)))
    config = small_data.run(
        tmp_path / "run",
        data={"prefixes": prefixes, **EVEN},
        training={"num_steps": 20},
        evaluation={"num_sequences": 200, "interval": None},
    )
    ranks(1).run(complete, config)
    use = count_data_use(config)
    # Both texts of both prefixes have the same length.
    part_tokens = {part.num_tokens for part in (*use.training.values(), *use.validation.values())}
    assert max(part_tokens) - min(part_tokens) < 60
    assert use.epochs == pytest.approx(20 * 8 * 40 / 2 / max(part_tokens), rel=0.1)
    directory = Path(config.logging.run_directory)
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["epochs"] == use.epochs
    assert summary["validation_epochs"] == use.validation_epochs > 1
    assert json.loads((directory / "run.json").read_text())["data"] == use.record()
    assert load_run(directory).summary.epochs == use.epochs
    training, validation = use.describe()
    assert f"the run reads them {format_epochs(use.epochs)} times; more than one epoch" in training
    assert f"fills {use.num_distinct_windows} windows, and 200 are evaluated, so that" in validation


def test_weights_count_the_epochs_of_each_prefix(small_data: SmallData, tmp_path: Path) -> None:
    prefix = prepare_two_documents(small_data, tmp_path)
    prefixes = [str(small_data.prefix), str(prefix)]
    config = small_data.run(tmp_path, data={"prefixes": prefixes, "weights": [3.0, 1.0], **EVEN})
    use = count_data_use(config)
    for name, share in zip(prefixes, (0.75, 0.25), strict=True):
        predicted = use.training[name].num_tokens - 1
        assert use.training[name].epochs == pytest.approx(20 * 8 * 40 * share / predicted)
    assert use.epochs == use.training[str(prefix)].epochs
    assert f"the run reads {prefix} {format_epochs(use.epochs)} times" in use.describe()[0]
    assert use.epochs_at(10) == use.epochs / 2


def test_prefixes_that_name_the_same_files_are_one_part(small_data: SmallData, tmp_path: Path) -> None:
    once = count_data_use(small_data.run(tmp_path))
    assert "more than once" not in once.describe()[0]
    prefix = small_data.prefix
    for second in (
        prefix,
        prefix.parent / "." / prefix.name,
        f"{prefix.parent}/../{prefix.parent.name}/text",
    ):
        for weights in (None, [3.0, 1.0]):
            prefixes = [str(prefix), str(second)]
            use = count_data_use(small_data.run(tmp_path, data={"prefixes": prefixes, "weights": weights}))
            assert use.epochs == pytest.approx(once.epochs)
            assert use.num_distinct_windows == once.num_distinct_windows
            assert f"; data.prefixes names {prefix} more than once" in use.describe()[0]


def test_study_plan_has_a_column_and_a_warning(small_data: SmallData, tmp_path: Path) -> None:
    base = small_data.run(tmp_path / "run", evaluation={"num_sequences": 5000}).model_dump(mode="json")
    study = write_study(
        tmp_path,
        base,
        variants={"mha": {}, "gqa": {"num_kv_heads": 2}},
        sizes={"one": {}},
        budgets={"tokens": [40_000, 400_000]},
        trunks="none",
    )
    done = CliRunner().invoke(cli, ["study", "plan", str(study)], catch_exceptions=False)
    assert "epochs" in done.output.splitlines()[0]
    shown = " ".join(done.output.split())
    assert "Warning: 2 of 4 runs read their training data more than once, at most" in shown
    assert "and 5,000 are evaluated, so that windows repeat it" in shown
    done = CliRunner().invoke(cli, ["study", "plan", str(study), "--json"], catch_exceptions=False)
    record = json.loads(done.stdout)
    epochs = [run["epochs"] for run in record["runs"]]
    assert epochs[1] == pytest.approx(10 * epochs[0], rel=0.01)
    assert epochs[0] < 1 < epochs[1]
    assert record["runs"][0]["validation_epochs"] > 1
    assert len(record["warnings"]) == 2
    study = write_study(tmp_path)  # its token files are not on this machine
    done = CliRunner().invoke(cli, ["study", "plan", str(study), "--json"], catch_exceptions=False)
    assert {run["epochs"] for run in json.loads(done.stdout)["runs"]} == {None}


def test_collected_runs_and_their_laws_have_a_remark(tmp_path: Path) -> None:
    plan = plan_with_rates(*load_study(write_study(tmp_path)))
    for run in plan.runs:
        leave_run(run)
        path = run.directory / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 0.5 * run.budget}))
    table = collect(plan)
    assert sorted({row.epochs for row in table.rows}) == [0.5, 1.25]
    (remark,) = [remark for remark in table.remarks if "more than once" in remark]
    assert remark.startswith("4 of 8 runs read their training data more than once, at most 1.25 times (mha-")
    write_table(table, tmp_path / "table.parquet")
    assert read_table(tmp_path / "table.parquet").rows == table.rows


def test_compared_runs_have_a_remark(tmp_path: Path) -> None:
    runs = [
        load_run(write_run_directory(tmp_path, name, losses={90: 4.0}, summary={"epochs": epochs}))
        for name, epochs in (("a", 0.9), ("b", 3.5))
    ]
    remarks = compare_runs(runs).remarks
    assert any(remark.startswith("1 of 2 runs read their training data more than once") for remark in remarks)


def test_a_law_of_repeated_tokens_is_marked(tmp_path: Path) -> None:
    points = draw_grid(1)
    path = tmp_path / "points.csv"
    for epochs, is_marked in ((0.99, False), (690, True)):
        rows = zip(points.params, points.tokens, points.loss, strict=True)
        lines = [f"{params},{tokens},{loss},{epochs}" for params, tokens, loss in rows]
        path.write_text("\n".join(["params,tokens,loss,epochs", *lines]) + "\n")
        arguments = ["fit", str(path), "--bootstraps", "50"]
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        shown = " ".join(done.output.split())
        assert ("runs read their training data more than once, at most 690 times" in shown) is is_marked


def test_the_law_of_a_study_is_marked_if_its_runs_repeat_tokens() -> None:
    # A law needs more independent runs than the five sizes of one seed.
    table = build_synthetic_table(seeds={"mha": 3, "gqa": 3, "sas": 3})
    rows = tuple(dataclasses.replace(row, epochs=3.0) for row in table.rows)
    (analysis,) = analyze(dataclasses.replace(table, rows=rows), num_draws=50)
    assert gather_points(analysis.slice.outcomes, "gqa").epochs == pytest.approx([3.0] * 45)
    for law in analysis.laws:
        assert law.fit is not None
        assert "runs read their training data more than once, at most 3 times" in law.fit.remarks[0]
    assert run_grid(analysis).headings[-2:] == ("epochs", "run.json")
    assert {line[-2] for line in run_grid(analysis).lines} == {"3"}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("evaluation", "num_sequences", 10**9),
        ("training", "num_steps", 2**53),
        ("training", "order_steps", 2**53),
    ],
)
def test_repetitions_that_megatron_core_cannot_list_are_refused(
    small_data: SmallData, tmp_path: Path, section: str, field: str, value: int
) -> None:
    check_repetition(small_data.run(tmp_path, training={"num_steps": 10_000}))
    with pytest.raises(
        FieldError, match=rf"^{section}.{field}={value}: reads .*/text [\d,]+ times, too often"
    ):
        check_repetition(small_data.run(tmp_path, **{section: {field: value}}))
