"""What is to be generated and how, checked before anything heavy is imported; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen by their logits; by default the likeliest is taken.

    The logits are divided by `temperature`, the `top_k` likeliest tokens stay, and of those the fewest that
    have `top_p` of the probability between them; one of these is drawn.
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
                "must be at least 0, which takes the likeliest",
                "use 0.8, say",
            )
        if self.top_k is not None and self.top_k < 1:
            raise FieldError("--top-k", self.top_k, "must be positive", "use 40, say, or leave it out")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise FieldError("--top-p", self.top_p, "must be above 0 and at most 1", "use 0.95, say")
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            given = {"--top-k": self.top_k, "--top-p": self.top_p}
            option, value = next((name, value) for name, value in given.items() if value is not None)
            raise FieldError(
                option,
                value,
                "concerns drawing, and --temperature=0 takes the likeliest",
                "set --temperature=1, or leave it out",
            )


@dataclass(frozen=True)
class GenerationSettings:
    """How texts go on, and what ends them."""

    max_new_tokens: int = 128
    # The text ends before the first of these.
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    # Slots of the caches that a batch of texts may take, prompts and new tokens together.
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise FieldError(option, getattr(self, name), "must be positive", "use 1 or more")
        if "" in self.stop:
            raise FieldError("--stop", "''", "is empty, so that every text would end at once", "leave it out")
        for text in self.stop:
            _check_utf8("--stop", text)


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, *, context: int) -> list[list[int]]:
    """Tokens of each prompt.

    Raises:
        UserError: there is none, one is empty or no UTF-8, or it leaves no room in `context` tokens.
    """
    if not prompts:
        raise UserError("--prompt: none is given; give one or more, or a file of them with --prompts")
    for prompt in prompts:
        _check_utf8("--prompt", prompt)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for number, tokens in enumerate(encoded, start=1):
        if not tokens:
            raise FieldError("--prompt", "''", f"prompt {number} is empty", "give some text to go on from")
        if len(tokens) >= context:
            raise FieldError(
                "--prompt",
                f"{prompts[number - 1][:20]!r}…",
                f"prompt {number} is {len(tokens)} tokens long, and data.sequence_length={context} leaves no "
                "room behind it",
                f"shorten it, or set data.sequence_length={2 * len(tokens)} (beyond what training has seen)",
            )
    return encoded


def _check_utf8(option: str, text: str) -> None:
    """Raises `FieldError` for bytes that the command line could not read as text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise FieldError(
            option, ascii(text[:20]), "is no UTF-8", "give text in UTF-8, or a file of it with --prompts"
        ) from None
