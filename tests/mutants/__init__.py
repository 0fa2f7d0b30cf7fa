"""Mutation testing by hand-written faults: `python -m tests.mutants`.

    faults_*.py -> MUTANTS -> a fault applied to a copy of the checkout -> pytest on a few folders
      -> caught, by which test; or survived

Each fault changes one line of the product in a way that a user can observe. The faults were chosen by
reading only `sas_megatron/` and `launch/`, without knowledge of the tests that cover them.
"""

from pathlib import Path

from tests.mutants import faults_attention, faults_model, faults_scaling, faults_training
from tests.mutants.mutant import ROOT, Mutant

MUTANTS: tuple[Mutant, ...] = (
    *faults_attention.MUTANTS,
    *faults_model.MUTANTS,
    *faults_training.MUTANTS,
    *faults_scaling.MUTANTS,
)

# Test folders for a fault in a package, with the folder of the package itself first.
TEST_FOLDERS: dict[str, tuple[str, ...]] = {
    "attention": ("tests/attention", "tests/model", "tests/training"),
    "costs": ("tests/model", "tests/planning", "tests/training"),
    "distributed": ("tests/distributed", "tests/attention", "tests/training"),
    "fault_tolerance": ("tests/fault_tolerance", "tests/training", "tests/end_to_end"),
    "model": ("tests/model", "tests/planning", "tests/training"),
    "config": ("tests/config", "tests/model", "tests/training"),
    "io": ("tests/io", "tests/data", "tests/scaling"),
    "platform": ("tests/platform", "tests/training", "tests/end_to_end"),
    "planning": ("tests/planning", "tests/cli"),
    "training": ("tests/training", "tests/checkpoint", "tests/end_to_end"),
    "checkpoint": ("tests/checkpoint", "tests/training"),
    "data": ("tests/data", "tests/training"),
    "evaluation": ("tests/evaluation", "tests/cli"),
    "scaling": ("tests/scaling", "tests/cli"),
    "benchmarks": ("tests/benchmarks", "tests/cli"),
    "preflight": ("tests/preflight", "tests/cli"),
    "cli": ("tests/cli", "tests/end_to_end"),
    "tracking": ("tests/tracking", "tests/training"),
    "launch": ("tests/end_to_end", "tests/platform"),
}


def select_tests(mutant: Mutant) -> list[str]:
    """Return the test files and folders for a fault; those named after its module come first."""
    folders = TEST_FOLDERS[mutant.package]
    files = [path for folder in folders for path in (ROOT / folder).rglob(f"test_{mutant.path.stem}.py")]
    mirror = ROOT / "tests" / Path(*mutant.path.parts[1:-1])
    nearest = [*files, mirror] if mirror.is_dir() and not mutant.is_script else files
    return list(dict.fromkeys([*(str(path.relative_to(ROOT)) for path in nearest), *folders]))
