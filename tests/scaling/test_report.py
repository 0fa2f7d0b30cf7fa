"""The report of a comparison of runs, and the writer of all reports."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from sas_megatron.config.errors import FileProblem
from sas_megatron.scaling import report
from sas_megatron.scaling.loss_figure import choose_loss_range, choose_unit
from sas_megatron.scaling.report import render_page, write_report
from sas_megatron.scaling.run_comparison import compare_runs
from sas_megatron.scaling.run_report import (
    FILES,
    build_curves,
    build_run_report,
    build_term_grid,
    describe_command,
    hash_config,
    print_comparison,
)
from sas_megatron.scaling.runs import Run, load_run
from tests.scaling.conftest import WriteRun, write_run_directory

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Parser that collects tags and table cells, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name)) is not None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("report")
    base = write_run_directory(root, "mha", losses={30: 5.5, 60: 4.75, 90: 4.625})
    other = write_run_directory(
        root,
        "gqa & <b>",
        losses={30: 5.25, 60: 4.5, 90: 4.375},
        flops_per_token=1200.0,
        step_seconds=0.8,
        config={"attention__kind": "gqa", "attention__num_kv_heads": 2, "model__ffn_hidden_size": 112},
        summary={
            "parameters": {"embedding": 46080, "attention": 10368, "mlp": 38880, "gates": 77},
            "peak_memory_bytes": None,
        },
    )
    return [load_run(base), load_run(other)]


def write(runs: list[Run], folder: Path) -> Path:
    """Write the report of a comparison and return the path of its page."""
    return write_report(build_run_report(runs, compare_runs(runs)), folder, FILES)


@pytest.fixture(scope="module")
def page_path(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(runs, tmp_path_factory.mktemp("out"))


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the drawing of figures, for tests of the writing alone."""
    monkeypatch.setattr(report, "render", lambda *_, **__: b"drawing" * 99)
    monkeypatch.setattr(report, "render_page", lambda *_, **__: "page" * 99)


def test_report_consists_of_three_files(page_path: Path) -> None:
    assert sorted(path.name for path in page_path.parent.iterdir()) == [
        "comparison.html",
        "comparison.json",
        "comparison.png",
    ]


def test_json_contains_rows_verdicts_and_budgets_with_missing_values_as_null(
    runs: list[Run], page_path: Path
) -> None:
    tree = json.loads(page_path.with_suffix(".json").read_text(encoding="utf-8"))
    assert tree["baseline"] == "mha"
    assert tree["budgets"] == {
        "tokens": {"gqa & <b>": 32130},
        "flops": {"gqa & <b>": 32130e3},
        "causal_flops": {"gqa & <b>": 32130e3},
        "seconds": {"gqa & <b>": 45.0},
    }
    assert tree["rows"][1]["peak_memory_bytes"] is None
    assert tree["rows"][1]["final_validation_loss_difference"] == -0.25
    assert [verdict["difference"] for verdict in tree["verdicts"]] == pytest.approx(
        [-0.25, -0.1875, -0.1875, -0.03125]
    )
    assert len(tree["remarks"]) == len(compare_runs(runs).remarks)


