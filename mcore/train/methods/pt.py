"""Continued pre-training: loss on every token of `text`."""

from __future__ import annotations

from mcore.train.methods.causal_lm import forward_step, prepare

__all__ = ["forward_step", "prepare"]
