"""How far a run has come, and what it remembers of its steps: all that decides how it goes on, beside its tensors."""

from __future__ import annotations

import dataclasses
from typing import Self

SPIKE_WINDOW = 32
"""Good losses that are remembered, where losses are checked for spikes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """The state of a run behind an iteration; part of each checkpoint.

    Attributes:
        iteration: Steps done, those that were left out among them.
        consumed_samples: Training samples read or passed over; the next batch begins there.
        consumed_tokens: Tokens that weights were updated with.
        skipped_steps: Steps whose update was left out.
        bad_in_a_row: Of these, the last ones without a good one between.
        rollbacks: How often the run went back to a checkpoint.
        recent_losses: Losses of the last good steps, where they are checked for spikes; else none.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    rollbacks: int = 0
    recent_losses: tuple[float, ...] = ()

    @property
    def updates(self) -> int:
        """Steps that Adam has made."""
        return self.iteration - self.skipped_steps

    def after(self, *, num_samples: int, num_tokens: int, loss: float | None) -> Self:
        """Behind one more step, which was good.

        Args:
            num_samples: Its samples.
            num_tokens: Its tokens.
            loss: Its loss, if losses are remembered.
        """
        losses = () if loss is None else (*self.recent_losses, loss)[-SPIKE_WINDOW:]
        return dataclasses.replace(
            self,
            iteration=self.iteration + 1,
            consumed_samples=self.consumed_samples + num_samples,
            consumed_tokens=self.consumed_tokens + num_tokens,
            bad_in_a_row=0,
            recent_losses=losses,
        )

    def after_skipping(self, *, num_samples: int) -> Self:
        """Behind one more step, whose update was left out."""
        return dataclasses.replace(
            self,
            iteration=self.iteration + 1,
            consumed_samples=self.consumed_samples + num_samples,
            skipped_steps=self.skipped_steps + 1,
            bad_in_a_row=self.bad_in_a_row + 1,
        )

    def after_rollback(self, to: Self, *, num_samples: int) -> Self:
        """Back at an earlier position, with the next batch behind the bad one that this position was in front of.

        Args:
            to: The position that the checkpoint holds.
            num_samples: Samples of the bad batch.
        """
        return dataclasses.replace(
            to, consumed_samples=self.consumed_samples + num_samples, rollbacks=self.rollbacks + 1
        )
