"""Fields of `train` that belong to 8-bit floating-point matrix products, under Megatron-SWIFT's names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import StrictModel

TOKENS = 16
"""FP8 matrix products take tokens by multiples of this: 8 in front of the last dimension, 16 in the last one, which the
tokens are when weights get their gradients."""


class Fp8Fields(StrictModel):
    """Whether Transformer Engine multiplies the matrices of the decoder's layers in FP8. Weights stay as they are."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Multiply in FP8: `e4m3` for all, or e5m2 for the gradients of outputs (`hybrid`); null for products in
    `torch_dtype`. Needs a GPU of compute capability 8.9 and sizes that are multiples of 16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "delayed"
    """Where scales come from: the largest numbers of earlier steps (`delayed`), those of the tensor itself
    (`tensorwise`), or of each block of 128 numbers (`blockwise`; needs compute capability 9.0)."""
    fp8_amax_history_len: int = Field(default=1024, ge=1)
    """With `delayed`: steps whose largest numbers are remembered."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """With `delayed`: which of them counts."""

    def fp8_problems(self, *, torch_dtype: str, backend: str, tuner_type: str) -> list[str]:
        """Settings that have no meaning without another, or not beside it.

        Args:
            torch_dtype: The run's.
            backend: The run's.
            tuner_type: The run's.
        """
        fields = Fp8Fields.model_fields
        changed = [name for name in fields if getattr(self, name) != fields[name].default]
        if self.fp8_format is None:
            return [f"{name} needs fp8_format" for name in changed]
        problems = []
        if torch_dtype != "bfloat16":
            problems.append("fp8_format needs torch_dtype: bfloat16")
        if backend == "torch":
            problems.append("fp8_format needs backend transformer_engine")
        if self.fp8_recipe != "delayed":
            of_delayed = [name for name in changed if name.startswith("fp8_amax_")]
            problems += [f"{name} needs fp8_recipe: delayed" for name in of_delayed]
        elif tuner_type == "lora":
            text = "fp8_recipe: delayed needs tuner_type: full; checkpoints of adapters have no place for its scales"
            problems.append(f"{text} (tensorwise and blockwise need none)")
        return problems

    @property
    def token_multiple(self) -> int:
        """A process' tokens of a micro-batch are padded to a multiple of this."""
        return 1 if self.fp8_format is None else TOKENS
