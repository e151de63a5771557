"""`export`: from megatron-core back to Hugging Face."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import StrictModel


class ExportConfig(StrictModel):
    """How a checkpoint becomes a Hugging Face folder."""

    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the written weights; `auto` keeps each tensor's dtype as it is in the checkpoint."""
    merge_lora: bool = True
    """With `train.tuner_type: lora`: write the base with the adapter merged into it. false: write the PEFT adapter
    alone, which counts on top of the base."""
    max_shard_size_gb: float = Field(default=5.0, gt=0)
    """Largest safetensors file, in 10^9 bytes."""
    workers: int = Field(default=1, ge=1)
    """Processes that divide the work. Two are faster unless the disk is what it waits for."""
