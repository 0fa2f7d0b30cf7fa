"""lm-evaluation-harness on a trained model as it stands, at any layout: the harness's own model interface.

    rank 0: the harness -> requests -> tokens -> `call`       all ranks: `score`, `generate` -> rank 0

Texts are encoded, cut and put together as the harness does it for its transformers models, so that scores
equal those of the exported model.
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
from sas_megatron.distributed.rank0_driver import Call
from sas_megatron.evaluation.generation import Completion
from sas_megatron.evaluation.generation_settings import GenerationSettings, Sampling
from sas_megatron.evaluation.scoring import Passage, Scores
from sas_megatron.evaluation.trained_model import TrainedModel

logger = logging.getLogger(__name__)

T = TypeVar("T")
N = TypeVar("N", int, float)
# A text that is asked about, its context and its continuation as tokens, as the harness hands them on.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]

# So many are handed to the ranks together; what is done is then in the harness's cache, and the bar moves.
REQUESTS_AT_ONCE = 4096
# The harness's own default.
MAX_NEW_TOKENS = 256
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """What the harness asks of a model. Only rank 0 has one; `call` makes all ranks compute."""

    def __init__(self, model: TrainedModel, call: Call) -> None:
        super().__init__()
        self._trained, self._call = model, call
        self._tokenizer = model.tokenizer
        self.max_length: int = model.config.data.sequence_length
        self._num_cut = 0

    @property
    def eot_token_id(self) -> int:
        """The end of a document, which also stands before a text without context."""
        return self._tokenizer.eos_id

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of the model into its results."""
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
        """Token ids; nothing is put before or after."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_options: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation after its context, and whether it is what greedy decoding gives."""
        self._num_cut = 0
        passages = [self._passage(*request) for request in requests]
        self._tell_cut()
        found: dict[int, tuple[float, bool]] = {}

        def answer(number: int, scores: Scores) -> None:
            result = float(scores.log_probabilities.sum()), bool(scores.are_likeliest.all())
            text = requests[number][0]
            if text is not None:  # a part of a text that is scored as a whole
                self.cache_hook.add_partial("loglikelihood", text, result)
            found[number] = result

        order = sorted(range(len(passages)), key=lambda number: -len(passages[number].tokens))
        self._in_portions(
            order, answer, lambda portion: self._call("score", [passages[n] for n in portion]), disable_tqdm
        )
        return [found[number] for number in range(len(passages))]

    def _passage(self, text: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Passage:
        """At most as many tokens as the model reads, and one more, which is only predicted."""
        if not 0 < len(continuation) <= self.max_length:
            excerpt = repr(text[1][:40] if text else "")
            raise FieldError(
                "continuation",
                excerpt,
                f"is {len(continuation)} tokens after its context, and the model reads {self.max_length}"
                if continuation
                else "has no token of its own: it ends within the last token of its context",
                "set data.sequence_length higher" if continuation else "begin it with a space in the task",
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        self._num_cut += len(context) + len(continuation) > len(tokens)
        return Passage(np.array(tokens, dtype=np.int32), len(continuation))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, each token once, in windows as long as the model reads."""
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
        """What the model writes after each context, up to the first of the stop strings."""
        settings = [self._settings(request.args[1]) for request in requests]
        self._num_cut = 0
        prompts = [
            self._prompt(request.args[0], of_request)
            for request, of_request in zip(requests, settings, strict=True)
        ]
        self._tell_cut()
        found: dict[int, str] = {}

        def answer(number: int, completion: Completion) -> None:
            self.cache_hook.add_partial("generate_until", requests[number].args, completion.text)
            found[number] = completion.text

        def ask(portion: list[int]) -> list[Completion]:
            of_portion = settings[portion[0]]
            generated = self._call("generate", [prompts[n] for n in portion], of_portion, portion)
            return list(generated.completions)

        for alike in dict.fromkeys(settings):
            numbers = [number for number, of_request in enumerate(settings) if of_request == alike]
            order = sorted(numbers, key=lambda number: -len(prompts[number]))
            self._in_portions(order, answer, ask, disable_tqdm)
        return [found[number] for number in range(len(requests))]

    def _settings(self, options: dict[str, Any]) -> GenerationSettings:
        """A task's `generation_kwargs` as ours."""
        left = dict(options)
        # As for a transformers model, the name of the end of a document ends a text too.
        stop = [*_take_texts(left, "until"), self._tokenizer.piece(self.eot_token_id)]
        limits = [_take_number(left, name, int) for name in _TOKEN_LIMITS]
        limit = next((given for given in limits if given is not None), MAX_NEW_TOKENS)
        sampling = _read_sampling(left)
        if left:
            raise FieldError(
                "generation_kwargs",
                left,
                "are not offered",
                f"use until, do_sample, temperature, top_k, top_p and {_TOKEN_LIMITS[0]} in the task",
            )
        if not 0 < limit < self.max_length:
            raise FieldError(
                f"generation_kwargs.{_TOKEN_LIMITS[0]}",
                limit,
                f"leaves no room for a context in data.sequence_length={self.max_length}"
                if limit > 0
                else "must be positive",
                "set it lower (--generation max_gen_toks=…), or data.sequence_length higher"
                if limit > 0
                else "set it higher (--generation max_gen_toks=…)",
            )
        return GenerationSettings(
            max_new_tokens=limit, stop=tuple(text for text in dict.fromkeys(stop) if text), sampling=sampling
        )

    def _prompt(self, context: str, settings: GenerationSettings) -> list[int]:
        """The end of the context that leaves room for the new tokens; never empty."""
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        kept = tokens[-(self.max_length - settings.max_new_tokens) :]
        self._num_cut += len(kept) < len(tokens)
        return kept

    def _in_portions(
        self,
        order: Sequence[int],
        answer: Callable[[int, T], None],
        ask: Callable[[list[int]], Sequence[T]],
        disable_tqdm: bool,
    ) -> None:
        """Asks for so many requests at a time, in the given order, and hands each its answer."""
        with tqdm(total=len(order), disable=disable_tqdm, desc="Requests") as bar:
            for portion in _portions(order):
                for number, result in zip(portion, ask(portion), strict=True):
                    answer(number, result)
                bar.update(len(portion))

    def _tell_cut(self) -> None:
        if self._num_cut:
            logger.warning(
                "%d contexts are longer than data.sequence_length=%d leaves room for; their beginnings are "
                "left out",
                self._num_cut,
                self.max_length,
            )


def _read_sampling(options: dict[str, Any]) -> Sampling:
    """Takes what concerns sampling out of `generation_kwargs`; without `do_sample` a temperature means it."""
    temperature, top_p = (_take_number(options, name, float) for name in ("temperature", "top_p"))
    top_k = _take_number(options, "top_k", int)
    if not options.pop("do_sample", bool(temperature)):
        return Sampling()
    # As transformers reads them: 0 of top_k is all.
    return Sampling(1.0 if temperature is None else temperature, top_k=top_k or None, top_p=top_p)


def _take_number(options: dict[str, Any], name: str, kind: type[N]) -> N | None:
    """Takes a number out of `generation_kwargs`; None where there is none."""
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
        f"is no {'whole ' if kind is int else ''}number",
        f"give one in the task, or as --generation {name}=…",
    )


def _take_texts(options: dict[str, Any], name: str) -> list[str]:
    """Takes a text or a list of them out of `generation_kwargs`."""
    given = options.pop(name, None) or []
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
        return list(texts)
    raise FieldError(
        f"generation_kwargs.{name}", given, "is neither a text nor a list of them", "quote it in the task"
    )


def _portions(order: Sequence[int]) -> Iterator[list[int]]:
    for begin in range(0, len(order), REQUESTS_AT_ONCE):
        yield list(order[begin : begin + REQUESTS_AT_ONCE])
