"""Supervised fine-tuning: loss on the assistant's tokens of `messages`."""

from __future__ import annotations

from pathlib import Path

from configs.schema.data import DataConfig
from mcore.data.dataset import TokenDataset, build_datasets
from mcore.train.methods.causal_lm import forward_step, prepare

__all__ = ["datasets", "forward_step", "prepare"]


def datasets(config: DataConfig, hf_dir: Path) -> tuple[TokenDataset, TokenDataset]:
    """Training and validation samples, by the chat template of the base model."""
    return build_datasets(config, "sft", hf_dir)
