"""`convert` and `verify`: from Hugging Face to megatron-core, and the gate behind it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import StrictModel


class ConvertConfig(StrictModel):
    """How the base model becomes a megatron-core checkpoint. Dtypes stay as they are on disk."""

    make_vocab_size_divisible_by: int = Field(default=128, ge=1)
    """Rows: the vocabulary is padded with zero rows to a multiple of this, so that any usual tensor parallel size
    divides it."""
    workers: int = Field(default=1, ge=1)
    """Processes that divide the work. Two are faster unless the disk is what it waits for."""


class VerifyConfig(StrictModel):
    """The proof after a conversion in either direction: bits on disk, logits in fp32, noise in the weights' dtype."""

    max_relative_error: float = Field(default=1.0e-4, gt=0)
    """Largest difference of fp32 logits that passes, as a fraction of the logits' standard deviation."""
    num_prompts: int = Field(default=4, ge=1)
    """Number of fixed prompts that are compared at every position."""
    max_prompt_tokens: int = Field(default=96, ge=8)
    """Tokens: prompts are cut to this length."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype in which megatron-core's rounding noise is compared with that of transformers; `auto` is the one that most
    of the weights have. `float32` leaves this proof out."""
    max_noise_ratio: float = Field(default=1.25, gt=0)
    """Largest noise of megatron-core that passes, in multiples of that of transformers."""
