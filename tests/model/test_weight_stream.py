"""Random numbers by position: NumPy's Philox, distributed as SciPy's, independent, equal in every slice."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from sas_megatron.model.weight_stream import WeightStream

MASK = 2**64 - 1
NUMBERS = 2**18
# Deterministic draws are tested once, so that a p-value below one in a thousand is a defect.
LEAST_P = 1e-3


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Encrypt a counter in ten rounds (Salmon et al. 2011, table 2 and section 3.3)."""
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & MASK,
            (first >> 64) ^ counter[3] ^ key[1],
            first & MASK,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


# The known answers of philox4x64-10 in kat_vectors of Random123, the authors' library: counter, key, words.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ([MASK] * 4, [MASK] * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (
        [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
        [0x452821E638D01377, 0xBE5466CF34E90C6C],
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]


def draw(distribution: str, count: int = NUMBERS, *, name: str = "a.weight", seed: int = 1) -> torch.Tensor:
    out = torch.empty(count)
    WeightStream(seed, name).fill(out, distribution, 1.0)
    return out


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_definition_of_philox_gives_the_published_answers(
    counter: list[int], key: list[int], words: str
) -> None:
    assert philox4x64(counter, key) == [int(word, 16) for word in words.split()]


@pytest.mark.parametrize("counters", [(0, 5), (7, 1, 3), (2**33, 0)])
def test_words_are_philox_of_their_counter_in_any_order(counters: tuple[int, ...]) -> None:
    digest = hashlib.sha256(b"3/embedding.weight").digest()
    key = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")]
    stream = WeightStream(3, "embedding.weight")
    for counter in counters:
        # NumPy's generator increments the counter first.
        expected = [philox4x64([counter + 1 + index, 0, 0, 0], key) for index in range(2)]
        assert stream.words(counter, 2).reshape(2, 4).tolist() == expected


def test_numbers_are_the_published_transforms_of_the_words() -> None:
    words = WeightStream(1, "a.weight").words(0, 4096)
    low, high = (words & 0xFFFFFFFF).astype(np.float64), (words >> np.uint64(32)).astype(np.float64)
    # The high half is a signed number.
    angle = 2 * math.pi * (high - 2.0**32 * (high >= 2**31)) / 2**32
    radius = np.sqrt(-2 * np.log((low + 0.5) / 2**32))
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()
    np.testing.assert_allclose(draw("normal", 2 * len(words)).numpy(), expected, rtol=2e-6, atol=2e-6)
    signed = words.view(np.int32).astype(np.float64) / 2**31
    np.testing.assert_allclose(draw("uniform", 2 * len(words)).numpy(), signed, rtol=1e-7)


REFERENCES = {"normal": stats.norm(), "uniform": stats.uniform(-1, 2)}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("distribution", REFERENCES)
def test_numbers_have_the_distribution_of_scipy(distribution: str, seed: int) -> None:
    numbers, reference = draw(distribution, seed=seed).double().numpy(), REFERENCES[distribution]
    assert stats.kstest(numbers, reference.cdf).pvalue > LEAST_P
    # Of a sample's deviations, the test of Kolmogorov and Smirnov sees those of the tails worst.
    bounds = reference.ppf([0.0, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0])
    counts, _ = np.histogram(numbers, np.clip(bounds, -9, 9))
    assert counts.sum() == NUMBERS
    assert stats.chisquare(counts, NUMBERS * np.diff(reference.cdf(bounds))).pvalue > LEAST_P


def assert_independent(first: torch.Tensor, second: torch.Tensor, context: object) -> None:
    """Compare the joint distribution over 8×8 cells of equal probability with the product."""
    cells = [np.minimum(stats.norm.cdf(numbers.numpy()) * 8, 7).astype(int) for numbers in (first, second)]
    counts = np.bincount(cells[0] * 8 + cells[1], minlength=64)
    # Some thirty pairs are tested.
    assert stats.chisquare(counts).pvalue > LEAST_P / 10, context


@pytest.mark.parametrize("distance", [*range(1, 9), 16, 20, 4096])
def test_numbers_at_near_positions_are_independent(distance: int) -> None:
    """Two numbers of a word share a radius, and four words their counter; neighbours differ in a few bits."""
    numbers = draw("normal", NUMBERS + distance)
    for offset in (0, distance):
        # Pairs without a common number.
        pairs = numbers[offset:][: NUMBERS // (2 * distance) * 2 * distance].reshape(-1, 2, distance)
        assert_independent(pairs[:, 0].flatten(), pairs[:, 1].flatten(), offset)


def test_parameters_and_seeds_are_independent() -> None:
    """Keys are hashes: names that differ by a layer, and seeds that differ by one, have unrelated streams."""
    names = [(1, "layers.0.weight"), (1, "layers.1.weight"), (2, "layers.0.weight"), (1, "layers.0.bias")]
    drawn = {key: draw("normal", name=key[1], seed=key[0]) for key in names}
    for first, second in itertools.combinations(names, 2):
        assert_independent(drawn[first], drawn[second], (first, second))


@pytest.mark.parametrize("distribution", REFERENCES)
@pytest.mark.parametrize(
    ("starts", "length"),
    [
        ([0], 70_001),  # more than two blocks
        ([1], 32_768),
        ([13], 3),
        ([5, 12, 61], 7),
        (list(range(3, 60_000, 20)), 11),  # more runs than one block holds
        ([40_008, 16], 24),
        ([99_990], 9),
    ],
)
def test_runs_equal_the_full_tensor_bit_for_bit(distribution: str, starts: list[int], length: int) -> None:
    full, runs = draw(distribution, 100_000), torch.empty(len(starts), length)
    WeightStream(1, "a.weight").fill(runs, distribution, 1.0, starts=starts)
    for run, start in zip(runs, starts, strict=True):
        assert torch.equal(run, full[start : start + length])


def test_the_scale_multiplies_and_the_dtype_rounds() -> None:
    numbers = draw("normal", 1000)
    rounded, wide = torch.empty(1000, dtype=torch.bfloat16), torch.empty(1000, dtype=torch.float64)
    for out in (rounded, wide):
        WeightStream(1, "a.weight").fill(out, "normal", 0.02)
    expected = numbers * torch.tensor(0.02)
    assert torch.equal(rounded, expected.bfloat16())
    assert torch.equal(wide, expected.double())


def checksum_of_numbers(disabled: str) -> str:
    """Return a checksum of the numbers in a process in which NumPy does not use some instructions."""
    program = (
        "import hashlib, torch; from sas_megatron.model.weight_stream import WeightStream\n"
        "out = torch.empty(2**20); WeightStream(1, 'a').fill(out, 'normal', 0.02)\n"
        "print(hashlib.sha256(out.numpy().tobytes()).hexdigest())"
    )
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled}
    command = [sys.executable, "-W", "ignore", "-c", program]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.exhaustive
def test_numbers_are_equal_with_and_without_avx512() -> None:
    if "X86_V4" not in np.lib.introspect.opt_func_info(func_name="^sin$")["sin"]["ff"]["available"]:
        pytest.skip("this processor, or NumPy's build for it, has no AVX-512")
    assert checksum_of_numbers("X86_V4 AVX512_ICL AVX512_SPR") == checksum_of_numbers("")
