"""The `data` section: the token files, and how samples are cut from them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from sas_megatron.config.errors import FieldError
from sas_megatron.config.section import MAX_INT32, Section

# megatron.core.datasets.blended_dataset (0.16 to 0.19) numbers the data sets as int16.
MAX_PREFIXES = 2**15 - 2
SMALLEST_SHARE = 1e-18


class DataConfig(Section):
    """Token files written by `sas-megatron data prepare`, and the samples drawn from them."""

    section_name: ClassVar[str] = "data"

    prefixes: list[str] = Field(description="Paths of the token files, without the .bin and .idx endings.")
    weights: list[float] | None = Field(
        default=None,
        description="Relative share of the samples drawn from each prefix. null: in proportion to size.",
    )
    tokenizer: str = Field(
        description="The tokenizer that encoded the token files: a sentencepiece .model file, a "
        "tokenizer.json or its folder, or the name of an encoding of tiktoken."
    )
    end_of_document: str | None = Field(
        default=None,
        description="The special token after each document. null: the one that the tokenizer names.",
    )
    split: list[float] = Field(
        default=[0.97, 0.03], description="Shares of the documents used for training and for validation."
    )
    sequence_length: int = Field(description="S, the number of tokens of a sample.")
    reset_at_document_ends: bool = Field(
        default=False,
        description="At each end of document, restart the positions and mask attention to earlier documents.",
    )
    index_cache: str | None = Field(
        default=None,
        description="Folder for the sample indices. null: index_cache in the folder of the first prefix.",
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        self.require_positive("sequence_length")
        self.require_paths("prefixes", "tokenizer", "index_cache")
        self.require_at_most(MAX_INT32, "sequence_length", reason="positions are stored as int32")
        if not self.prefixes:
            raise self.problem("prefixes", "names no token file", "give at least one")
        if len(self.prefixes) > MAX_PREFIXES:
            raise FieldError(
                "data.prefixes",
                f"[{self.prefixes[0]}, …]",
                f"has {len(self.prefixes):,} entries, and Megatron-core blends at most {MAX_PREFIXES:,}",
                "prepare several sources as one token file",
            )
        if self.weights is not None and len(self.weights) != len(self.prefixes):
            raise self.problem(
                "weights",
                f"has {len(self.weights)} entries for {len(self.prefixes)} prefixes",
                "give one weight for each prefix",
                ("data.weights=null",),
            )
        if self.weights is not None and min(self.weights) <= 0:
            raise self.problem(
                "weights", "must be positive", "remove the prefixes that should not be sampled"
            )
        for field in ("weights", "split"):
            self._check_shares(field)
        if len(self.split) != 2 or min(self.split) <= 0:
            raise self.problem(
                "split",
                "must be two positive shares, training and validation",
                "use [0.97, 0.03], for example",
            )
        return self

    def _check_shares(self, field: str) -> None:
        """Check that numbers, which are divided by their sum, stay positive and finite."""
        numbers: list[float] = getattr(self, field) or []
        if numbers and not min(numbers) / sum(numbers) >= SMALLEST_SHARE:
            raise self.problem(
                field,
                f"must have a finite sum, and no number below {SMALLEST_SHARE:g} of it",
                "use shares such as 0.5",
            )
