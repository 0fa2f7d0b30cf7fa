"""A study's runs as SLURM job arrays, by launch/slurm_study.sbatch.

trunks and lone runs -> one array          branches -> one for each budget, each member after its trunk's

Which job is a run's stands in `jobs.json`; what has become of it, SLURM is asked.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sas_megatron.config.errors import FileProblem, UserError, translate_os_errors
from sas_megatron.io.files import make_folder, save_file
from sas_megatron.scaling.study.plan import Plan, PlannedRun
from sas_megatron.scaling.study.run_states import check_as_planned, is_locked, is_settled, what_it_waits_for
from sas_megatron.scaling.study.runner import write_config

SCRIPT = Path("launch/slurm_study.sbatch")
JOBS = "jobs.json"


@dataclass(frozen=True)
class Job:
    """A member of an array: its number as SLURM has it, such as 12_3, and where its output goes."""

    number: str
    log: Path


def read_jobs(plan: Plan) -> dict[str, Job]:
    """The last job of each run that was submitted, by the run's name."""
    path = Path(plan.study.directory) / JOBS
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return {name: Job(job["number"], Path(job["log"])) for name, job in record.items()}


def live_runs(plan: Plan) -> frozenset[str]:
    """Runs whose jobs wait in SLURM's queue or are at work; none where nothing was submitted.

    Raises:
        UserError: SLURM cannot be asked.
    """
    jobs = read_jobs(plan)
    if not jobs:
        return frozenset()
    # %F_%K: array and member; -r: a line for each member that waits, too.
    numbers = set(_call(["squeue", "--noheader", "--array", "--format=%F_%K"]).split())
    return frozenset(name for name, job in jobs.items() if job.number in numbers)


def submit(plan: Plan, *, options: Sequence[str], side_by_side: int | None) -> dict[str, Job]:
    """Submits what is not finished and has no job; must run in the checkout.

    Args:
        plan: The study's.
        options: More of sbatch's: nodes, partition, time.
        side_by_side: Members of an array at work at once; None: as many as SLURM will.

    Returns:
        The jobs that are new, by run; branches of unfinished trunks wait for them.

    Raises:
        UserError: not in the checkout, SLURM refuses, or a run directory holds another run.
    """
    if not SCRIPT.exists():
        raise FileProblem(SCRIPT, "is not here", "submit in the checkout of sas_megatron, which has launch/")
    live = live_runs(plan)
    pending = [
        run
        for run in plan.runs
        if run.is_ready and run.name not in live and not is_settled(run) and not is_locked(run)
    ]
    for run in pending:
        check_as_planned(run)
    can_start = [run for run in pending if what_it_waits_for(run) is None]
    jobs = _Arrays(plan, options=options, side_by_side=side_by_side)
    jobs.add("first", can_start)
    # Only the trunk's own job can be waited for: submitted now, or before.
    waiting = [run for run in pending if run not in can_start]
    for budget in plan.study.budgets.values:
        jobs.add_after_trunks(f"budget-{budget:g}", [run for run in waiting if run.budget == budget])
    return jobs.new


class _Arrays:
    """Submits arrays, and writes each one's jobs down before the next is submitted."""

    def __init__(self, plan: Plan, *, options: Sequence[str], side_by_side: int | None) -> None:
        self._folder = Path(plan.study.directory)
        self._options = list(options)
        self._limit = "" if side_by_side is None else f"%{side_by_side}"
        self._jobs = read_jobs(plan)
        self.new: dict[str, Job] = {}

    def add(self, name: str, runs: Sequence[PlannedRun]) -> None:
        """One array without dependencies."""
        self._submit(name, dict(enumerate(runs, 1)), after=None)

    def add_after_trunks(self, name: str, runs: Sequence[PlannedRun]) -> None:
        """For each array that holds trunks of theirs, one whose members have the numbers of their trunks."""
        by_array: dict[str, dict[int, PlannedRun]] = {}
        for run in runs:
            job = self._jobs.get(run.trunk or "")
            if job is not None:
                array, _, member = job.number.partition("_")
                by_array.setdefault(array, {})[int(member)] = run
        for array, members in by_array.items():
            self._submit(f"{name}-after-{array}", members, after=array)

    def _submit(self, name: str, members: dict[int, PlannedRun], *, after: str | None) -> None:
        if not members:
            return
        logs = (self._folder / "logs").absolute()
        lines = [""] * max(members)
        for member, run in members.items():
            lines[member - 1] = shlex.quote(str(write_config(run)))
        listed = self._folder / "configs" / f"{name}.txt"
        remedy = "choose another directory in the study file"
        with translate_os_errors(logs, problem="cannot be written", remedy=remedy):
            make_folder(logs)
        save_file(listed, "".join(f"{line}\n" for line in lines), remedy=remedy)
        command = [
            *("sbatch", "--parsable", f"--array={','.join(map(str, sorted(members)))}{self._limit}"),
            f"--output={logs}/slurm-%A_%a.out",
            # A branch whose trunk has failed will never start.
            *([f"--dependency=aftercorr:{after}", "--kill-on-invalid-dep=yes"] if after else []),
            *self._options,
            *(str(SCRIPT), str(listed)),
        ]
        array = _call(command).strip().split(";")[0]
        for member, run in members.items():
            self.new[run.name] = Job(f"{array}_{member}", logs / f"slurm-{array}_{member}.out")
        self._jobs |= self.new
        record = {run: {"number": job.number, "log": str(job.log)} for run, job in self._jobs.items()}
        save_file(self._folder / JOBS, json.dumps(record, indent=2) + "\n", remedy=remedy)


def _call(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: is not installed here; use `sas-megatron study run`, or a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: SLURM did not answer in two minutes; try again") from None
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())
        raise UserError(
            f"{' '.join(command)}: SLURM refuses ({said}); change the options for sbatch"
        ) from None
