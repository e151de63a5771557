"""Fields of `train` that say how the learning rate goes, under Megatron-SWIFT's names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import StrictModel


class LearningRateFields(StrictModel):
    """A linear warm-up from zero to `lr`, then a decay to `min_lr`."""

    lr: float = Field(default=1.0e-5, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay after warm-up; `WSD` stays at the peak until the last `lr_wsd_decay_iters` steps of it."""
    lr_decay_iters: int | None = Field(default=None, ge=1)
    """Steps, the warm-up among them, after which the rate is `min_lr`; those of the whole run if unset."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the decay at the end of `WSD`."""
    lr_wsd_decay_iters: int | None = Field(default=None, ge=1)
    """Steps of the decay at the end of `WSD`."""
    lr_warmup_fraction: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the decay's steps (all, if `lr_decay_iters` is unset) in which the rate rises linearly from zero.
    Give this or `lr_warmup_iters`."""
    lr_warmup_iters: int = Field(default=0, ge=0)
    """Steps in which the rate rises linearly from zero."""

    def decay_iters(self, train_iters: int) -> int:
        """Steps of warm-up and decay together in a run of so many steps."""
        return self.lr_decay_iters or train_iters

    def warmup_iters(self, train_iters: int) -> int:
        """Steps of the warm-up in a run of so many steps."""
        fraction = self.lr_warmup_fraction
        return self.lr_warmup_iters if fraction is None else round(fraction * self.decay_iters(train_iters))

    def learning_rate_problems(self, train_iters: int | None) -> list[str]:
        """What does not go together, as far as it shows before the run's length is known."""
        problems = []
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            problems.append("give only one of lr_warmup_fraction and lr_warmup_iters")
        if self.min_lr > self.lr:
            problems.append(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr})")
        if self.lr_decay_iters is not None and self.lr_decay_style == "constant":
            problems.append("lr_decay_iters has no effect with lr_decay_style: constant")
        is_wsd = self.lr_decay_style == "WSD"
        if is_wsd and self.lr_wsd_decay_iters is None:
            problems.append("lr_decay_style: WSD needs lr_wsd_decay_iters")
        if not is_wsd and self.lr_wsd_decay_iters is not None:
            problems.append("lr_wsd_decay_iters belongs to lr_decay_style: WSD")
        if not is_wsd and self.lr_wsd_decay_style != "exponential":
            problems.append("lr_wsd_decay_style belongs to lr_decay_style: WSD")
        if self.lr_decay_iters is not None or train_iters is not None:
            problems += [problem for _, problem in self.length_problems(train_iters or 0)]
        return problems

    def length_problems(self, train_iters: int) -> list[tuple[str, str]]:
        """(field, problem) where warm-up and decay do not fit into a run of so many steps."""
        warmup, decay = self.warmup_iters(train_iters), self.decay_iters(train_iters)
        whole = f"{'train_iters' if self.lr_decay_iters is None else 'lr_decay_iters'} ({decay})"
        if warmup >= decay:
            field = "lr_warmup_iters" if self.lr_warmup_fraction is None else "lr_warmup_fraction"
            return [(field, f"the warm-up ({warmup} steps) must be shorter than {whole}")]
        if self.lr_decay_style == "WSD" and (steps := self.lr_wsd_decay_iters or 0) > decay - warmup:
            return [("lr_wsd_decay_iters", f"lr_wsd_decay_iters ({steps}) and the warm-up ({warmup}) exceed {whole}")]
        return []
