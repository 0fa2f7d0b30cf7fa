"""Options and fixtures of all tests; `ranks` starts processes once for each world size."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.file_costs import FileCosts
from tests.fork_server import fork_context, stop_fork_server
from tests.rank_pool import RankPool
from tests.selection import parse_part, select
from tests.small_data import SmallData

os.environ["OMP_NUM_THREADS"] = "1"
if not Path("/dev/nvidiactl").exists():
    # Run Triton's kernels in its interpreter. Triton reads the variable when the kernels are defined.
    os.environ["TRITON_INTERPRET"] = "1"


ROOT = Path(__file__).parents[1]
# These folders contain the longest files and start first, so that no worker starts one at the end.
LONGEST = ("tests/end_to_end/", "tests/checkpoint/", "tests/training/", "tests/model/", "tests/planning/")
_part = pytest.StashKey[tuple[int, int] | None]()
_num_deselected = pytest.StashKey[int]()
_model_code = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def _priority(item: pytest.Item) -> int:
    folders = (index for index, folder in enumerate(LONGEST) if item.nodeid.startswith(folder))
    return next(folders, len(LONGEST))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that tests/run.sh passes."""
    parser.addoption("--all", action="store_true", help="Run every test, including tests that take minutes.")
    parser.addoption("--part", metavar="I/N", help="Run the I-th of N disjoint parts of the test files.")
    parser.addoption(
        "--install-system-packages",
        action="store_true",
        help="Install the Debian packages of the selected tests (tests/install_system_packages.sh).",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks, and record the processor time of each file."""
    config.addinivalue_line("markers", "exhaustive: runs only with --all")
    config.addinivalue_line("markers", "system_packages(*names): uses these Debian packages")
    config.stash[_part] = None
    if text := config.getoption("--part"):
        try:
            config.stash[_part] = parse_part(text)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
    # With workers, only the workers record: the controller also reports their tests, and its children are the
    # workers.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.register(FileCosts())
    # transformers copies the code of exported models to a cache, under names that test processes would share.
    config.stash[_model_code] = tempfile.TemporaryDirectory(prefix="sas_megatron_model_code_")
    os.environ["HF_MODULES_CACHE"] = config.stash[_model_code].name
    config.stash[_num_deselected] = 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that run only with --all, and install the packages of the others."""
    selected, deselected = select(items, run_all=config.getoption("--all"), part=config.stash[_part])
    config.stash[_num_deselected] = len(deselected)
    if hasattr(config, "workeroutput"):
        selected.sort(key=_priority)
        config.workeroutput["num_deselected"] = len(deselected)
    kept = set(selected)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = selected
    packages = {name for item in items for mark in item.iter_markers("system_packages") for name in mark.args}
    if packages and config.getoption("--install-system-packages"):
        subprocess.run(["tests/install_system_packages.sh", *sorted(packages)], cwd=ROOT, check=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Read the number of deselected tests from a worker; every worker collects all tests."""
    node.config.stash[_num_deselected] = getattr(node, "workeroutput", {}).get("num_deselected", 0)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the fork server and remove the cache of model code."""
    stop_fork_server()
    if _model_code in config.stash:
        config.stash[_model_code].cleanup()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the number of tests that run only with --all."""
    if count := terminalreporter.config.stash[_num_deselected]:
        terminalreporter.write_line(f"{count} tests run only with tests/run.sh --all")


@pytest.fixture(autouse=True)
def _unconfigured_logging() -> None:
    """Start each test without what a command that ran in this process has set (`configure_logging`)."""
    logging.getLogger("sas_megatron").setLevel(logging.NOTSET)
    for handler in logging.getLogger().handlers:
        handler.filters.clear()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """Return a function: `ranks(P)` is a pool of P processes."""
    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool_of
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def separate_process() -> Iterator[Callable[..., Any]]:
    """A process that has joined no process group, for estimates of ranks.

    Calling `separate_process(function, *args)` returns the result of the function in that process.
    """
    with concurrent.futures.ProcessPoolExecutor(1, fork_context()) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    """Return token files of 400 kB of the built-in corpus."""
    from sas_megatron.data.corpus import builtin_corpus
    from sas_megatron.data.documents import stream_documents
    from sas_megatron.data.prepare import prepare_token_files
    from sas_megatron.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("small_data")
    corpus = builtin_corpus(folder, max_bytes=400_000)
    tokenizer, prefix = folder / "tokenizer.model", folder / "text"
    train_tokenizer(stream_documents([corpus]), vocab_size=512, model_path=tokenizer)
    prepare_token_files([corpus], tokenizer_path=tokenizer, prefix=prefix, num_workers=1)
    return SmallData(prefix, tokenizer)
