"""Windows over held-out text, checked before anything heavy is imported; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sas_megatron.config.errors import FieldError


@dataclass(frozen=True)
class WindowSettings:
    """How long windows are and how far each is from the one before, in tokens."""

    length: int
    stride: int
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.length < 1:
            raise FieldError("--sequence-length", self.length, "must be positive", "use 1024, say")
        if not 1 <= self.stride <= self.length:
            raise FieldError(
                "--stride",
                self.stride,
                f"must be between 1 and the {self.length} tokens of a window, or some would not be predicted",
                f"use {max(1, self.length // 2)}, or leave it out for windows side by side",
            )
        if self.batch_tokens < 1:
            raise FieldError("--batch-tokens", self.batch_tokens, "must be positive", "use 8192, say")