def test_figure_is_a_wide_png(page_path: Path) -> None:
    content = page_path.with_suffix(".png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    assert width > 2 * height > 1200


def test_page_is_well_formed_and_self_contained(page_path: Path) -> None:
    text = page_path.read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    for attribute in ("src", "href", "xlink:href"):
        assert all(value.startswith("#") for value in page.attributes(attribute))
    assert "url(http" not in text
    assert "@import" not in text
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    # Every reference within the drawings has a target.
    assert {value[1:] for value in page.attributes("xlink:href")} <= set(ids)


def test_page_describes_the_figure_in_words_and_has_scoped_tables(runs: list[Run], page_path: Path) -> None:
    text = page_path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    descriptions = page.attributes("aria-label")
    assert len(descriptions) == 1
    assert all(verdict.text in descriptions[0] for verdict in compare_runs(runs).verdicts)
    assert page.cells[page.cells.index("Peak memory") :][1:3] == ["3 MiB", "–"]
    assert page.cells[page.cells.index("gates") :][1:3] == ["–", "77\n0.1 %"]
    assert page.cells[page.cells.index("model.ffn_hidden_size") :][1:3] == ["104", "112"]
    assert "Each variant was trained with one seed." in text
    assert "2026-01-03T05:07:09Z" in text


def test_names_are_escaped(page_path: Path) -> None:
    text = page_path.read_text(encoding="utf-8")
    assert "gqa &amp; &lt;b&gt;" in text
    assert "<b>" not in text


@pytest.mark.usefixtures("no_drawing")
def test_failed_report_leaves_the_earlier_one_unchanged(
    runs: list[Run], page_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in page_path.parent.iterdir()}

    def fill_up(path: Path, content: bytes) -> int:
        with path.open("wb") as stream:
            if "html" not in path.name:
                return stream.write(content)
            stream.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(FileProblem, match=r"cannot be written \(No space left on device\); choose another"):
        write(runs, page_path.parent)
    assert {path: path.read_bytes() for path in page_path.parent.iterdir()} == before


@pytest.mark.usefixtures("no_drawing")
def test_folder_that_is_a_file_is_a_user_error(runs: list[Run], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileProblem, match=r"taken: cannot be written"):
        write(runs, tmp_path / "taken")


def test_runs_without_results_can_be_reported(write_run: WriteRun, tmp_path: Path) -> None:
    absent = {"parameters": None, "training_flops_per_token": None, "median_step_seconds": None}
    bare = [load_run(write_run(name, losses={}, summary=absent)) for name in ("first", "second")]
    cells = Page(write(bare, tmp_path / "out").read_text(encoding="utf-8")).cells
    assert cells[cells.index("Parameters") :][1:3] == ["–", "–"]
    assert "nan" not in "".join(cells).lower()


def test_terms_have_their_share_and_total() -> None:
    grid = build_term_grid(["mha", "bare"], [{"mlp_in": 30, "mlp_out": 10}, None])
    assert grid.headings == ("term", "mha", "bare")
    assert grid.lines == (
        ("mlp in", "30\n75.0 %", "–"),
        ("mlp out", "10\n25.0 %", "–"),
        ("total", "40", "–"),
    )


def test_command_starts_the_same_number_of_ranks_in_a_new_directory(write_run: WriteRun) -> None:
    run = load_run(write_run("mha", losses={90: 4.5}, summary={"world_size": 3}))
    config = run.directory / "config.yaml"
    assert describe_command(run) == f"launch/torchrun.sh 3 {config} logging.run_directory=runs/mha-again"


def test_config_hash_depends_on_the_config(runs: list[Run]) -> None:
    assert hash_config(runs[0]) == hash_config(runs[0])
    assert hash_config(runs[0]) != hash_config(runs[1])


def test_page_is_deterministic(runs: list[Run]) -> None:
    comparison, moment = compare_runs(runs), datetime(2026, 1, 3, tzinfo=UTC)
    pages = {render_page(build_run_report(runs, comparison), written_at=moment) for _ in range(2)}
    assert len(pages) == 1


def test_terminal_table_fits_eighty_columns(runs: list[Run]) -> None:
    stream = io.StringIO()
    print_comparison(compare_runs(runs).rows, console=Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["mha", "(baseline)", "gqa", "&", "<b>"]
    assert next(line for line in lines if "Final validation loss" in line).split()[-3:] == [
        "4.6250",
        "4.3750",
        "−0.2500",
    ]
    assert next(line for line in lines if "Peak memory" in line).split() == [
        "Peak",
        "memory",
        "3",
        "MiB",
        "–",
    ]


@pytest.mark.parametrize(
    ("axis", "largest", "expected"),
    [
        ("tokens", 32130, (1e3, "Training tokens (thousands)")),
        ("flops", 3.2e14, (1e12, "Training compute ($10^{12}$ FLOPs)")),
        ("seconds", 45.0, (1.0, "Training time (seconds)")),
        ("seconds", 7300.0, (3600.0, "Training time (hours)")),
    ],
)
def test_axis_has_a_readable_unit(axis, largest: float, expected: tuple[float, str]) -> None:
    assert choose_unit(axis, largest) == expected


def test_loss_range_excludes_early_training(write_run: WriteRun) -> None:
    run = load_run(write_run("mha", losses={10: 9.0, 30: 5.5, 90: 4.5}))
    assert choose_loss_range(build_curves([run], kind="validation")) == pytest.approx((4.4, 5.6))


def test_comparison_imports_neither_torch_nor_plotting_libraries() -> None:
    code = (
        "import sys, sas_megatron.scaling.run_report, sas_megatron.scaling.matching\n"
        "print(sorted({'torch', 'megatron', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
