"""The report of the scale study, from made-up records of all of its runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from sas_megatron.scaling.study.plan import PlannedRun
from sas_megatron.scaling.study.record_exchange import export_records
from sas_megatron.scaling.study.run_states import is_settled
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.conftest import ROOT
from tests.run_configs import STUDIES
from tests.scaling.study.studies import leave_run
from tests.selection import exhaustive

STAGES = ("a", "b1", "b2", "b3")


def made_up_loss(run: PlannedRun, generator: np.random.Generator) -> float:
    """Return a loss by a law of parameters and tokens; SAS gains 0.05 per tenfold FLOPs."""
    law = 1.2 + 60 / run.cell.parameters**0.35 + 300 / run.tokens**0.4
    gain = 0.05 * np.log10(run.budget / 1e12) if run.cell.variant.startswith("sas") else 0.0
    mistuned = np.log(run.config.optimizer.learning_rate / 1e-2) ** 2 / 50 if run.role == "sweep" else 0.0
    # The same for all variants of a seed, and of each run.
    noise = 0.02 * np.sin(run.seed) + generator.normal(0, 0.01)
    return float(law - gain + mistuned + noise)


@exhaustive
def test_report_on_all_stages_is_written_from_records_within_two_minutes(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    for stage in STAGES:
        study, base = load_study(STUDIES / "scale" / f"{stage}.yaml", directory=tmp_path / "runs" / stage)
        for _ in range(2):  # the sweep, and what depends on it
            for run in plan_with_rates(study, base).runs:
                if run.is_ready and not is_settled(run):
                    leave_run(run, loss=made_up_loss(run, generator))
        export_records(plan_with_rates(study, base), tmp_path / "records")
    files = [str(STUDIES / "scale" / f"{stage}.yaml") for stage in STAGES]
    options = ["--records", str(tmp_path / "records"), "--output", str(tmp_path / "report")]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sas_megatron", "study", "report", *files, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert seconds < 120
    (part,) = json.loads((tmp_path / "report" / "report.json").read_text())["slices"]
    sas = next(found for found in part["comparisons"] if found["candidate"] == "sas")
    verdicts = {verdict["axis"]: verdict for verdict in sas["verdicts"]}
    for axis in ("flops", "causal_flops"):
        low, high = verdicts[axis]["estimate"]["interval"]
        assert high - low < 0.1, "a difference at equal FLOPs is known to 0.05"
        assert {cell["size"] for cell in verdicts[axis]["cells"]} == {None}, "best sizes are compared"
    summary = (tmp_path / "report" / "summary.md").read_text()
    assert (
        "| variant | per tenfold tokens | per tenfold FLOPs | per tenfold FLOPs of the causal half |"
        in summary
    )
