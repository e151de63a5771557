"""What all groups of a run model share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Frozen, refuses unknown keys and numbers that are none, takes the text under each field as its description."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,  # a gate of infinity would let everything pass
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
