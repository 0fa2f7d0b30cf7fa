"""Settings of generation, harness tasks and sliding windows, validated before torch is imported; no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.token_files import open_token_files
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.validation_sets import check_validation_sets


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits. By default it is the most likely token.

    The logits are divided by `temperature`. The `top_k` most likely tokens are kept, and of those the
    smallest number whose probabilities sum to at least `top_p`. One of these tokens is sampled.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise FieldError(
                "--temperature",
                self.temperature,
                "must be at least 0 (0 selects the most likely token)",
                "use 0.8, for example",
            )
        if self.top_k is not None and self.top_k < 1:
            raise FieldError("--top-k", self.top_k, "must be positive", "use 40, for example, or omit it")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise FieldError("--top-p", self.top_p, "must be above 0 and at most 1", "use 0.95, for example")
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            given = {"--top-k": self.top_k, "--top-p": self.top_p}
            option, value = next((name, value) for name, value in given.items() if value is not None)
            raise FieldError(
                option,
                value,
                "has no effect with --temperature=0, which selects the most likely token",
                "set --temperature=1, or omit it",
            )


@dataclass(frozen=True)
class GenerationSettings:
    """How texts are generated, and where they end."""

    max_new_tokens: int = 128
    # The text ends before the first occurrence of any of these strings.
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    # Largest number of cache slots of a batch, for prompts and new tokens.
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise FieldError(option, getattr(self, name), "must be positive", "use 1 or more")
        if "" in self.stop:
            raise FieldError("--stop", "''", "is empty, so every text would end immediately", "omit it")
        for text in self.stop:
            _check_utf8("--stop", text)


@dataclass(frozen=True)
class TaskSettings:
    """How tasks of lm-evaluation-harness are run. None selects the default of the harness or of the task."""

    names: tuple[str, ...]
    num_fewshot: int | None = None
    # Documents of each task: a number, or a fraction if below 1.
    limit: float | None = None
    # Replaces the generation options of tasks, in the format of the harness: key=value,…
    generation: str | None = None
    # Bootstrap resamplings for standard errors without a formula; 0 disables these errors. The harness would
    # use 100,000 and one process per processor; with 1,000 the error is accurate to a few per cent.
    bootstrap_iterations: int = 1000
    runs_unsafe_code: bool = False
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if not self.names:
            raise FieldError("--tasks", "''", "is empty", "give one or more names, separated by commas")
        if importlib.util.find_spec("lm_eval") is None:
            raise FieldError(
                "--tasks",
                ",".join(self.names),
                "requires lm-evaluation-harness, which is not installed",
                "pip install 'sas-megatron[evaluation]'",
            )
        for option, value, minimum in (
            ("--num-fewshot", self.num_fewshot, 0),
            ("--bootstrap-iterations", self.bootstrap_iterations, 0),
            ("--batch-tokens", self.batch_tokens, 1),
        ):
            if value is not None and value < minimum:
                raise FieldError(option, value, f"must be at least {minimum}", f"use {minimum} or more")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit % 1 == 0)):
            raise FieldError(
                "--limit",
                self.limit,
                "must be positive: a whole number of documents, or a fraction below 1",
                "use 100, for example",
            )
        if self.generation is not None:
            _check_generation(self.generation)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as summary.json stores them."""
        return asdict(self)


def _check_generation(options: str) -> None:
    """Raise `FieldError` if the options do not have the format of the harness."""
    pairs = [option.partition("=") for option in options.split(",")]
    for name, equals, value in pairs:
        if not (name.strip() and equals and value):
            raise FieldError(
                "--generation",
                f"{options!r}",
                "must have the form name=value,name=value",
                "use max_gen_toks=64,temperature=0.8, for example",
            )


@dataclass(frozen=True)
class WindowSettings:
    """Length of sliding windows, distance between their starts, and size of a batch, in tokens."""

    length: int
    stride: int
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.length < 1:
            raise FieldError("--sequence-length", self.length, "must be positive", "use 1024, for example")
        if not 1 <= self.stride <= self.length:
            raise FieldError(
                "--stride",
                self.stride,
                f"must be between 1 and the window length {self.length}, so that every token is predicted",
                f"use {max(1, self.length // 2)}, or omit it for windows without overlap",
            )
        if self.batch_tokens < 1:
            raise FieldError("--batch-tokens", self.batch_tokens, "must be positive", "use 8192, for example")


def windowed_config(config: RunConfig, length: int) -> RunConfig:
    """Return a run's config with validation windows of another length, and about as many tokens in total.

    Raises:
        UserError: The token files of the run cannot be read or have too few tokens for such windows, or
            `data.reset_at_document_ends` is on.
    """
    if config.data.reset_at_document_ends:
        raise config.data.problem(
            "reset_at_document_ends",
            "separates the documents in a window, which is not supported for validation windows",
            "use --files, which measures each document separately",
        )
    data = config.data.model_copy(update={"sequence_length": length})
    open_token_files(data, vocab_size=config.model.vocab_size)
    num_windows = max(1, config.evaluation.num_sequences * config.data.sequence_length // length)
    evaluation = config.evaluation.model_copy(update={"num_sequences": num_windows})
    windowed = config.model_copy(update={"data": data, "evaluation": evaluation})
    check_validation_sets(windowed, verify=False)
    return windowed


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, *, context: int) -> list[list[int]]:
    """Return the tokens of each prompt.

    Args:
        prompts: The texts.
        tokenizer: The tokenizer of the model.
        context: Largest number of tokens that the model reads.

    Raises:
        UserError: There are no prompts, or a prompt is empty, not UTF-8, or not shorter than `context`.
    """
    if not prompts:
        raise UserError("--prompt: is missing; give one or more, or a file of prompts with --prompts")
    for prompt in prompts:
        _check_utf8("--prompt", prompt)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for number, tokens in enumerate(encoded, start=1):
        if not tokens:
            raise FieldError("--prompt", "''", f"prompt {number} is empty", "give at least one character")
        if len(tokens) >= context:
            raise FieldError(
                "--prompt",
                f"{prompts[number - 1][:20]!r}…",
                f"prompt {number} has {len(tokens)} tokens, so data.sequence_length={context} leaves no room "
                "for new tokens",
                f"shorten it, or set data.sequence_length={2 * len(tokens)} (longer than in training)",
            )
    return encoded


def _check_utf8(option: str, text: str) -> None:
    """Raise `FieldError` if the text contains bytes of the command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FieldError(
            option, ascii(text[:20]), "is not UTF-8", "give UTF-8 text, or a file of it with --prompts"
        ) from None
