"""Held-out loss with windows: each token is predicted once, and the loss agrees with that of training."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer_loading import load_tokenizer
from sas_megatron.evaluation.settings import WindowSettings
from tests import small_attentions as small
from tests.evaluation.trained_models import roughened_model
from tests.evaluation.trained_runs import TrainedRun, load_on_rank, train_and_export
from tests.run_configs import small_config
from tests.selection import exhaustive
from tests.small_data import SmallData
from tests.tolerances import RELATIVE_ERROR


@pytest.fixture(scope="module")
def windows_of(separate_process: Any) -> Any:
    """Return a function that runs `cut` in another process.

    Importing Megatron-core here would require the CPU replacement for CUDA calls.
    """
    return lambda *arguments: separate_process(cut, *arguments)


def cut(cases: list[tuple[int, int, int]]) -> list[list[tuple[list[int], int]]]:
    """Return the tokens and the number of predictions of each window."""
    from sas_megatron.evaluation.sliding_window import cut_windows

    return [
        [
            (window.tokens.tolist(), window.num_scored)
            for window in cut_windows(np.arange(num_tokens, dtype=np.int32), WindowSettings(length, stride))
        ]
        for num_tokens, length, stride in cases
    ]


def test_every_token_is_predicted_once_from_full_windows(windows_of: Any) -> None:
    cases = [
        (num_tokens, length, stride)
        for num_tokens in (1, 2, 3, 8, 9, 23)
        for length in (1, 2, 5, 8)
        for stride in range(1, length + 1)
    ]
    for (num_tokens, length, stride), windows in zip(cases, windows_of(cases), strict=True):
        predicted = []
        for number, (tokens, num_scored) in enumerate(windows):
            read = len(tokens) - 1
            assert read == (min(length, num_tokens - 1)), "each window is full if there are enough tokens"
            assert tokens == list(range(tokens[0], tokens[0] + read + 1))
            predicted += tokens[-num_scored:]
            assert num_scored <= (length if number == 0 else stride)
        assert predicted == list(range(1, num_tokens))


@torch.no_grad()
def losses_on_rank(config: RunConfig, length: int, stride: int) -> Any:
    """Return the losses of a document by windows and by a forward pass per token. Runs on one rank."""
    from sas_megatron.evaluation.sliding_window import document_windows, measure_windows

    tokenizer = load_tokenizer(config.data.tokenizer)
    model = roughened_model(config, tokenizer, dtype=torch.float64)
    document = Path(json.__file__).read_text(encoding="utf-8")[:500]
    settings = WindowSettings(length, stride, batch_tokens=90)
    found = measure_windows(model, document_windows([document], tokenizer, settings), batch_tokens=90)
    tokens = [tokenizer.eos_id, *tokenizer.encode(document), tokenizer.eos_id]
    by_read: dict[int, list[float]] = {}
    for position in range(1, len(tokens)):
        # The window that predicts the token ends `stride` tokens after the previous one.
        end = length if position <= length else length + math.ceil((position - length) / stride) * stride
        begin = max(0, min(end, len(tokens) - 1) - length)
        context = torch.tensor([tokens[begin:position]])
        logits = model._model(context, torch.arange(context.shape[1])[None], None)[0, -1]
        loss = -logits.double().log_softmax(-1)[tokens[position]].item()
        by_read.setdefault(2 ** math.ceil(math.log2(position - begin)), []).append(loss)
    return [(last, held.loss, held.num_tokens) for last, held in found.by_position()], by_read, len(document)


@pytest.mark.parametrize(("length", "stride"), [pytest.param(12, 12, marks=exhaustive), (12, 5), (29, 29)])
def test_losses_by_position_agree_with_the_model(
    ranks: Any, small_data: SmallData, length: int, stride: int
) -> None:
    config = small_config(
        attention=small.SAS_GROUPED,
        # 516 rows: the softmax includes the padding, as in training.
        model={"vocab_size": 512, "vocab_multiple": 12},
        data={"tokenizer": str(small_data.tokenizer)},
    )
    ((found, expected, _),) = ranks(1).run(losses_on_rank, config, length, stride)
    assert [(last, num) for last, _, num in found] == [
        (last, len(losses)) for last, losses in sorted(expected.items())
    ]
    for last, loss, _ in found:
        assert loss == pytest.approx(np.mean(expected[last]), rel=1e-10), f"up to {last} preceding tokens"


@pytest.fixture(scope="module")
def run(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train_and_export(ranks, small_data, tmp_path_factory.mktemp("run"), small.SAS_GROUPED)


def validation_on_rank(directory: Path, overrides: list[str], lengths: list[int]) -> Any:
    """Measure the loss on the validation windows of a run."""
    from sas_megatron.evaluation.sliding_window import measure_held_out, validation_windows

    model, _ = load_on_rank(directory, overrides)
    domains = {
        "validation": lambda settings: validation_windows(
            model.config, model.tokenizer, length=settings.length
        )
    }
    return measure_held_out(model, domains, [WindowSettings(length, length) for length in lengths])


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(1, []), (2, ["parallel.tensor=2"]), (2, ["parallel.pipeline=2"]), (2, [])],
)
def test_the_loss_on_validation_windows_is_that_of_training(
    ranks: Any, run: TrainedRun, world_size: int, overrides: list[str]
) -> None:
    summary = json.loads((run.directory / "summary.json").read_text())
    for results in ranks(world_size).run(validation_on_rank, run.directory, overrides, [40, 80]):
        trained, longer = results["by_length"]
        for name, summary_name in (
            ("loss", "final_validation_loss"),
            ("perplexity", "validation_perplexity"),
            ("bits_per_byte", "validation_bits_per_byte"),
        ):
            assert trained["all"][name] == pytest.approx(
                summary[summary_name], rel=RELATIVE_ERROR[torch.float32]
            )
        # Half of the windows, with twice the length, have the same number of tokens and longer contexts.
        assert longer["all"]["num_tokens"] == trained["all"]["num_tokens"] == 6 * 40
        assert longer["all"]["by_position"][-1]["tokens_read"] == [65, 128]


def error_of_validation(directory: Path, length: int) -> str:
    """Return the message with which the measurement fails."""
    try:
        validation_on_rank(directory, [], [length])
    except FieldError as error:
        return str(error)
    raise AssertionError("the measurement succeeded")


def test_windows_longer_than_the_validation_text_are_rejected(ranks: Any, run: TrainedRun) -> None:
    (message,) = ranks(1).run(error_of_validation, run.directory, 10**6)
    match = re.match(r"data\.sequence_length=1000000: must be less than the (\d+) tokens of \S+; ", message)
    assert match is not None, message
    (message,) = ranks(1).run(error_of_validation, run.directory, int(match[1]) - 1)
    match = re.fullmatch(
        r"data\.sequence_length=\d+: must be less than the (\d+) validation tokens of \S+ \(\d+ of \d+ "
        r"documents\); use at most (\d+), or prepare more documents",
        message,
    )
    assert match is not None, message
    longest = int(match[2])
    assert longest == int(match[1]) - 1
    assert ranks(1).run(error_of_validation, run.directory, longest + 1)
    (results,) = ranks(1).run(validation_on_rank, run.directory, [], [longest])
    (found,) = results["by_length"]
    assert found["all"]["num_tokens"] == longest


@given(st.integers(1, 9), st.integers(-3, 20))
def test_strides_that_would_skip_tokens_are_rejected(length: int, stride: int) -> None:
    if 1 <= stride <= length:
        WindowSettings(length, stride)
        return
    with pytest.raises(
        FieldError, match=rf"--stride={stride}: must be between 1 and the window length {length}"
    ):
        WindowSettings(length, stride)
