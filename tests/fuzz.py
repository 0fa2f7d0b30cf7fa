"""Fuzzer of everything that the commands read: `python -m tests.fuzz TARGET --inputs N`.

hypothesis damages small valid files -> a child reads them as a command does -> accepted, or one user error

Anything else is a failure: a traceback, a crash, a hang of more than 10 s, more than 2 GiB of memory. A
failure is shrunk to a small input, which is printed. Each target has one child, forked from the server of
`tests/fork_server.py`; `tests/fuzzing/targets.py` shows what it calls.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fork_server import stop_fork_server
from tests.fuzzing.child import Result
from tests.fuzzing.inputs import Input
from tests.fuzzing.strategies import TARGETS, FuzzTarget
from tests.fuzzing.watched_child import MAX_SECONDS, WatchedChild

# A hang costs seconds each time, so that few inputs are tried to shrink it.
MAX_HANGS = 6


class FuzzFailure(AssertionError):
    """An input that was neither accepted nor refused with a user error."""


def fuzz(
    target: FuzzTarget, *, num_inputs: int, first_seed: int = 0, max_seconds: float = MAX_SECONDS
) -> Counter[str]:
    """Try inputs of a target; return the number of accepted and of refused ones.

    Args:
        target: The target.
        num_inputs: Number of inputs; after a failure more are tried to shrink it.
        first_seed: Selects the inputs.
        max_seconds: The time limit of an input.

    Raises:
        FuzzFailure: An input failed; the message contains the smallest such input.
    """
    child = WatchedChild(target.target, max_seconds=max_seconds)
    assert child.seeds is not None
    counts: Counter[str] = Counter()
    failures: dict[object, Result] = {}

    def try_input(tried: Input) -> Result:
        if tried.key() in failures:
            return failures[tried.key()]
        num_hangs = sum(failure.text.startswith("hang") for failure in failures.values())
        return Result("accepted") if num_hangs >= MAX_HANGS else child.run(tried)

    @seed(first_seed)
    @settings(
        max_examples=num_inputs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(tried=target.inputs(child.seeds))
    def check(tried: Input) -> None:
        result = try_input(tried)
        counts[result.state] += 1
        if result.state == "failed":
            failures[tried.key()] = result
            raise FuzzFailure(f"{result.text}\n{tried.describe()}")

    try:
        for name, result in child.undamaged.items():
            if result.state != "accepted":
                raise FuzzFailure(f"the undamaged files of {name} are not accepted: {result.text}")
        check()
    finally:
        child.close()
    return counts


def main() -> None:
    """Fuzz one target, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"from {', '.join(TARGETS)}; default: all"
    )
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs of each target (default: 10,000)")
    parser.add_argument(
        "--seed", type=int, default=0, help="another number selects other inputs (default: 0)"
    )
    chosen = parser.parse_args()
    if unknown := set(chosen.targets) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; use {', '.join(TARGETS)}")
    failed = False
    for name in chosen.targets or TARGETS:
        try:
            counts = fuzz(TARGETS[name], num_inputs=chosen.inputs, first_seed=chosen.seed)
            print(f"{name}: {counts['accepted']:,} accepted, {counts['refused']:,} refused", flush=True)
        except FuzzFailure as failure:
            failed = True
            print(f"{name}: FAILED\n{failure}\n", flush=True)
    stop_fork_server()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
