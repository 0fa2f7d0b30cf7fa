"""The command `python -m tests.mutants`."""

from __future__ import annotations

import concurrent.futures
import queue
import signal
import tempfile
import threading
from collections import Counter
from pathlib import Path

import click

from tests.mutants import MUTANTS, TEST_FOLDERS, select_tests
from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.results import Result, append_result, format_table, read_results, summarize
from tests.mutants.running import Interrupted, Scratch, Selection, describe_commit

DEFAULT_RESULTS = Path(tempfile.gettempdir()) / "sas_megatron_mutants.jsonl"


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "all_tests", is_flag=True, help="Run the full selection of tests for each fault.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Number of faults that run at the same time.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_RESULTS,
    show_default=True,
    help="File to which results are appended, as JSON lines. Faults with a result for the same commit and "
    "selection are not run again.",
)
@click.option(
    "--table", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table to this file."
)
@click.option(
    "--limit-minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=90.0,
    show_default=True,
    help="Time limit of the tests for one fault; at the limit the fault counts as caught. pytest ends a "
    "hanging test earlier, by its own limit.",
)
@click.option(
    "--no-baseline",
    is_flag=True,
    help="Do not repeat a failing test without the fault. By default, a test that fails again is deselected.",
)
@click.option("--list", "only_list", is_flag=True, help="List the faults without running tests.")
def main(
    names: tuple[str, ...],
    *,
    all_tests: bool,
    jobs: int,
    results: Path,
    table: Path | None,
    limit_minutes: float,
    no_baseline: bool,
    only_list: bool,
) -> None:
    """Apply faults to a copy of the checkout, one at a time, and report which of them the tests detect.

    NAME is a fault or a package, such as attention or launch; without names, all faults are run. For each
    fault, the test folders of its package run until a test fails; files and folders named after its module
    run first. Faults of different packages alternate, so that an interrupted run has covered every package.
    Run the command again to continue.

    The exit status is 0 if the tool ran, regardless of the outcomes.
    """
    mutants = choose_mutants(names)
    if only_list:
        for mutant in mutants:
            click.echo(f"{mutant.name} ({mutant.package}): {mutant.fault}")
        return
    commit, selection = describe_commit(), "all" if all_tests else "default"
    known = read_results(results, commit=commit, selection=selection)
    pending = [mutant for mutant in mutants if mutant.name not in known]
    click.echo(f"{len(mutants)} faults, {len(mutants) - len(pending)} of them recorded in {results}")
    settings = Selection(all_tests, limit_seconds=60 * limit_minutes, confirms=not no_baseline)
    if not run_mutants(pending, settings, results, jobs=jobs, commit=commit, selection=selection):
        click.echo("interrupted; run the command again to continue")
    found = read_results(results, commit=commit, selection=selection)
    chosen = [found[mutant.name] for mutant in mutants if mutant.name in found]
    report = f"{format_table(chosen)}\n{summarize(chosen)}\n"
    click.echo(report, nl=False)
    if table is not None:
        table.write_text(report, encoding="utf-8")


def choose_mutants(names: tuple[str, ...]) -> list[Mutant]:
    """Return the faults with these names or of these packages, or all; the packages alternate.

    Raises:
        UsageError: A name is neither a fault nor a package.
    """
    known = {mutant.name for mutant in MUTANTS} | TEST_FOLDERS.keys()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"no fault or package is named {', '.join(unknown)}; --list names the faults")
    chosen = [mutant for mutant in MUTANTS if not names or {mutant.name, mutant.package} & {*names}]
    counts = Counter[str]()
    positions = {}
    for mutant in chosen:
        positions[mutant.name] = counts[mutant.package]
        counts[mutant.package] += 1
    return sorted(chosen, key=lambda mutant: positions[mutant.name])


def run_mutants(
    mutants: list[Mutant], settings: Selection, results: Path, *, jobs: int, commit: str, selection: str
) -> bool:
    """Run the faults, `jobs` at a time, and append their results; return whether all were run."""
    for mutant in mutants:  # a fault that does not apply is an error before any tests run
        mutant.mutate((ROOT / mutant.path).read_text(encoding="utf-8"))
    stop, lock = threading.Event(), threading.Lock()
    remaining: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        remaining.put(mutant)

    def work(folder: Path) -> None:
        try:
            measure_remaining(Scratch(folder, settings, stop))
        except BaseException:
            stop.set()
            raise

    def measure_remaining(scratch: Scratch) -> None:
        while not stop.is_set():
            try:
                mutant = remaining.get_nowait()
                measured = scratch.measure(mutant, select_tests(mutant))
            except (queue.Empty, Interrupted):
                return
            result = Result(
                name=mutant.name,
                package=mutant.package,
                fault=mutant.fault,
                outcome=measured.outcome,
                test=measured.test,
                seconds=round(measured.seconds, 1),
                commit=commit,
                selection=selection,
            )
            with lock:
                append_result(results, result)
                by = f" by {result.test}" if result.test else ""
                click.echo(f"{mutant.name}: {result.outcome}{by}, {result.seconds:.0f} s")

    with (
        tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        workers = [pool.submit(work, Path(folder) / str(number)) for number in range(jobs)]
        for worker in workers:
            worker.result()
    return not stop.is_set()


if __name__ == "__main__":
    main()
