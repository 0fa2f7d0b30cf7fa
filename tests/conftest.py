"""Fixtures for all tests: ranks, started once for each world size, and a home of their own."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rank_pool import RankPool
from tests.small_data import SmallData

os.environ["OMP_NUM_THREADS"] = "1"
if not Path("/dev/nvidiactl").exists():
    # Triton's kernels run in its interpreter; it looks as they are defined, so before anything is imported.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """What tests/run.sh --all adds."""
    parser.addoption(
        "--whole-table",
        action="store_true",
        help="Run the table of layouts with every attention, and what takes long, or a quiet machine.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marks of those."""
    config.addinivalue_line("markers", "longer: runs with --whole-table alone")
    config.addinivalue_line("markers", "sampled(every): all but every so many-th case is a longer test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a sampled table's cases the first, and each `every`-th after it, stay in the default run."""
    counts = Counter[str]()
    for item in items:
        if sampled := item.get_closest_marker("sampled"):
            table = item.nodeid.partition("[")[0]
            if counts[table] % sampled.kwargs["every"]:
                item.add_marker(pytest.mark.longer)
            counts[table] += 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves them out otherwise."""
    if item.get_closest_marker("longer") and not item.config.getoption("--whole-table"):
        pytest.skip("a longer test, of tests/run.sh --all")


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(P)` is a pool of P processes."""
    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool_of
    for pool in pools.values():
        pool.close()


def _prepare() -> None:
    from sas_megatron.platform.device import prepare_device

    prepare_device()


@pytest.fixture(scope="session")
def simulator() -> Iterator[Callable[..., Any]]:
    """A process that is in no process group, to simulate ranks in.

    `simulator(function, *args)` is what the function returns there.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=_prepare) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    """Token files of 400 kB of the built-in corpus, made once."""
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
