"""Fields of `train` that belong to `tuner_type: lora`, under Megatron-SWIFT's names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import StrictModel


class LoraFields(StrictModel):
    """Which parameters learn: all, or small matrices beside frozen ones."""

    tuner_type: Literal["full", "lora"] = "full"
    """`full`: all parameters learn. `lora`: the model is frozen, and modules get adapters, which is what learns."""
    lora_rank: int = Field(default=8, ge=1)
    """Rows of an adapter's A and columns of its B."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """What an adapter adds counts `lora_alpha / lora_rank` times."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Probability that a number of an adapter's input is left out in training; routers and embedding have none."""
    use_rslora: bool = False
    """Let adapters count `lora_alpha / sqrt(lora_rank)` times."""
    target_modules: tuple[str, ...] = Field(default=("all-linear",), min_length=1)
    """Modules with an adapter: ends of names in transformers (`q_proj`) or megatron (`linear_qkv`), or `all-linear`,
    `all-router`, `all-embedding`."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that learn whole beside the adapters and are stored in them, by ends of their names as in PEFT:
    embedding, output layer and norms (`embed_tokens`, `lm_head`, `norm`)."""
    adapter_load: str | None = None
    """Folder of a PEFT adapter to start from, with the same rank, strength and modules; else adapters start at zero."""

    def lora_problems(self) -> list[str]:
        """Settings that have no meaning without `tuner_type: lora`."""
        if self.tuner_type == "lora":
            return []
        fields = LoraFields.model_fields
        changed = [name for name in fields if name != "tuner_type" and getattr(self, name) != fields[name].default]
        return [f"{name} belongs to tuner_type: lora" for name in changed]
