"""The `evaluation` section."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from sas_megatron.config.errors import FieldError
from sas_megatron.config.section import Section, require_path_lengths

# The name under which `evaluate` reports the loss of all sets.
TOTAL = "all"


def _list_prefixes(value: Any) -> Any:
    """Return sets whose prefix is not in a list with a list of it."""
    if not isinstance(value, dict):
        return value
    return {name: [prefixes] if isinstance(prefixes, str) else prefixes for name, prefixes in value.items()}


class EvaluationConfig(Section):
    """Held-out loss during training, on the same fixed windows each time."""

    section_name: ClassVar[str] = "evaluation"

    interval: int | None = Field(
        default=None, description="Steps between evaluations; null: evaluate only at the end."
    )
    num_sequences: int = Field(
        default=64,
        description="Number of windows drawn from the validation split; the same windows for every seed.",
    )
    sets: Annotated[dict[str, list[str]] | None, BeforeValidator(_list_prefixes)] = Field(
        default=None,
        description="Named validation sets: name -> one or several prefixes of token files. Each has "
        "num_sequences windows of its own, and the loss of a run is that of all their tokens. A set of "
        "prefixes that are in data.prefixes has their validation documents, and a set of others all "
        "documents. null: the validation documents of data.prefixes.",
    )
    probe_sequences: int = Field(
        default=0,
        description="The first windows on which each evaluation also measures activations, scores and the "
        "simulation by layer (records of the kind `probe` in metrics.jsonl); 0: none.",
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        self.require_positive("interval", "num_sequences")
        self._check_sets()
        if not 0 <= self.probe_sequences <= self.num_sequences:
            raise self.problem(
                "probe_sequences",
                f"must be between 0 and evaluation.num_sequences={self.num_sequences}",
                "use 2, for example",
                (f"evaluation.probe_sequences={min(2, self.num_sequences)}",),
            )
        return self

    def _check_sets(self) -> None:
        if self.sets is not None and not self.sets:
            raise self.problem("sets", "names no set", "name one, or remove it", ("evaluation.sets=null",))
        for name, prefixes in (self.sets or {}).items():
            if not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
                raise FieldError(
                    "evaluation.sets",
                    name,
                    "becomes part of the names of columns and curves",
                    "use letters, digits, dots, hyphens and underscores",
                )
            if name == TOTAL:
                raise FieldError("evaluation.sets", name, "is the name of the total", "use another name")
            if not prefixes or len(set(prefixes)) < len(prefixes):
                raise FieldError(
                    f"evaluation.sets.{name}",
                    prefixes,
                    "must be different prefixes of token files, at least one",
                    f"write {name}: data/{name}, for example",
                )
            require_path_lengths(f"evaluation.sets.{name}", prefixes)
