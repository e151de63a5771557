"""`data`: what the model learns from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.schema.placeholders import Names
from configs.schema.sources import SourceFields
from configs.schema.template import TemplateFields


class DataConfig(TemplateFields, SourceFields):
    """Training and validation data. Field names are those of Megatron-SWIFT where the meaning is the same."""

    dataset: tuple[str, ...]
    """Files of training rows, `path` or `path#N` for N rows of it: without replacement below its size, whole repeats
    plus a random rest above. Rows hold `messages` or the columns of ShareGPT, Alpaca or query/response (SFT), or `text`
    (PT)."""
    val_dataset: tuple[str, ...] = ()
    """Files of validation rows, as in `dataset`."""
    split_dataset_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the training rows set aside for validation, if `val_dataset` is empty."""
    max_length: int = Field(default=2048, ge=8)
    """Tokens: the longest sample."""
    truncation_strategy: Literal["raise", "delete", "left", "right"] = "raise"
    """What happens to a longer sample: an error before training, left out (and counted), or cut at its beginning
    (`left`) or its end (`right`)."""
    model_name: Names = ""
    """Fills the placeholder `{{NAME}}` in the rows; two values fill those tagged `zh` and `en`, in this order."""
    model_author: Names = ""
    """Fills the placeholder `{{AUTHOR}}` in the rows; one value or two, as `model_name`."""
    system: str | None = None
    """System message put before conversations that have none; without it the chat template's own default stands."""
    dataset_shuffle: bool = True
    """Whether rows are drawn and ordered at random (by `data_seed` and the epoch)."""
    data_seed: int = 42
    """Seed of sampling, splitting and order."""
    dataset_num_proc: int = Field(default=1, ge=1)
    """Processes that tokenise the rows. What they make is the same for any number."""

    @model_validator(mode="after")
    def _shares_are_of_whole_entries(self) -> Self:
        if self.interleave_prob and len(self.interleave_prob) != len(self.dataset):
            raise ValueError(
                f"interleave_prob has {len(self.interleave_prob)} shares for {len(self.dataset)} entries of dataset"
            )
        if self.interleave_prob and any("#" in entry for entry in self.dataset):
            raise ValueError("interleave_prob and #N both say how many rows are taken; leave one of them out")
        return self
