"""Fields of `data` that say how conversations become text, and which of it is trained."""

from __future__ import annotations

from typing import Literal

from configs.schema.base import StrictModel

LossScale = Literal["default", "last_round", "all", "ignore_empty_think", "last_round+ignore_empty_think"]
MultiTurn = Literal["whole", "split"]


class TemplateFields(StrictModel):
    """Fields that `data` has beside those of rows."""

    template: str | None = None
    """Jinja file that takes the place of the tokenizer's chat template, and is written into the exported model."""
    enable_thinking: bool | None = None
    """Handed to the chat template, and made its default in the exported model; without it the template's own stands."""
    loss_scale: LossScale = "default"
    """What is trained of a conversation (SFT): every answer of the assistant, only the last one (`last_round`), or all
    tokens. With `ignore_empty_think` an empty thought in front of an answer is no target. A message's own `loss` and
    `loss_scale` go before."""
    multi_turn: MultiTurn = "whole"
    """What becomes of a conversation whose template shows an earlier answer otherwise than it was given, as templates
    do that take out thoughts: an error, or a sample for each answer, as a server sees it (`split`)."""
