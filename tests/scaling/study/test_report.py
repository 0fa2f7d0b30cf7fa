"""The report of a study: its contents, and its layout in a browser."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FileProblem
from sas_megatron.scaling import report as report_module
from sas_megatron.scaling.numbers import format_difference
from sas_megatron.scaling.study.analysis import analyze, cut_slices
from sas_megatron.scaling.study.study_report import write_study_report
from sas_megatron.scaling.study.study_table import StudyTable, SweepRun, read_table, write_table
from tests.scaling.study.synthetic_tables import build_synthetic_table, with_measurements
from tests.selection import exhaustive

MEASURE = """
<script>
addEventListener("load", () => {
  const box = element => element.getBoundingClientRect();
  const drawn = [...document.querySelectorAll("figure svg")].map(svg => [box(svg).width, box(svg).height]);
  const texts = [...document.querySelectorAll("figure svg text, figure svg path")].length;
  const found = {
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    drawn, texts, width: innerWidth,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name),
    tables: document.querySelectorAll("table").length,
    verdict: getComputedStyle(document.querySelector("td.wins")).backgroundColor,
    ink: getComputedStyle(document.body).color,
  };
  const output = document.createElement("pre");
  output.id = "found";
  output.textContent = JSON.stringify(found);
  document.body.append(output);
});
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_table(with_measurements(build_synthetic_table()), folder / "study.parquet")
    written = CliRunner().invoke(
        cli, ["study", "report", str(folder / "study.parquet"), "--bootstraps", "50"]
    )
    assert written.exit_code == 0, written.output
    return folder / "report"


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the drawing of figures, for tests of texts."""
    monkeypatch.setattr(report_module, "render", lambda *_, **__: b"drawing")
    monkeypatch.setattr(report_module, "embed_svg", lambda *_, **__: "drawing")


def browse(page: Path, *options: str) -> str:
    """Return the output of a headless browser for a page."""
    base = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
    command = [*base, f"--user-data-dir={page.parent}/browser", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measure(report: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    page = tmp_path / "page.html"
    page.write_text((report / "report.html").read_text() + MEASURE)
    output = browse(page, "--dump-dom", *options)
    return json.loads(output.split('<pre id="found">')[1].split("</pre>")[0])


@pytest.mark.system_packages("chromium")
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (500, "dark"),  # the width at which a page may scroll horizontally, and the scheme with other colors
        pytest.param(500, "light", marks=exhaustive),
        pytest.param(1280, "light", marks=exhaustive),
        pytest.param(1280, "dark", marks=exhaustive),
    ],
)
def test_page_fits_the_browser_and_loads_no_resources(
    report: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    options = [f"--window-size={width},1600"]
    if scheme == "dark":
        options.append("--blink-settings=preferredColorScheme=0")
    found = measure(report, tmp_path, *options)
    assert found["width"] == width
    assert found["overflow"] <= 0, "the page scrolls horizontally"
    assert len(found["drawn"]) == 8
    assert all(drawn_width > 300 and height > 100 for drawn_width, height in found["drawn"])
    assert found["texts"] > 100
    assert found["loaded"] == []
    assert found["tables"] == 13
    assert (found["ink"] == "rgb(232, 235, 238)") == (scheme == "dark")
    assert found["verdict"] != "rgba(0, 0, 0, 0)"


@exhaustive
@pytest.mark.system_packages("chromium")
def test_page_can_be_printed(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text((report / "report.html").read_text())
    browse(page, f"--print-to-pdf={tmp_path}/page.pdf", "--no-pdf-header-footer")
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert 3 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page/") <= 40


def test_summary_page_and_json_agree(report: Path) -> None:
    summary, page = (report / "summary.md").read_text(), (report / "report.html").read_text()
    record = json.loads((report / "report.json").read_text())
    (part,) = record["slices"]
    for comparison in part["comparisons"]:
        for verdict in comparison["verdicts"]:
            difference = format_difference(verdict["estimate"]["difference"])
            assert f"{verdict['result']}<br>{difference}" in summary
            assert f"{verdict['result']}\n{difference}" in page
    results = {
        comparison["candidate"]: [verdict["result"] for verdict in comparison["verdicts"]]
        for comparison in part["comparisons"]
    }
    assert results["sas"][:2] == ["wins", "wins"]
    assert results["gqa"] == ["loses"] * 5
    assert part["laws"]["mha"]["E"] == pytest.approx(1.8, abs=0.1)
    assert "A remark &lt;of&gt; it." in page
    for row in build_synthetic_table().rows:
        assert row.run in page
    figures = sorted(path.name for path in (report / "figures").iterdir())
    assert figures == sorted(
        f"{name}.{suffix}"
        for name in (
            *("costs", "curves", "differences", "frontier"),
            *("gain", "laws", "mechanisms", "residuals"),
        )
        for suffix in ("png", "svg")
    )
    assert all(f"figures/{name}" in summary for name in figures if name.endswith("png"))


@pytest.mark.usefixtures("no_drawing")
def test_the_report_answers_a_question_for_each_mechanism(report: Path) -> None:
    section = (report / "summary.md").read_text().partition("## Inside the models")[2]
    assert "### Do simulated copies become different heads?" in section
    assert "| sas | query | 0.120 | 0.060 | 0.055 in 1 | 0.065 in 3 |" in section
    assert "figures/mechanisms.png" in section
    assert (report / "figures" / "mechanisms.png").exists()


def test_sentences_that_hold_for_several_axes_or_variants_appear_once(tmp_path: Path) -> None:
    seeds = {"mha": 3, "gqa": 3, "sas": 3}
    write_study_report(build_synthetic_table(seeds=seeds, budgets=(4,), num_sizes=1), tmp_path, num_draws=50)
    lines = (tmp_path / "summary.md").read_text().splitlines()
    statements = [line for line in lines if line.startswith("- ") and ": " in line]
    assert len(statements) == len(set(statements))
    (gains,) = (line for line in statements if "No gain" in line)
    assert gains.startswith("- gqa, sas: No gain in FLOPs, FLOPs of the causal half, time: ")
    (law,) = (line for line in statements if "no law" in line)
    assert law.startswith("- mha, gqa, sas: no law (")
    # At equal FLOPs by both conventions, the verdicts are the same: there is one column.
    (headings,) = (line for line in lines if line.startswith("| variant | at equal parameters"))
    assert (
        headings
        == "| variant | at equal parameters and tokens | at equal FLOPs (by both conventions), equal time |"
    )


@pytest.mark.usefixtures("no_drawing")
def test_page_opens_with_an_answer_of_at_most_five_sentences_and_a_figure(tmp_path: Path) -> None:
    write_study_report(build_synthetic_table(num_sizes=2), tmp_path, num_draws=50)
    title, _, answer, _, figure, *_ = (tmp_path / "summary.md").read_text().splitlines()
    assert title == "# made_up: gqa, sas against mha"
    assert answer.startswith("At equal parameters and tokens, sas (−0.")
    assert ") wins against mha, and gqa (+0.1" in answer
    assert "degrees of freedom." in answer
    assert answer.count(". ") < 5
    assert figure == "![Difference against budget](figures/differences.png)"
    page = (tmp_path / "report.html").read_text()
    assert page.index('class="answer"') < page.index("<figure>") < page.index("<table")


@pytest.mark.usefixtures("no_drawing")
def test_withdrawn_variants_are_not_compared(tmp_path: Path) -> None:
    reason = "It started wrongly."
    table = dataclasses.replace(build_synthetic_table(num_sizes=2), withdrawn={"gqa": reason})
    (analysis,) = analyze(table, num_draws=50)
    assert [comparison.candidate for comparison in analysis.comparisons] == ["sas"]
    assert f"The results of gqa are withdrawn: {reason}" in analysis.remarks
    write_study_report(table, tmp_path, num_draws=50)
    summary = (tmp_path / "summary.md").read_text()
    assert "| gqa | withdrawn | withdrawn |" in summary
    assert "The results of gqa are withdrawn." in summary.splitlines()[2]


def test_slices_are_not_compared_with_each_other() -> None:
    table = build_synthetic_table(lengths=("512", "1024"))
    short, long = cut_slices(table)
    assert (short.name, long.name) == ("length 512", "length 1024")
    assert list(short.rows) == ["mha", "gqa", "sas"]
    # A level that only some variants have becomes part of the variant's name.
    rows = tuple(
        dataclasses.replace(row, levels={"kernel": f"k{row.seed + 1}"}) if row.variant == "sas" else row
        for row in build_synthetic_table().rows
    )
    (single,) = cut_slices(dataclasses.replace(table, rows=rows))
    assert list(single.rows) == ["mha", "gqa", "sas-k1", "sas-k2", "sas-k3"]


@pytest.mark.usefixtures("no_drawing")
def test_missing_results_are_reported_as_missing(tmp_path: Path) -> None:
    def without(variant: str, table: StudyTable) -> StudyTable:
        rows = tuple(
            dataclasses.replace(row, status="missing", loss=None, curve_loss=[])
            if row.variant == variant
            else row
            for row in table.rows
        )
        return dataclasses.replace(table, rows=rows)

    table = build_synthetic_table(seeds={"mha": 1, "sas": 1})
    (analysis,) = analyze(without("sas", table), num_draws=50)
    assert analysis.comparisons == ()
    assert analysis.remarks == ("sas has no finished run.",)
    (analysis,) = analyze(without("mha", table), num_draws=50)
    assert analysis.remarks == ("The baseline mha has no finished run: no variant can be compared.",)
    # At a single budget, SAS uses 1.5 times the FLOPs, so that no runs of mha enclose it.
    write_study_report(build_synthetic_table(budgets=(4,)), tmp_path, num_draws=50)
    summary = (tmp_path / "summary.md").read_text()
    assert summary.count("| not compared |") == 1
    assert "- gqa: No gain" not in summary
    one_budget = build_synthetic_table(budgets=(4,))
    (analysis,) = analyze(one_budget, num_draws=50)
    assert all(law.fit is None or not math.isnan(law.fit.fit.surface.E) for law in analysis.laws)


def test_all_runs_use_the_same_kind_of_time() -> None:
    table = build_synthetic_table()
    rows = tuple(
        dataclasses.replace(row, step_seconds=None) if row.variant == "sas" else row for row in table.rows
    )
    (mixed,) = cut_slices(dataclasses.replace(table, rows=rows))
    assert [outcome.seconds for outcome in mixed.outcomes] == [row.training_seconds for row in table.rows]
    (timed,) = cut_slices(table)
    assert timed.outcomes[0].seconds == pytest.approx((table.rows[0].step_seconds or 0) * table.rows[0].steps)


def test_report_keeps_other_files_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "other.svg").write_text("other content")
    write_study_report(build_synthetic_table(seeds={"mha": 1}, budgets=(4,)), tmp_path, num_draws=50)
    assert (tmp_path / "figures" / "other.svg").read_text() == "other content"


def test_table_round_trips_and_other_files_are_refused(tmp_path: Path) -> None:
    table = dataclasses.replace(
        build_synthetic_table(),
        sweeps=(SweepRun("mha", "w0", 0.001, 4.5), SweepRun("mha", "w0", 0.1, None)),
        withdrawn={"gqa": "It started wrongly."},
    )
    write_table(table, tmp_path / "study.parquet")
    assert read_table(tmp_path / "study.parquet") == table
    with pytest.raises(
        FileProblem, match=r"none.parquet: does not exist; run `sas-megatron study collect` first"
    ):
        read_table(tmp_path / "none.parquet")
    (tmp_path / "text").write_text("not a table")
    with pytest.raises(FileProblem, match="cannot be read"):
        read_table(tmp_path / "text")
