"""`convert` and `verify`: from Hugging Face to megatron-core, and the gate behind it."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import StrictModel


class ConvertConfig(StrictModel):
    """How the base model becomes a megatron-core checkpoint. Dtypes stay as they are on disk."""

    make_vocab_size_divisible_by: int = Field(default=128, ge=1)
    """Rows: the vocabulary is padded with zero rows to a multiple of this, so that any usual tensor parallel size
    divides it."""


class VerifyConfig(StrictModel):
    """The proof after a conversion in either direction: bit equality on disk, then logits."""

    max_relative_error: float = Field(default=1.0e-4, gt=0)
    """Largest difference of fp32 logits that passes, as a fraction of the logits' standard deviation."""
    num_prompts: int = Field(default=4, ge=1)
    """Number of fixed prompts that are compared at every position."""
    max_prompt_tokens: int = Field(default=96, ge=8)
    """Tokens: prompts are cut to this length."""
