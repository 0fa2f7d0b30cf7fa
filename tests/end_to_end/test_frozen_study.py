"""launch/frozen_study.sh runs a study from a worktree at one commit, untouched by edits of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.loading import dump_tree
from tests.conftest import ROOT
from tests.scaling.study.running_studies import base_tree, wait_until
from tests.scaling.study.studies import study_tree
from tests.selection import exhaustive
from tests.small_data import SmallData


class Checkout:
    """A repository with the files of this checkout and a study of one run, and a working directory."""

    def __init__(self, folder: Path, base: dict[str, Any] | None = None, *, tokens: int = 64_000) -> None:
        self.root, self.work = folder / "checkout", folder / "work"
        self.work.mkdir()
        for name in ("sas_megatron", "launch", "configs"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.py", ".gitignore"):
            shutil.copy(ROOT / name, self.root)
        variants = {"mha": {"head_dim": 12}}
        tree = study_tree(self.work, budgets={"tokens": [tokens]}, variants=variants)
        tree |= {"directory": "runs/study", "sizes": {"one": {"model.num_layers": 1}}}
        tree["base"] = "../python_small.yaml" if base is None else "base.yaml"
        self.study = self.root / "configs" / "studies" / "tiny.yaml"
        self.study.write_text(dump_tree(tree))
        if base is not None:
            self.study.with_name("base.yaml").write_text(dump_tree(base))
        self.git("init", "--quiet")
        self.commit = self.add_commit()
        self.environment = {
            **os.environ,
            "FROZEN_FOLDER": str(folder / "frozen"),
            "FROZEN_VENV": sys.prefix,
        }

    def git(self, *arguments: str) -> str:
        options = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(self.root), *options, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def add_commit(self) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "State")
        return self.git("rev-parse", "HEAD").strip()

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start the script in the working directory."""
        return subprocess.Popen(
            [str(self.root / "launch" / "frozen_study.sh"), *arguments],
            cwd=self.work,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=900)
        return process.returncode, output


STUDY = "configs/studies/tiny.yaml"


def test_edits_of_the_checkout_do_not_reach_a_frozen_study(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    first = checkout.run(checkout.commit, STUDY, STUDY_COMMAND="plan")
    assert first[0] == 0, first[1]
    assert "mha-one-64000-s1234" in first[1]
    checkout.study.write_text(checkout.study.read_text().replace("one:", "two:"))
    (checkout.root / "sas_megatron" / "__init__.py").write_text("raise SystemExit('edited')\n")
    # The working directory contains an edited package as well.
    (checkout.work / "sas_megatron.py").write_text("raise SystemExit('edited')\n")
    assert checkout.run("HEAD", STUDY, STUDY_COMMAND="plan")[1].splitlines()[1:] == first[1].splitlines()[1:]
    status, output = checkout.run("HEAD", "configs/studies/none.yaml")
    assert status == 2
    assert f"none.yaml: does not exist at commit {checkout.commit[:12]}" in output
    assert "nowhere: is not a commit of" in checkout.run("nowhere", STUDY)[1]
    assert "STUDY_NICE=20: must be from 0 to 19; use 19" in checkout.run("HEAD", STUDY, STUDY_NICE="20")[1]
    frozen = tmp_path / "frozen" / checkout.commit[:12]
    (frozen / STUDY).write_text("changed")
    assert f"{frozen}: was changed; restore it with git" in checkout.run("HEAD", STUDY)[1]
    status, output = checkout.run()
    assert status == 2
    assert "usage: launch/frozen_study.sh COMMIT STUDY" in output


@exhaustive
@pytest.mark.timeout(1800)
def test_a_frozen_study_has_the_lowest_priority_and_stops_and_resumes(
    small_data: SmallData, tmp_path: Path
) -> None:
    base = base_tree(small_data, tmp_path / "none")
    # Steps for some seconds, so that the run is still training when it is stopped.
    checkout = Checkout(tmp_path, base, tokens=320_000)
    run = checkout.work / "runs" / "study" / "runs" / "mha-one-320000-s1234"
    process = checkout.start("HEAD", STUDY)
    try:
        # At the lowest priority, a start can take minutes on a busy machine.
        wait_until(lambda: (run / "checkpoints").exists() or process.poll() is not None, seconds=500)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    finally:
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert "saved a checkpoint and stopped" in output, output
    assert json.loads((run / "stopped.json").read_text())["exit_reason"] == "signal SIGTERM"
    (checkout.root / "sas_megatron" / "__init__.py").write_text("raise SystemExit('edited')\n")
    status, output = checkout.run("HEAD", STUDY)
    assert status == 0, output
    record = json.loads((run / "run.json").read_text())
    assert [session["git"] for session in record["sessions"]] == 2 * [checkout.commit[:12]]
    assert json.loads((run / "summary.json").read_text())["exit_reason"] == "finished"
