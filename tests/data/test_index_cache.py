"""Jobs and nodes share sample indices: built once, never seen half written, handed out where absent."""

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
    """A blend, so that indices of both kinds are built."""
    prefixes = [str(small_data.prefix)] * 2
    return small_data.run(
        index_cache.parent,
        data={"prefixes": prefixes, "weights": [3.0, 1.0], "index_cache": str(index_cache)},
    )


def read_samples(config: RunConfig, saved: Path, has_locks: bool) -> str:
    """On a rank: a digest of all samples, where files come slowly to disk; each save is noted in `saved`."""
    import fcntl

    import numpy

    from sas_megatron.data.batches import build_training_samples
    from sas_megatron.data.token_files import open_token_files

    in_layout(config.parallel)
    kept_save, kept_flock = numpy.save, fcntl.flock

    def save_slowly(path: str, array: Any, **options: Any) -> None:
        kept_save(path, array, **options)
        content = Path(path).read_bytes()
        with Path(path).open("wb") as file, saved.open("a") as notes:
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(0.05)
            file.write(content[len(content) // 2 :])
            print(Path(path).name, file=notes)

    def refuse(*_arguments: Any) -> None:
        raise OSError("no locks here")

    numpy.save, fcntl.flock = save_slowly, kept_flock if has_locks else refuse
    try:
        tokenizer = open_token_files(config.data, vocab_size=512)
        samples = build_training_samples(config.data, tokenizer, num_samples=NUM_SAMPLES, seed=1)
    finally:
        numpy.save, fcntl.flock = kept_save, kept_flock
    digest = hashlib.sha256()
    for index in range(NUM_SAMPLES):
        digest.update(samples[index]["tokens"].numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("has_locks", [True, False])
def test_jobs_that_start_at_once_share_an_index_that_one_of_them_builds(
    ranks: Any, small_data: SmallData, tmp_path: Path, has_locks: bool
) -> None:
    cache, saved = tmp_path / "cache", tmp_path / "saved"
    config = config_of(small_data, cache)
    jobs = [ranks(1), ranks(2), ranks(4)]
    for job in jobs:
        job.run(os.getpid)  # they have come up, and start at once
    with concurrent.futures.ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda job: job.run(read_samples, config, saved, has_locks), jobs))
    assert len({digest for job in read for digest in job}) == 1
    (folder,) = cache.iterdir()  # no lock, and nothing unfinished
    arrays = sorted(path.name for path in folder.glob("*.npy"))
    assert {name.split("-")[1] for name in arrays} == {"GPTDataset", "BlendedDataset"}
    names = saved.read_text().splitlines()
    if has_locks:
        assert sorted(names) == arrays, "each once"
    else:
        assert len(names) > len(arrays), "jobs that build in vain are what this is about"
    saved.unlink()
    assert ranks(2).run(read_samples, config, saved, has_locks) == read[1]
    assert not saved.exists(), "what is there is not built again"


def read_on_nodes_of_two(small_data: SmallData, folder: Path) -> str:
    """On a rank: as if ranks 0 and 1 had a disk of their own, and ranks 2 and 3 another."""
    import torch.distributed as dist

    from sas_megatron.data import index_cache

    kept = index_cache.PIECE_BYTES, index_cache.SECONDS_UNTIL_SEEN
    index_cache.PIECE_BYTES, index_cache.SECONDS_UNTIL_SEEN = 5000, 0.1
    cache = folder / f"disk_{dist.get_rank() // 2}" / "cache"
    try:
        return read_samples(config_of(small_data, cache), folder / "saved", True)
    finally:
        index_cache.PIECE_BYTES, index_cache.SECONDS_UNTIL_SEEN = kept


def test_a_node_that_does_not_see_the_first_ones_index_gets_a_copy(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    digests = ranks(4).run(read_on_nodes_of_two, small_data, tmp_path)
    assert len(set(digests)) == 1
    first, second = (
        {path.relative_to(disk): path.read_bytes() for path in disk.rglob("*") if path.is_file()}
        for disk in (tmp_path / "disk_0", tmp_path / "disk_1")
    )
    assert max(map(len, first.values())) > 7000, "more than one piece"
    assert first == second
    assert len((tmp_path / "saved").read_text().splitlines()) == len([p for p in first if p.suffix == ".npy"])


def test_a_cache_that_cannot_be_written_is_named_on_every_rank(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    said = f"data.index_cache={tmp_path}/cache: cannot be written on {socket.gethostname()} (Not a directory)"
    with pytest.raises(AssertionError) as failure:
        ranks(2).run(read_samples, config_of(small_data, tmp_path / "cache"), tmp_path / "saved", True)
    assert str(failure.value).count(said) == 2
