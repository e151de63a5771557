"""Fields of `train` that say how the samples of a step are laid into rows, under Megatron-SWIFT's names."""

from __future__ import annotations

from pydantic import Field

from configs.schema.base import StrictModel


class PackingFields(StrictModel):
    """Whether samples share a row. A step has the same samples and the same loss either way."""

    packing: bool = True
    """Lay samples end to end instead of padding them; attention and positions stay those of each sample alone. A step
    is still `global_batch_size` samples, dealt out so that all processes have like work."""
    packing_length: int | None = Field(default=None, ge=8)
    """Tokens of a row, at least `data.max_length`, which it is if unset. A process computes rows of up to
    `micro_batch_size` times this at once."""

    def packing_problems(self) -> list[str]:
        """Settings that have no meaning without another."""
        if self.packing_length is not None and not self.packing:
            return ["packing_length needs packing: true"]
        return []
