"""Tests that jobs and nodes share sample indices, which are built once and never visible half written."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout
from tests.small_data import SmallData

NUM_SAMPLES = 300


def config_of(small_data: SmallData, index_cache: Path) -> RunConfig:
    """Return a config with a blend of two prefixes, so that both kinds of indices are built."""
    prefixes = [str(small_data.prefix)] * 2
    return small_data.run(
        index_cache.parent,
        data={"prefixes": prefixes, "weights": [3.0, 1.0], "index_cache": str(index_cache)},
    )


def read_samples(config: RunConfig, saved: Path, has_locks: bool) -> str:
    """Return a digest of all samples on a rank. Saves are slowed down, and each is listed in `saved`."""
    import fcntl

    import numpy

    from sas_megatron.data.batches import build_training_samples
    from sas_megatron.data.token_files import open_token_files

    in_layout(config.parallel)
    original_save, original_flock = numpy.save, fcntl.flock

    def save_slowly(path: str, array: Any, **options: Any) -> None:
        original_save(path, array, **options)
        content = Path(path).read_bytes()
        with Path(path).open("wb") as file, saved.open("a") as names:
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(0.05)
            file.write(content[len(content) // 2 :])
            print(Path(path).name, file=names)

    def refuse(*_arguments: Any) -> None:
        raise OSError("no locks here")

    numpy.save, fcntl.flock = save_slowly, original_flock if has_locks else refuse
    try:
        tokenizer = open_token_files(config.data, vocab_size=512)
        samples = build_training_samples(config.data, tokenizer, num_samples=NUM_SAMPLES, seed=1)
    finally:
        numpy.save, fcntl.flock = original_save, original_flock
    digest = hashlib.sha256()
    for index in range(NUM_SAMPLES):
        digest.update(samples[index]["tokens"].numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("has_locks", [True, False])
def test_concurrent_jobs_share_an_index_built_by_one_of_them(
    ranks: Any, small_data: SmallData, tmp_path: Path, has_locks: bool
) -> None:
    cache, saved = tmp_path / "cache", tmp_path / "saved"
    config = config_of(small_data, cache)
    jobs = [ranks(1), ranks(2), ranks(4)]
    for job in jobs:
        job.run(os.getpid)  # wait until the processes run, so that the jobs start at the same time
    with concurrent.futures.ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda job: job.run(read_samples, config, saved, has_locks), jobs))
    assert len({digest for job in read for digest in job}) == 1
    (folder,) = cache.iterdir()  # no lock file and no temporary folder
    arrays = sorted(path.name for path in folder.glob("*.npy"))
    assert {name.split("-")[1] for name in arrays} == {"GPTDataset", "BlendedDataset"}
    names = saved.read_text().splitlines()
    if has_locks:
        assert sorted(names) == arrays, "each array is saved once"
    else:
        assert len(names) > len(arrays), "without locks several jobs must have built the index"
    saved.unlink()
    assert ranks(2).run(read_samples, config, saved, has_locks) == read[1]
    assert not saved.exists(), "an existing index is not built again"


def read_on_nodes_of_two(small_data: SmallData, folder: Path) -> str:
    """Read samples on a rank as if ranks 0 and 1 shared one disk and ranks 2 and 3 another."""
    import torch.distributed as dist

    from sas_megatron.data import index_cache

    original = index_cache.BLOCK_BYTES, index_cache.SECONDS_UNTIL_VISIBLE
    index_cache.BLOCK_BYTES, index_cache.SECONDS_UNTIL_VISIBLE = 5000, 0.1
    cache = folder / f"disk_{dist.get_rank() // 2}" / "cache"
    try:
        return read_samples(config_of(small_data, cache), folder / "saved", True)
    finally:
        index_cache.BLOCK_BYTES, index_cache.SECONDS_UNTIL_VISIBLE = original


def test_node_that_does_not_see_the_index_of_rank_0_gets_a_copy(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    digests = ranks(4).run(read_on_nodes_of_two, small_data, tmp_path)
    assert len(set(digests)) == 1
    first, second = (
        {path.relative_to(disk): path.read_bytes() for path in disk.rglob("*") if path.is_file()}
        for disk in (tmp_path / "disk_0", tmp_path / "disk_1")
    )
    assert max(map(len, first.values())) > 7000, "more than one block"
    assert first == second
    assert len((tmp_path / "saved").read_text().splitlines()) == len([p for p in first if p.suffix == ".npy"])


def test_every_rank_names_a_cache_that_cannot_be_written(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    message = (
        f"data.index_cache={tmp_path}/cache: cannot be written on {socket.gethostname()} (Not a directory)"
    )
    with pytest.raises(AssertionError) as failure:
        ranks(2).run(read_samples, config_of(small_data, tmp_path / "cache"), tmp_path / "saved", True)
    assert str(failure.value).count(message) == 2
