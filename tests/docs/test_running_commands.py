"""The two commands of the README, and one command of each page, run as documented."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, commands_of
from tests.scaling.laws.public_tables import olmo_ladder
from tests.selection import exhaustive

# A run directory that does not exist, and the data of the quickstart, whose validation part is short here.
NEW_RUN = (
    "logging.run_directory=runs/new "
    "data.prefixes=[quickstart/data/python_source] data.tokenizer=quickstart/data/tokenizer.model "
    "data.sequence_length=256 model.vocab_size=8192"
)
# A command of each page, and options that make it shorter.
COMMANDS = {
    "attention.md": ("launch/torchrun.sh 2 configs/quickstart_tpa.yaml training.num_steps=40", ""),
    "checkpoints.md": ("sas-megatron checkpoint verify runs/125m/sas", ""),
    "clusters.md": ("sas-megatron doctor configs/125m/sas.yaml", NEW_RUN),
    "costs.md": ("sas-megatron costs configs/1.3b/mha.yaml configs/1.3b/sas.yaml", ""),
    "data.md": (
        "sas-megatron data prepare builtin --tokenizer data/tokenizer_1024.model --output data/python_1024",
        "",
    ),
    "evaluation.md": (
        "sas-megatron generate runs/125m/sas --prompt 'def main():' --max-new-tokens 64",
        "--max-new-tokens 3",
    ),
    "export.md": ("sas-megatron checkpoint export runs/my_run --output exported/my_run", ""),
    "fitting.md": ("sas-megatron fit points.csv", "--bootstraps 100"),
    "initial_weights.md": (
        "sas-megatron train configs/quickstart_mla.yaml parallel.tensor=1 attention.initialization=authors",
        "training.num_steps=5 schedule.warmup_steps=2",
    ),
    "kernels.md": ("python -m tests.attention.fused.compilation 16 3 128 192 3", ""),
    "layouts.md": ("sas-megatron estimate configs/quickstart_sas.yaml --world-size 2 --validate", ""),
    "modifiers.md": (
        "sas-megatron train configs/quickstart_gated.yaml parallel.tensor=1",
        "training.num_steps=5 schedule.warmup_steps=2",
    ),
    "monitoring.md": ("sas-megatron runs sync runs/125m/sas --tracker mlflow", ""),
    "reading_the_code.md": ("python -m tests.mutants --list", ""),
    "scale_study.md": ("sas-megatron study status configs/studies/scale/a.yaml", ""),
    "speed.md": ("sas-megatron bench attention", "--repeats 1"),
    "statistics.md": (
        "sas-megatron study report docs/studies/python_ablation/study.parquet --output runs/report",
        "--bootstraps 50",
    ),
    "studies.md": ("sas-megatron study plan configs/studies/python.yaml", ""),
    "tokenizers.md": (
        "sas-megatron tokenizer train builtin --kind bpe --vocab-size 8192 --output bpe/tokenizer.json",
        "--sample-bytes 1000000",
    ),
    "training.md": (
        "sas-megatron train configs/quickstart_mha.yaml parallel.tensor=1 logging.run_directory=runs/mha",
        "training.num_steps=25",
    ),
}
# The glossary has no commands.
PAGES_WITH_COMMANDS = {page.name for page in DOCS} - {"glossary.md"}


class Workspace:
    """A folder that looks like the checkout, in which commands may write files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for path in ROOT.iterdir():
            if path.name in ("configs", "docs", "launch", "sas_megatron", "tests") or path.is_file():
                (folder / path.name).symlink_to(path)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "SAS_MEGATRON_VENV": str(self._link_environment(folder / "environment")),
        }
        # tests/conftest.py sets it, and the compiler of the kernels does not run in the interpreter.
        self.environment.pop("TRITON_INTERPRET", None)

    def _link_environment(self, environment: Path) -> Path:
        """Let the scripts find this process's environment as the one that they would create."""
        environment.mkdir()
        for name in ("bin", "lib", "pyvenv.cfg"):
            (environment / name).symlink_to(Path(sys.prefix) / name)
        version = subprocess.run([sys.executable, "--version"], capture_output=True, text=True, check=True)
        setup = hashlib.sha256((ROOT / "setup.py").read_bytes()).hexdigest()[:16]
        (environment / "set_up_for_test").write_text(f"{setup} {version.stdout.strip()}", encoding="utf-8")
        return environment

    def run(self, command: str, more: str = "") -> str:
        """Run a documented command with more arguments and return its standard output."""
        words = [*shlex.split(command), *shlex.split(more)]
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=540
        )
        assert done.returncode == 0, f"{command} {more}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which the quickstart has run, and which contains the runs that the pages name."""
    found = Workspace(tmp_path_factory.mktemp("workspace"))
    printed = found.run(
        "launch/quickstart.sh", "--corpus-bytes 4000000 training.num_steps=20 schedule.warmup_steps=5"
    )
    assert "At equal FLOPs" in printed
    ladder = olmo_ladder()
    rows = zip(ladder.params, ladder.tokens, ladder.loss, strict=True)
    lines = ["params,tokens,loss", *(",".join(map(str, row)) for row in rows)]
    (found.folder / "points.csv").write_text("\n".join(lines), encoding="utf-8")
    for name in ("125m/sas", "my_run"):
        shutil.copytree(found.folder / "quickstart" / "runs" / "sas", found.folder / "runs" / name)
    found.run(
        "sas-megatron tokenizer train builtin --vocab-size 1024 --output data/tokenizer_1024.model",
        "--sample-bytes 1000000",
    )
    return found


def test_every_page_has_a_command_that_is_run() -> None:
    assert set(COMMANDS) == PAGES_WITH_COMMANDS


@pytest.mark.parametrize("page", sorted(COMMANDS))
def test_the_commands_that_are_run_are_those_of_the_page(page: str) -> None:
    documented = [command.text for path in PAGES if path.name == page for command in commands_of(path)]
    assert COMMANDS[page][0] in documented


@exhaustive
@pytest.mark.parametrize("page", sorted(COMMANDS))
def test_a_command_of_the_page_runs(page: str, workspace: Workspace) -> None:
    workspace.run(*COMMANDS[page])


@exhaustive
def test_the_test_command_of_the_readme_runs(workspace: Workspace) -> None:
    done = subprocess.run(
        ["tests/run.sh", "tests/config/test_errors.py"],
        cwd=ROOT,
        env=workspace.environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "processor time" in done.stdout + done.stderr
