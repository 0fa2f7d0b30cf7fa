"""Submission of a study's runs as SLURM job arrays, with launch/slurm_study.sbatch.

trunks and single runs -> one array          branches -> one array per budget; a member depends on its trunk's

The job of each run is recorded in `jobs.json`; its state is queried from SLURM.
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
from sas_megatron.scaling.study.recorded import JobsRecord, read_recorded
from sas_megatron.scaling.study.run_states import check_config, find_dependency, is_locked, is_settled
from sas_megatron.scaling.study.runner import write_config

SCRIPT = Path("launch/slurm_study.sbatch")
JOBS = "jobs.json"


@dataclass(frozen=True)
class Job:
    """A member of a job array: its SLURM number, such as 12_3, and the path of its output."""

    number: str
    log: Path


def read_jobs(plan: Plan) -> dict[str, Job]:
    """Return the last job of each submitted run, by the name of the run.

    Raises:
        FileProblem: The record of the jobs is damaged.
    """
    remedy = "restore it from a copy, or remove it if no job of the study is queued"
    record = read_recorded(plan.directory / JOBS, JobsRecord, remedy=remedy)
    jobs = {} if record is None else record.root
    return {name: Job(job.number, Path(job.log)) for name, job in jobs.items()}


def find_queued_runs(plan: Plan) -> frozenset[str]:
    """Return the names of the runs whose jobs are pending or running; empty if nothing was submitted.

    Raises:
        UserError: SLURM cannot be queried.
    """
    jobs = read_jobs(plan)
    if not jobs:
        return frozenset()
    # %F_%K: array and member; --array: one line per member, pending ones included.
    numbers = set(_call(["squeue", "--noheader", "--array", "--format=%F_%K"]).split())
    return frozenset(name for name, job in jobs.items() if job.number in numbers)


def submit(plan: Plan, *, options: Sequence[str], max_parallel: int | None) -> dict[str, Job]:
    """Submit the runs that are not finished and have no job; the working directory must be the checkout.

    Args:
        plan: The plan of the study.
        options: Further options of sbatch: nodes, partition, time.
        max_parallel: Maximum number of members of an array that run at the same time; None: no limit.

    Returns:
        The new jobs by run. Jobs of branches depend on the jobs of their trunks.

    Raises:
        UserError: The working directory is not the checkout, SLURM rejects a job, or a run directory contains
            another run.
    """
    if not SCRIPT.exists():
        raise FileProblem(SCRIPT, "does not exist here", "submit from a checkout of sas_megatron")
    queued = find_queued_runs(plan)
    pending = [
        run
        for run in plan.runs
        if run.is_ready and run.name not in queued and not is_settled(run) and not is_locked(run)
    ]
    for run in pending:
        check_config(run)
    can_start = [run for run in pending if find_dependency(run) is None]
    jobs = _Arrays(plan, options=options, max_parallel=max_parallel)
    jobs.add("first", can_start)
    # A branch can depend on the job of its trunk only, submitted now or earlier.
    waiting = [run for run in pending if run not in can_start]
    for budget in plan.study.budgets.values:
        jobs.add_after_trunks(f"budget-{budget:g}", [run for run in waiting if run.budget == budget])
    return jobs.new


class _Arrays:
    """Submits job arrays and records the jobs of each before the next is submitted."""

    def __init__(self, plan: Plan, *, options: Sequence[str], max_parallel: int | None) -> None:
        self._folder = plan.directory
        self._options = list(options)
        self._limit = "" if max_parallel is None else f"%{max_parallel}"
        self._jobs = read_jobs(plan)
        self.new: dict[str, Job] = {}

    def add(self, name: str, runs: Sequence[PlannedRun]) -> None:
        """Submit one array without dependencies."""
        self._submit(name, dict(enumerate(runs, 1)), after=None)

    def add_after_trunks(self, name: str, runs: Sequence[PlannedRun]) -> None:
        """Submit one array per array of trunks; a member has the same index as its trunk's job."""
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
            # SLURM cancels a branch whose trunk has failed.
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
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=120
        ).stdout
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: is not installed; use `sas-megatron study run`, or a login node of a cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: SLURM did not respond within two minutes; try again") from None
    except subprocess.CalledProcessError as error:
        message = " ".join(error.stderr.split())
        raise UserError(
            f"{' '.join(command)}: SLURM reported an error ({message}); change the options for sbatch"
        ) from None
