"""The `data` section: which token files, in what windows."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from sas_megatron.config.section import Section


class DataConfig(Section):
    """Token files written by `sas-megatron data prepare`, and how samples are cut from them."""

    section_name: ClassVar[str] = "data"

    prefixes: list[str] = Field(description="Token files, each without its .bin/.idx ending.")
    weights: list[float] | None = Field(
        default=None, description="Share of samples from each prefix; null draws by size."
    )
    tokenizer: str = Field(description="The sentencepiece .model file that wrote the token files.")
    split: list[float] = Field(
        default=[0.97, 0.03], description="Shares of the documents for training and validation."
    )
    sequence_length: int = Field(description="S, tokens of a sample.")
    reset_at_document_ends: bool = Field(
        default=False,
        description="Restart positions and hide earlier documents from attention at each end of document.",
    )
    index_cache: str | None = Field(
        default=None, description="Folder for the sample indices; null: index_cache beside the first prefix."
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        self.require_positive("sequence_length")
        if not self.prefixes:
            raise self.problem("prefixes", "names no token file", "give at least one")
        if self.weights is not None and len(self.weights) != len(self.prefixes):
            raise self.problem(
                "weights",
                f"has {len(self.weights)} entries for {len(self.prefixes)} prefixes",
                "give one each",
            )
        if self.weights is not None and min(self.weights) <= 0:
            raise self.problem("weights", "must be positive", "leave out what is not to be drawn from")
        if len(self.split) != 2 or min(self.split) <= 0:
            raise self.problem(
                "split",
                "must be two positive shares, training and validation",
                "use [0.97, 0.03], for example",
            )
        return self
