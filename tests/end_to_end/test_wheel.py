"""The wheel contains the configs, and the installed package finds them in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.selection import exhaustive

SOURCES = ("sas_megatron", "configs", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that is built from a copy of the sources, since the build writes next to them."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, sources / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, sources, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the scripts' folder of a new environment with the wheel.

    The environment imports the dependencies from this one. A path file adds the folder of the dependencies
    only, so an editable installation of the checkout there has no effect.
    """
    environment = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(environment, symlinks=True)
    scripts = environment / "bin"
    install = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--no-deps"]
    run(*install, "--no-index", "--quiet", wheel, cwd=environment)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    return scripts


def run(*command: object, cwd: Path, seconds: float = 120) -> str:
    """Run a command without the checkout on the module path and return its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_wheel_contains_the_package_and_all_configs_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs
    assert {f"sas_megatron/{path}" for path in configs} <= names
    modules = {path.relative_to(ROOT) for path in (ROOT / "sas_megatron").rglob("*.py")}
    assert set(map(str, modules)) <= names
    assert {"sas_megatron/py.typed", "sas_megatron/planning/hardware/h100.yaml"} <= names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"sas_megatron"}


def test_the_installed_package_loads_every_shipped_config_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    paths = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "bases"]
    names = [str(path.relative_to(ROOT)) for path in paths]
    script = (
        "import sas_megatron\n"
        "from sas_megatron.config.loading import load_run_config\n"
        "from sas_megatron.scaling.study.study_file import load_study\n"
        f"for name in {names!r}:\n"
        "    (load_study if '/studies/' in name else load_run_config)(name)\n"
        "print(sas_megatron.__file__)\n"
    )
    imported = Path(run(installed / "python", "-c", script, cwd=tmp_path).strip())
    assert imported.is_relative_to(installed.parent)


def test_the_installed_command_plans_a_shipped_study_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    study = "configs/studies/python_ablation.yaml"
    plan = json.loads(run(installed / "sas-megatron", "study", "plan", study, "--json", cwd=tmp_path))
    assert len(plan["runs"]) == 21


def test_a_config_in_the_working_directory_is_preferred(installed: Path, tmp_path: Path) -> None:
    own = tmp_path / "configs" / "quickstart_mha.yaml"
    own.parent.mkdir()
    shipped = (ROOT / "configs" / "quickstart_mha.yaml").read_text(encoding="utf-8")
    own.write_text(shipped.replace("num_layers: 4", "num_layers: 7"), encoding="utf-8")
    printed = run(
        installed / "sas-megatron", "train", "configs/quickstart_mha.yaml", "--dry-run", cwd=tmp_path
    )
    assert "num_layers: 7" in printed


@exhaustive
@pytest.mark.timeout(900)
def test_the_installed_command_runs_quickstart_benchmarks_and_a_study_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    command = installed / "sas-megatron"
    options = ["--corpus-bytes", "4000000", "training.num_steps=20", "schedule.warmup_steps=5"]
    run(command, "quickstart", *options, cwd=tmp_path, seconds=300)
    assert (tmp_path / "quickstart" / "comparison.html").is_file()

    run(command, "bench", "attention", "--repeats", "1", "--json", cwd=tmp_path)
    run(command, "bench", "scoring", "--num-tokens", "2000", "--repeats", "1", "--json", cwd=tmp_path)
    loop = ["configs/quickstart_sas.yaml", "parallel.tensor=1", "--steps", "2", "--json"]
    run(command, "bench", "loop", *loop, cwd=tmp_path)

    tokenizer = "data/tokenizer_1024.model"
    run(command, "tokenizer", "train", "builtin", "--vocab-size", "1024", "--output", tokenizer, cwd=tmp_path)
    prepare = ["builtin", "--tokenizer", tokenizer, "--output", "data/python_1024"]
    run(command, "data", "prepare", *prepare, cwd=tmp_path)
    study = "configs/studies/python_ablation.yaml"
    run(command, "study", "run", study, "--only", "mha-*-s1234", cwd=tmp_path, seconds=300)
    (summary,) = tmp_path.glob("runs/study_python_ablation/runs/*/summary.json")
    assert json.loads(summary.read_text(encoding="utf-8"))
