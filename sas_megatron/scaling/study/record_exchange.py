"""Export the finished runs of a study as compact records, and import records as finished runs.

With records, a study continues on another machine: runs whose records are imported count as done.

RECORDS/STUDY/RUN.json.gz     a finished run
RECORDS/STUDY/study.json.gz   learning rates, step times and layouts of the study
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import FileProblem, UserError, translate_os_errors
from sas_megatron.config.loading import find_differences, load_run_config
from sas_megatron.io.files import make_folder, save_file, write_files
from sas_megatron.scaling.runs import load_run
from sas_megatron.scaling.study import layouts, step_times, sweeps
from sas_megatron.scaling.study.collecting import collect
from sas_megatron.scaling.study.plan import Plan, PlannedRun
from sas_megatron.scaling.study.run_records import (
    ENDING,
    RUN_FILES,
    CompactRecord,
    build_run_record,
    read_record,
)
from sas_megatron.scaling.study.run_states import IGNORED_FIELDS, has_diverged, is_locked, is_settled
from sas_megatron.scaling.study.study_file import Study
from sas_megatron.scaling.study.study_table import StudyTable
from sas_megatron.scaling.study.sweeps import plan_with_rates
from sas_megatron.training.data_identity import remove_equal_data

# The name of the record of the study's own files; names of runs contain a hyphen.
STUDY_RECORD = "study"
STUDY_FILES = (sweeps.RECORD, step_times.RECORD, layouts.RECORD)
# An imported run keeps its record, which is exported again as it is.
KEPT_RECORD = f"record{ENDING}"


@dataclass(frozen=True)
class Exchange:
    """The runs that were exported or imported, those that were already there, and remarks."""

    folder: Path
    new: tuple[str, ...]
    known: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def records_folder(plan: Plan, folder: Path) -> Path:
    """Return the folder of a study's records in the folder of all records."""
    return folder / plan.directory.name


def export_records(plan: Plan, folder: Path) -> Exchange:
    """Write a record of each finished run, and one of the study's learning rates and step times.

    A record of the same run that exists is kept.

    Raises:
        UserError: No run has finished, a run is damaged, a file holds the record of another run, or a file
            cannot be written.
    """
    target = records_folder(plan, folder)
    finished = [run for run in plan.runs if is_settled(run)]
    if not finished:
        raise UserError(f"{plan.directory}: none of the study's {len(plan.runs)} runs has finished")
    contents: dict[Path, bytes] = {}
    new, known = [], []
    for run in finished:
        path = target / f"{run.name}{ENDING}"
        kept = run.directory / KEPT_RECORD
        if not has_diverged(run):
            load_run(run.directory)  # a damaged run is not exported
        record = read_record(kept) if kept.exists() else build_run_record(run.directory, study=target.name)
        if path.exists():
            if read_record(path).files["run.json"] != record.files["run.json"]:
                raise _another_run(path, run)
            known.append(run.name)
        else:
            contents[path] = record.compress()
            new.append(run.name)
    own = target / f"{STUDY_RECORD}{ENDING}"
    # Files that another machine exported are kept unless this one has its own.
    files = dict(read_record(own).files) if own.exists() else {}
    for name in STUDY_FILES:
        if (plan.directory / name).exists():
            files[name] = (plan.directory / name).read_text(encoding="utf-8")
    if files:
        contents[own] = CompactRecord(study=target.name, name=STUDY_RECORD, files=files).compress()
    with translate_os_errors(target, problem="cannot be written", remedy="choose another folder of records"):
        make_folder(target)
        write_files(contents)
    return Exchange(target, tuple(new), tuple(known))


def import_records(load_plan: Callable[[], Plan], folder: Path) -> Exchange:
    """Import the records of a study; every record is verified before the first run is added.

    Args:
        load_plan: Returns the current plan, which changes with imported learning rates.
        folder: The folder of all records.

    Raises:
        UserError: A record is damaged, or is not of a run that the study plans, or another run of that name
            exists; no run is added.
    """
    plan = load_plan()
    source = records_folder(plan, folder)
    paths = sorted(source.glob(f"*{ENDING}"))
    if not paths:
        raise FileProblem(source, "contains no records", "name the folder that `study export` wrote to")
    records = {path: read_record(path) for path in paths}
    own = source / f"{STUDY_RECORD}{ENDING}"
    new_files: list[Path] = []
    remarks: list[str] = []
    try:
        if own in records:
            remarks += _import_study_files(plan, own, records.pop(own), new_files)
        exchange = _import_runs(load_plan(), source, records)
    except BaseException:
        for path in new_files:
            path.unlink(missing_ok=True)
        raise
    return dataclasses.replace(exchange, remarks=(*remarks, *exchange.remarks))


