"""`promote`: which alias moves to the model when every gate has said yes, and who has to agree."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.schema.base import StrictModel

Alias = Literal["candidate", "staging", "production"]
"""What a model is known by where it is used."""

TOKEN_VARIABLES = {"hf": "HF_TOKEN", "ms": "MODELSCOPE_API_TOKEN"}
"""Environment variable that holds a hub's token."""

PUSH_TO = r"^(hf|ms):[\w.-]+/[\w.-]+$"
"""Repositories of hubs."""

MODEL_NAME = r"^[0-9a-z][0-9a-z_.-]{0,63}$"
"""Names that are folders of the registry."""


class PromoteConfig(StrictModel):
    """Promotion of the exported model, behind every gate.

    A model that is not better than the one in production is not promoted; the run says so and ends well.
    """

    alias: Alias = "candidate"
    """The alias that moves to the model."""
    model: str | None = Field(default=None, pattern=MODEL_NAME)
    """Name that the registry keeps the model's aliases under; the run's name if unset. Runs that make the same model
    anew share it."""
    approval: bool = False
    """Whether somebody has to agree (`mcore-flows approve`, or the form in the UI) before the alias moves."""
    timeout_s: float = Field(default=86400.0, gt=0)
    """Seconds that the run waits for somebody to agree, counted from when it asked. No answer means no."""
    push: str | None = Field(default=None, pattern=PUSH_TO)
    """Repository that the promoted model is uploaded to, private if it has to be made: `hf:org/name` of the Hugging
    Face hub or `ms:org/name` of ModelScope; none if unset."""
    push_secret: str | None = Field(default=None, pattern=r"^[a-z0-9-]+$")
    """Name of the Prefect Secret block that holds the hub's token. If unset, the token is `HF_TOKEN` or
    `MODELSCOPE_API_TOKEN` of the worker's environment. The token itself never belongs into a run."""

    @model_validator(mode="after")
    def _secret_is_for_a_push(self) -> Self:
        if self.push_secret is not None and self.push is None:
            raise ValueError("promote.push_secret is the token for promote.push, which is not set")
        return self
