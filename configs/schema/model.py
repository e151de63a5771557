"""`model`: where the base model comes from."""

from __future__ import annotations

from configs.schema.base import StrictModel


class ModelConfig(StrictModel):
    """The base model of a run."""

    source: str
    """A local Hugging Face folder, a name of the catalogue (`smollm2-135m-instruct`), `hf:org/name[@revision]`
    (Hugging Face hub) or `ms:org/name[@revision]` (ModelScope)."""
