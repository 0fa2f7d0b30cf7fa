"""Checks of all ranks of an allocation: software, clocks, shared directory, collectives and bandwidth.

No check waits longer than `TIMEOUT`: a rank that cannot be reached becomes a finding instead of a hang.
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
from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.distributed.shared_directory import check_directory_is_shared
from sas_megatron.platform.device import process_group_backend
from sas_megatron.preflight.finding import Finding, failure, fine, warning
from sas_megatron.preflight.node import existing_part
from sas_megatron.preflight.software import compare_versions, describe_versions

TIMEOUT = timedelta(seconds=50)
MIB = 2**20
# Elements: one, an odd number, and enough for all channels of NCCL.
ALL_REDUCE_SIZES = (1, 1023, 2**20)
# The largest number of ranks that each rank exchanges data with.
MAX_ROUNDS = 63
EXCHANGED_BYTES = {"cpu": 4 * MIB, "cuda": 64 * MIB}
# A pair below this share of the median bandwidth is reported.
SLOW_SHARE = 1 / 3
MAX_SKEW_SECONDS = 1.0
CLOCK_ROUNDS = 5


def find_device() -> torch.device:
    """Return the GPU of this rank, or the CPU, without importing Megatron-core."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def joined_world(device: torch.device) -> Iterator[None]:
    """Initialize the world from the launcher's environment variables, and destroy it on exit."""
    dist.init_process_group(process_group_backend(device), timeout=TIMEOUT)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def check_allocation(device: torch.device, run_directory: Path) -> Iterator[Finding]:
    """Run the checks that need all ranks; every rank must call it, and every rank gets all findings."""
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
    """Yield the partner of each rank in each round, so that every pair of ranks occurs in exactly one round.

    With an odd number of ranks one rank has no partner in each round. (The circle method for round-robin
    tournaments.)
    """
    circle = list(range(world_size + world_size % 2))
    for _ in circle[1:]:
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        existing = [(a, b) for a, b in pairs if max(a, b) < world_size]
        yield {**dict(existing), **{b: a for a, b in existing}}
        circle = [circle[0], circle[-1], *circle[1:-1]]


def _check_clocks(names: list[str]) -> Finding:
    """Compare the wall clocks of all ranks after a barrier; the smallest difference of the rounds counts."""
    skews = [float("inf")] * len(names)
    for _ in range(CLOCK_ROUNDS):
        dist.barrier()
        times = gather_from_ranks(time.time())
        skews = [min(skew, moment - times[0], key=abs) for skew, moment in zip(skews, times, strict=True)]
    return judge_clocks(skews, names)


def judge_clocks(skews: list[float], names: list[str]) -> Finding:
    """Judge the seconds by which each rank's clock is ahead of rank 0's."""
    skew, name = max(zip(skews, names, strict=True), key=lambda pair: abs(pair[0]))
    observed = f"{name} is {abs(skew):.2f} s {'ahead of' if skew > 0 else 'behind'} rank 0"
    if abs(skew) > MAX_SKEW_SECONDS:
        return warning("clocks", observed, "synchronize the nodes' clocks (chronyc makestep)")
    return fine("clocks", f"within {abs(skew):.2f} s")


def _check_shared(run_directory: Path) -> Finding:
    # The path of rank 0, because fewer of its parent directories may exist on another node.
    (existing, *_) = gather_from_ranks(existing_part(run_directory))
    try:
        check_directory_is_shared(existing)
    except FieldError as error:
        return failure("shared directory", f"{error.value} {error.rule}", error.remedy)
    return fine("shared directory", f"all ranks see {existing}")


def _check_all_reduce(device: torch.device, names: list[str]) -> Finding:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    is_correct, seconds = True, 0.0
    for size in ALL_REDUCE_SIZES:
        # Small integers, whose sum does not depend on the order of additions.
        pattern = (torch.arange(size, device=device) % 7).float()
        for _ in range(2):  # the first iteration establishes the connections
            summed = pattern + rank
            _synchronize(device)
            started = time.perf_counter()
            dist.all_reduce(summed)
            _synchronize(device)
            seconds = time.perf_counter() - started
            expected = world_size * pattern + world_size * (world_size - 1) / 2
            is_correct = is_correct and bool(torch.equal(summed, expected))
    wrong = [name for name, correct in zip(names, gather_from_ranks(is_correct), strict=True) if not correct]
    backend = dist.get_backend()
    if wrong:
        return failure(
            "all-reduce",
            f"{backend} returns a wrong sum on {', '.join(wrong[:4])}",
            "exclude that node; NCCL_P2P_DISABLE=1 shows whether a GPU link or the network is faulty",
        )
    sent = 2 * (world_size - 1) / world_size * ALL_REDUCE_SIZES[-1] * 4
    return fine(
        "all-reduce",
        f"{backend} sums correctly on {world_size} ranks, {sent / seconds / MIB:,.0f} MiB/s per rank",
    )


def _check_pairs(device: torch.device, names: list[str]) -> Finding:
    rank = dist.get_rank()
    speeds: dict[int, float] = {}
    wrong: list[int] = []
    for number, partners in enumerate(rounds_of_pairs(len(names))):
        if number == MAX_ROUNDS:
            break
        if rank in partners:
            speed, is_correct = _exchange(device, rank, partners[rank])
            speeds[partners[rank]] = speed
            if not is_correct:
                wrong.append(partners[rank])
        dist.barrier()
    gathered = gather_from_ranks((speeds, wrong))
    pairs = {(one, other): speed for one, (found, _) in enumerate(gathered) for other, speed in found.items()}
    corrupted = [(sender, receiver) for receiver, (_, found) in enumerate(gathered) for sender in found]
    if corrupted:
        sender, receiver = corrupted[0]
        return failure(
            "pairs",
            f"{names[receiver]} receives other bytes than {names[sender]} sends",
            "exclude one of the two nodes at a time to find the faulty one",
        )
    return judge_pairs(pairs, names)


def judge_pairs(speeds: dict[tuple[int, int], float], names: list[str]) -> Finding:
    """Judge the bytes per second from one rank to another."""
    (one, other), slowest = min(speeds.items(), key=lambda item: item[1])
    median = statistics.median(speeds.values())
    observed = (
        f"median {median / MIB:,.0f} MiB/s in each direction over {len(speeds) // 2} pairs, "
        f"slowest {slowest / MIB:,.0f} between {names[one]} and {names[other]}"
    )
    if slowest < SLOW_SHARE * median:
        remedy = "check that link: cable, switch port, NCCL_SOCKET_IFNAME, NCCL_IB_HCA; or exclude the node"
        return warning("pairs", observed, remedy)
    return fine("pairs", observed)


def _exchange(device: torch.device, rank: int, partner: int) -> tuple[float, bool]:
    """Return the bytes per second in each direction, and whether `partner`'s bytes arrived unchanged."""
    size = EXCHANGED_BYTES[device.type] // 4
    pattern = torch.arange(size, device=device, dtype=torch.int32)
    received, seconds = torch.empty_like(pattern), 0.0
    for _ in range(2):  # the first iteration establishes the connection
        received.zero_()
        sent = pattern ^ rank
        _synchronize(device)
        started = time.perf_counter()
        operations = [dist.P2POp(dist.isend, sent, partner), dist.P2POp(dist.irecv, received, partner)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        _synchronize(device)
        seconds = time.perf_counter() - started
    return size * 4 / seconds, bool(torch.equal(received, pattern ^ partner))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
