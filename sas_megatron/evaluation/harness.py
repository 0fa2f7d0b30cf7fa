"""Model interface of lm-evaluation-harness for a trained model on any layout.

    rank 0: the harness -> requests -> tokens -> `call`       all ranks: `score`, `generate` -> rank 0

Texts are encoded, truncated and concatenated as in the harness's transformers interface, so the scores equal
the scores of the exported model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sas_megatron.config.errors import FieldError
from sas_megatron.costs.parameters import count_parameters
from sas_megatron.distributed.object_collectives import Call
from sas_megatron.evaluation.generation import Completion
from sas_megatron.evaluation.scoring import Passage, Scores
from sas_megatron.evaluation.settings import GenerationSettings, Sampling
from sas_megatron.evaluation.trained_model import TrainedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")
N = TypeVar("N", int, float)
# A request of the harness: the texts of context and continuation, and the tokens of each.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]

# Number of requests per call of all ranks. After each call, the harness's cache and the progress bar are
# updated.
REQUESTS_PER_CALL = 4096
# The default of the harness.
MAX_NEW_TOKENS = 256
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """Implements the model interface of the harness. Only rank 0 has an instance; `call` uses all ranks."""

    def __init__(self, model: TrainedModel, call: Call) -> None:
        super().__init__()
        self._trained, self._call = model, call
        self._tokenizer = model.tokenizer
        self.max_length: int = model.config.data.sequence_length
        self._num_truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token, which is also the context of a text without context."""
        return self._tokenizer.eos_id

    def get_model_info(self) -> dict[str, Any]:
        """Return a description of the model for the results of the harness."""
        config = self._trained.config
        return {
            "model": "sas_megatron",
            "attention": config.attention.kind,
            "model_num_parameters": sum(count_parameters(config).values()),
            "model_dtype": config.training.precision,
            "step": self._trained.step,
            "max_length": self.max_length,
            "parallel": config.parallel.model_dump(exclude_defaults=True),
            "world_size": self._trained.topology.world_size,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Return token ids, without special tokens before or after the text."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding would generate it."""
        self._num_truncated = 0
        passages = [self._passage(*request) for request in requests]
        self._log_truncations()
        results: dict[int, tuple[float, bool]] = {}

        def store(number: int, scores: Scores) -> None:
            result = float(scores.log_probabilities.sum()), bool(scores.are_most_likely.all())
            text = requests[number][0]
            if text is not None:  # Windows of a longer text have no text.
                self.cache_hook.add_partial("loglikelihood", text, result)
            results[number] = result

        order = sorted(range(len(passages)), key=lambda number: -len(passages[number].tokens))
        self._run_in_portions(
            order, store, lambda portion: self._call("score", [passages[n] for n in portion]), disable_tqdm
        )
        return [results[number] for number in range(len(passages))]

    def _passage(self, text: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Passage:
        """Return the last tokens of context and continuation: at most `max_length`, and one predicted."""
        if not 0 < len(continuation) <= self.max_length:
            excerpt = repr(text[1][:40] if text else "")
            raise FieldError(
                "continuation",
                excerpt,
                f"has {len(continuation)} tokens, but the model reads at most {self.max_length}"
                if continuation
                else "has no tokens, because it ends within the last token of its context",
                "increase data.sequence_length" if continuation else "start it with a space in the task",
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        self._num_truncated += len(context) + len(continuation) > len(tokens)
        return Passage(np.array(tokens, dtype=np.int32), len(continuation))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text. Every token is scored once, in windows of `max_length`."""
        windows: list[TokenRequest] = []
        counts = []
        for request in requests:
            (text,) = request.args
            of_text = get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(window)) for window in of_text]
            counts.append(len(windows) - before)
        scored = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            total = sum((next(scored)[0] for _ in range(count)), 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate text after each context, up to the first stop string."""
        settings = [self._settings(request.args[1]) for request in requests]
        self._num_truncated = 0
        prompts = [
            self._prompt(request.args[0], of_request)
            for request, of_request in zip(requests, settings, strict=True)
        ]
        self._log_truncations()
        texts: dict[int, str] = {}

        def store(number: int, completion: Completion) -> None:
            self.cache_hook.add_partial("generate_until", requests[number].args, completion.text)
            texts[number] = completion.text

        def compute(portion: list[int]) -> list[Completion]:
            of_portion = settings[portion[0]]
            generated = self._call("generate", [prompts[n] for n in portion], of_portion, portion)
            return list(generated.completions)

        for shared in dict.fromkeys(settings):
            numbers = [number for number, of_request in enumerate(settings) if of_request == shared]
            order = sorted(numbers, key=lambda number: -len(prompts[number]))
            self._run_in_portions(order, store, compute, disable_tqdm)
        return [texts[number] for number in range(len(requests))]

    def _settings(self, options: dict[str, Any]) -> GenerationSettings:
        """Convert the `generation_kwargs` of a task to settings."""
        remaining = dict(options)
        # As with a transformers model, the string of the end-of-document token also ends a text.
        stop = [*_pop_texts(remaining, "until"), self._tokenizer.end_of_document]
        limits = [_pop_number(remaining, name, int) for name in _TOKEN_LIMITS]
        limit = next((given for given in limits if given is not None), MAX_NEW_TOKENS)
        sampling = _pop_sampling(remaining)
        if remaining:
            raise FieldError(
                "generation_kwargs",
                remaining,
                "are not supported",
                f"use until, do_sample, temperature, top_k, top_p and {_TOKEN_LIMITS[0]} in the task",
            )
        if not 0 < limit < self.max_length:
            raise FieldError(
                f"generation_kwargs.{_TOKEN_LIMITS[0]}",
                limit,
                f"leaves no room for a context in data.sequence_length={self.max_length}"
                if limit > 0
                else "must be positive",
                "decrease it (--generation max_gen_toks=…), or increase data.sequence_length"
                if limit > 0
                else "increase it (--generation max_gen_toks=…)",
            )
        return GenerationSettings(
            max_new_tokens=limit, stop=tuple(text for text in dict.fromkeys(stop) if text), sampling=sampling
        )

    def _prompt(self, context: str, settings: GenerationSettings) -> list[int]:
        """Return the last tokens of the context that leave room for the new tokens; at least one token."""
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        kept = tokens[-(self.max_length - settings.max_new_tokens) :]
        self._num_truncated += len(kept) < len(tokens)
        return kept

    def _run_in_portions(
        self,
        order: Sequence[int],
        store: Callable[[int, T], None],
        compute: Callable[[list[int]], Sequence[T]],
        disable_tqdm: bool,
    ) -> None:
        """Compute the results of requests in the given order, some per call, and store each result."""
        with tqdm(total=len(order), disable=disable_tqdm, desc="Requests") as bar:
            for portion in _portions(order):
                for number, result in zip(portion, compute(portion), strict=True):
                    store(number, result)
                bar.update(len(portion))

    def _log_truncations(self) -> None:
        if self._num_truncated:
            logger.warning(
                "%d contexts do not fit into data.sequence_length=%d; their first tokens are removed",
                self._num_truncated,
                self.max_length,
            )


def _pop_sampling(options: dict[str, Any]) -> Sampling:
    """Remove the sampling options from `generation_kwargs`; a temperature alone enables sampling."""
    temperature, top_p = (_pop_number(options, name, float) for name in ("temperature", "top_p"))
    top_k = _pop_number(options, "top_k", int)
    if not options.pop("do_sample", bool(temperature)):
        return Sampling()
    # As in transformers, top_k=0 means all tokens.
    return Sampling(1.0 if temperature is None else temperature, top_k=top_k or None, top_p=top_p)


def _pop_number(options: dict[str, Any], name: str, kind: type[N]) -> N | None:
    """Remove a number from `generation_kwargs` and return it; None if it is not set.

    Raises:
        FieldError: The value is not a number of this type.
    """
    given = options.pop(name, None)
    if given is None:
        return None
    try:
        number = kind(given)
        if number == float(given):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise FieldError(
        f"generation_kwargs.{name}",
        given,
        f"is not {'an integer' if kind is int else 'a number'}",
        f"set a number in the task, or with --generation {name}=…",
    )


def _pop_texts(options: dict[str, Any], name: str) -> list[str]:
    """Remove a string or a list of strings from `generation_kwargs` and return a list.

    Raises:
        FieldError: The value is neither.
    """
    given = options.pop(name, None) or []
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
        return list(texts)
    raise FieldError(
        f"generation_kwargs.{name}",
        given,
        "is neither a string nor a list of strings",
        "quote it in the task",
    )


def _portions(order: Sequence[int]) -> Iterator[list[int]]:
    for begin in range(0, len(order), REQUESTS_PER_CALL):
        yield list(order[begin : begin + REQUESTS_PER_CALL])
