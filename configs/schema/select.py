"""`select`: which checkpoint of the training run goes on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import StrictModel


class SelectConfig(StrictModel):
    """Choice of a checkpoint; the chosen one is always checked to be complete."""

    strategy: Literal["latest", "best", "iteration"] = "latest"
    """`latest`: what `latest_checkpointed_iteration.txt` says; `best`: the lowest validation loss; `iteration`: the
    one that `iteration` names."""
    iteration: int | None = Field(default=None, ge=1)
    """Iteration to take, with `strategy: iteration`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.strategy == "iteration") != (self.iteration is not None):
            raise ValueError("iteration is given exactly when strategy is 'iteration'")
        return self
