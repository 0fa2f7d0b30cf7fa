"""How tasks of lm-evaluation-harness are run, checked before it is imported; no torch."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

from sas_megatron.config.errors import FieldError


@dataclass(frozen=True)
class TaskSettings:
    """What the harness is told; None: what it does by itself, or what the task's file says."""

    names: tuple[str, ...]
    num_fewshot: int | None = None
    # Documents of each task: a number, or below 1 a share.
    limit: float | None = None
    # In place of what tasks say of generation, as the harness reads it: key=value,…
    generation: str | None = None
    # Resamplings for standard errors that have no formula; 0: none. (The harness takes 100,000, in as many
    # processes as there are processors; with 1,000 an error is known to within some per cent of itself.)
    bootstrap_iterations: int = 1000
    runs_unsafe_code: bool = False
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if not self.names:
            raise FieldError("--tasks", "''", "names none", "give one or more, by comma")
        if importlib.util.find_spec("lm_eval") is None:
            raise FieldError(
                "--tasks",
                ",".join(self.names),
                "needs lm-evaluation-harness, which is not installed",
                "pip install 'sas-megatron[evaluation]'",
            )
        for option, value, least in (
            ("--num-fewshot", self.num_fewshot, 0),
            ("--bootstrap-iterations", self.bootstrap_iterations, 0),
            ("--batch-tokens", self.batch_tokens, 1),
        ):
            if value is not None and value < least:
                raise FieldError(option, value, f"must be at least {least}", f"use {least} or more")
        if self.limit is not None and not self.limit > 0:
            raise FieldError(
                "--limit",
                self.limit,
                "must be positive: documents of a task, or a share below 1",
                "use 100, say",
            )

    def as_dict(self) -> dict[str, Any]:
        """As summary.json has them."""
        return asdict(self)