def collect_records(study: Study, base: dict[str, Any], folder: Path) -> StudyTable:
    """Return the table of a study's records; the study's directory is neither read nor written.

    Raises:
        UserError: As for `import_records` and `collect`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        directory = str(Path(temporary) / Path(study.directory).name)
        moved = study.model_copy(update={"directory": directory})
        import_records(lambda: plan_with_rates(moved, base), folder)
        table = collect(plan_with_rates(moved, base))
        remarks = tuple(remark.replace(f"{temporary}/", "") for remark in table.remarks)
        return dataclasses.replace(table, remarks=remarks)


def _import_runs(plan: Plan, source: Path, records: Mapping[Path, CompactRecord]) -> Exchange:
    runs = {run.name: run for run in plan.runs}
    available = {record.name for record in records.values()}
    new, known, remarks = [], [], []
    with _staging(plan) as staging:
        for path, record in records.items():
            run = runs.get(record.name)
            if run is None or path.name != f"{record.name}{ENDING}":
                raise FileProblem(
                    path,
                    f"is the record of {record.name}, which is not a run of this study",
                    "restore the study file, or remove the record",
                )
            if run.role == "trunk" and not _has_all_branches(run, plan, available):
                remarks.append(f"{run.name} was not imported, since its branches need its checkpoints")
            elif _is_known(path, record, run):
                known.append(run.name)
            else:
                _stage(path, record, run, staging / run.name)
                new.append(run.name)
        with translate_os_errors(plan.directory, problem="cannot be written", remedy="free disk space"):
            for name in new:
                make_folder(runs[name].directory.parent)
                os.replace(staging / name, runs[name].directory)
    return Exchange(source, tuple(new), tuple(known), tuple(remarks))


@contextlib.contextmanager
def _staging(plan: Plan) -> Iterator[Path]:
    """Yield a folder on the file system of the runs, which is removed at the end."""
    folder = plan.directory / f".importing.{os.getpid()}"
    with translate_os_errors(folder, problem="cannot be written", remedy="free disk space"):
        make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _import_study_files(plan: Plan, path: Path, record: CompactRecord, new_files: list[Path]) -> list[str]:
    """Write the study's files that do not exist here, add them to `new_files`, and return remarks.

    Raises:
        FileProblem: The study has other learning rates here, or a file cannot be written.
    """
    remarks = []
    for name, content in record.files.items():
        local = plan.directory / name
        if name not in STUDY_FILES:
            raise FileProblem(path, f"contains an unknown file {name}", "export the study again")
        if not local.exists():
            save_file(local, content, remedy="choose another --directory")
            new_files.append(local)
        elif local.read_text(encoding="utf-8") != content:
            if name == sweeps.RECORD:
                raise FileProblem(
                    path,
                    f"has other learning rates than {local}",
                    "choose another --directory, or remove that",
                )
            remarks.append(f"{local} is kept, and differs from that of the records")
    return remarks


def _has_all_branches(trunk: PlannedRun, plan: Plan, available: set[str]) -> bool:
    return all(run.name in available or is_settled(run) for run in plan.runs if run.trunk == trunk.name)


def _is_known(path: Path, record: CompactRecord, run: PlannedRun) -> bool:
    """Return whether the run of a record is in its directory already.

    Raises:
        FileProblem: The directory holds another run, or one that has not finished.
    """
    if is_settled(run):
        if (run.directory / "run.json").read_text(encoding="utf-8") == record.files.get("run.json"):
            return True
        raise _another_run(path, run)
    if run.directory.exists() or is_locked(run):
        raise FileProblem(
            path,
            f"is the record of a run that was started here ({run.directory}) and has not finished",
            "stop that run and remove its directory, or remove the record",
        )
    return False


def _another_run(path: Path, run: PlannedRun) -> FileProblem:
    return FileProblem(
        path, f"is the record of another run than that in {run.directory}", "remove one of them"
    )


def _stage(path: Path, record: CompactRecord, run: PlannedRun, folder: Path) -> None:
    """Write the files of a record to a folder and check that they are the planned run.

    Raises:
        FileProblem: A file is missing or damaged, or a field that affects the result differs from the plan.
    """
    remedy = "use the study file with which the run was trained, or remove the record"
    if not set(record.files) <= set(RUN_FILES):
        raise FileProblem(path, f"contains unknown files {sorted(record.files)}", remedy)
    contents: dict[Path, str | bytes] = {folder / name: text for name, text in record.files.items()}
    with translate_os_errors(folder, problem="cannot be written", remedy="free disk space"):
        make_folder(folder)
        write_files({**contents, folder / KEPT_RECORD: path.read_bytes()})
    staged = dataclasses.replace(run, config=run.config.replaced({"logging.run_directory": str(folder)}))
    try:
        config = load_run_config(folder / "config.yaml") if has_diverged(staged) else load_run(folder).config
    except FileProblem as error:
        name = Path(str(error.path)).name
        raise FileProblem(path, f"contains a {name} that {error.problem}", "export the run again") from None
    differences = find_differences([run.config, config], ignored=IGNORED_FIELDS)
    for field, (planned, found) in remove_equal_data(differences, run.config, folder).items():
        raise FileProblem(
            path, f"is the record of a run with {field}={found}, but the study plans {planned}", remedy
        )
