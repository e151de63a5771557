"""Supervised fine-tuning: loss on the assistant's tokens of `messages`."""

from __future__ import annotations

from mcore.train.methods.causal_lm import forward_step, prepare

__all__ = ["forward_step", "prepare"]
