"""All ranks of an allocation together: they meet, agree, exchange what they should, and how fast.

Nothing here waits longer than `TIMEOUT`: a rank that cannot be reached is a finding, not a hang.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sas_megatron.config.errors import FieldError
from sas_megatron.distributed.gathering import gather_from_ranks
from sas_megatron.distributed.shared_directory import check_directory_is_shared
from sas_megatron.platform.device import process_group_backend
from sas_megatron.preflight.finding import Finding, failure, fine, warning
from sas_megatron.preflight.node import existing_part
from sas_megatron.preflight.software import compare_versions, describe_versions

TIMEOUT = timedelta(seconds=50)
MIB = 2**20
# One element, an odd number, and enough to be spread over all of NCCL's channels.
ALL_REDUCE_SIZES = (1, 1023, 2**20)
# Each rank exchanges with this many others, at most.
MAX_ROUNDS = 63
EXCHANGED_BYTES = {"cpu": 4 * MIB, "cuda": 64 * MIB}
SLOW_SHARE = 1 / 3
SKEW_SECONDS = 1.0
CLOCK_ROUNDS = 5


def find_device() -> torch.device:
    """The GPU of this rank, or the CPU, without Megatron-core's import."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def joined_world(device: torch.device) -> Iterator[None]:
    """The world that the launcher's environment describes, for the length of a `with` block."""
    dist.init_process_group(process_group_backend(device), timeout=TIMEOUT)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def check_allocation(device: torch.device, run_directory: Path) -> Iterator[Finding]:
    """Everything that takes all ranks. Collective; the findings are complete on each."""
    names = gather_from_ranks(f"rank {dist.get_rank()} on {socket.gethostname()}")
    yield compare_versions(
        dict(
            zip(gather_from_ranks(socket.gethostname()), gather_from_ranks(describe_versions()), strict=True)
        )
    )
    yield _check_clocks(names)
    yield _check_shared(run_directory)
    yield _check_all_reduce(device, names)
    yield _check_pairs(device, names)


def rounds_of_pairs(world_size: int) -> Iterator[dict[int, int]]:
    """Rank -> partner, both ways, so that over all rounds each meets each once; an odd one out rests."""
    seats = list(range(world_size + world_size % 2))
    for _ in seats[1:]:
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        met = [(a, b) for a, b in pairs if max(a, b) < world_size]
        yield {**dict(met), **{b: a for a, b in met}}
        seats = [seats[0], seats[-1], *seats[1:-1]]


def _check_clocks(names: list[str]) -> Finding:
    """Wall clocks read as nearly at once as a barrier allows; the nearest of some tries counts."""
    skews = [float("inf")] * len(names)
    for _ in range(CLOCK_ROUNDS):
        dist.barrier()
        times = gather_from_ranks(time.time())
        skews = [min(skew, moment - times[0], key=abs) for skew, moment in zip(skews, times, strict=True)]
    return judge_clocks(skews, names)


def judge_clocks(skews: list[float], names: list[str]) -> Finding:
    """Of the seconds by which each rank's clock is ahead of rank 0's."""
    skew, name = max(zip(skews, names, strict=True), key=lambda pair: abs(pair[0]))
    observed = f"{name} is {abs(skew):.2f} s {'ahead of' if skew > 0 else 'behind'} rank 0"
    if abs(skew) > SKEW_SECONDS:
        return warning("clocks", observed, "synchronize the nodes' clocks (chronyc makestep)")
    return fine("clocks", f"within {abs(skew):.2f} s")


def _check_shared(run_directory: Path) -> Finding:
    # Rank 0's: another node may have less of the path.
    (existing, *_) = gather_from_ranks(existing_part(run_directory))
    try:
        check_directory_is_shared(existing)
    except FieldError as error:
        return failure("shared directory", f"{error.value} {error.rule}", error.remedy)
    return fine("shared directory", f"all ranks see {existing}")


def _check_all_reduce(device: torch.device, names: list[str]) -> Finding:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    right, seconds = True, 0.0
    for size in ALL_REDUCE_SIZES:
        # Small whole numbers, whose sum no order of adding can change.
        pattern = (torch.arange(size, device=device) % 7).float()
        for _ in range(2):  # the first makes the connections
            summed = pattern + rank
            _synchronize(device)
            begun = time.perf_counter()
            dist.all_reduce(summed)
            _synchronize(device)
            seconds = time.perf_counter() - begun
            expected = world_size * pattern + world_size * (world_size - 1) / 2
            right = right and bool(torch.equal(summed, expected))
    wrong = [name for name, is_right in zip(names, gather_from_ranks(right), strict=True) if not is_right]
    backend = dist.get_backend()
    if wrong:
        return failure(
            "all-reduce",
            f"{backend} gives a wrong sum to {', '.join(wrong[:4])}",
            "take that node out; then try NCCL_P2P_DISABLE=1 to tell a GPU link from the network",
        )
    sent = 2 * (world_size - 1) / world_size * ALL_REDUCE_SIZES[-1] * 4
    return fine(
        "all-reduce", f"{backend} sums right on {world_size} ranks, {sent / seconds / MIB:,.0f} MiB/s a rank"
    )


def _check_pairs(device: torch.device, names: list[str]) -> Finding:
    rank = dist.get_rank()
    speeds: dict[int, float] = {}
    wrong: list[int] = []
    for number, partners in enumerate(rounds_of_pairs(len(names))):
        if number == MAX_ROUNDS:
            break
        if rank in partners:
            speed, is_right = _exchange(device, rank, partners[rank])
            speeds[partners[rank]] = speed
            if not is_right:
                wrong.append(partners[rank])
        dist.barrier()
    gathered = gather_from_ranks((speeds, wrong))
    pairs = {(one, other): speed for one, (found, _) in enumerate(gathered) for other, speed in found.items()}
    garbled = [(other, one) for one, (_, found) in enumerate(gathered) for other in found]
    if garbled:
        one, other = garbled[0]
        return failure(
            "pairs", f"{names[other]} gets other bytes than {names[one]} sends", "take one of them out"
        )
    return judge_pairs(pairs, names)


def judge_pairs(speeds: dict[tuple[int, int], float], names: list[str]) -> Finding:
    """Of the bytes a second between two ranks."""
    (one, other), slowest = min(speeds.items(), key=lambda item: item[1])
    median = statistics.median(speeds.values())
    observed = (
        f"median {median / MIB:,.0f} MiB/s each way over {len(speeds) // 2} pairs, "
        f"slowest {slowest / MIB:,.0f} between {names[one]} and {names[other]}"
    )
    if slowest < SLOW_SHARE * median:
        remedy = (
            "look at that link: cable, switch port, NCCL_SOCKET_IFNAME, NCCL_IB_HCA; or leave the node out"
        )
        return warning("pairs", observed, remedy)
    return fine("pairs", observed)


def _exchange(device: torch.device, rank: int, partner: int) -> tuple[float, bool]:
    """Bytes a second each way with `partner`, and whether its bytes came as it sent them."""
    size = EXCHANGED_BYTES[device.type] // 4
    pattern = torch.arange(size, device=device, dtype=torch.int32)
    received, seconds = torch.empty_like(pattern), 0.0
    for _ in range(2):  # the first makes the connection
        received.zero_()
        sent = pattern ^ rank
        _synchronize(device)
        begun = time.perf_counter()
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        _synchronize(device)
        seconds = time.perf_counter() - begun
    return size * 4 / seconds, bool(torch.equal(received, pattern ^ partner))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
