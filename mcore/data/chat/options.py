"""How a run has its conversations rendered and weighed. No torch, no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema.data import DataConfig
from configs.schema.template import LossScale, MultiTurn
from mcore.errors import DataError, Problem


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """What a run says about templates and masks; fields are those of `data`.

    Attributes:
        template: Text of the Jinja template in place of the tokenizer's own; None for that.
        enable_thinking: Handed to the template; None leaves it to the template.
        loss_scale: Which turns are trained.
        multi_turn: What becomes of a conversation whose turns can't all be trained in one text.
        stop_tokens: Ids at which a server ends an answer, beside the tokenizer's `eos_token`.
    """

    template: str | None = None
    enable_thinking: bool | None = None
    loss_scale: LossScale = "default"
    multi_turn: MultiTurn = "whole"
    stop_tokens: frozenset[int] = frozenset()

    @property
    def trains_last_turn_only(self) -> bool:
        """Whether turns before the last are trained only where a row asks for it."""
        return self.loss_scale.startswith("last_round")

    @property
    def ignores_empty_thoughts(self) -> bool:
        """Whether an empty thought in front of an answer is no target."""
        return self.loss_scale.endswith("ignore_empty_think")


def options_of(config: DataConfig, hf_dir: Path) -> TemplateOptions:
    """The options of a run with a model.

    Args:
        config: The run's `data`.
        hf_dir: Folder with `config.json` and, where there is one, `generation_config.json`.

    Raises:
        DataError: The template's file can't be read.
    """
    return TemplateOptions(
        template=None if config.template is None else read_template(Path(config.template)),
        enable_thinking=config.enable_thinking,
        loss_scale=config.loss_scale,
        multi_turn=config.multi_turn,
        stop_tokens=frozenset(stop_tokens(hf_dir)),
    )


def read_template(path: Path) -> str:
    """Text of a Jinja template.

    Raises:
        DataError: It can't be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError("the template can't be used", [Problem(f"data.template: {path}", found=str(exc))]) from exc


def stop_tokens(hf_dir: Path) -> Iterator[int]:
    """Ids at which vLLM ends an answer of the model, as its two configs name them.

    Source: vLLM 0.32 `v1/engine/input_processor.py` (`update_from_generation_config`).
    """
    for name in ("config.json", "generation_config.json"):
        try:
            found: Any = json.loads((hf_dir / name).read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):  # what must be there is looked at elsewhere
            continue
        yield from [found] if isinstance(found, int) else [part for part in found or () if isinstance(part, int)]
