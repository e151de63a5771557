"""A conversation as text, by the chat template that a server would use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mcore.data.chat.options import TemplateOptions
from mcore.data.rows import Message, Row
from mcore.errors import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_DATE = datetime(2024, 7, 26)
"""What a template that asks for today's date is told: the date that the Llama 3 templates have as their own default.
With the real date, the same rows would be other samples tomorrow, and a resumed run would be refused."""

READS_THINKING = re.compile(r"""['"]thinking['"]|\.thinking\b""")
"""Templates such as gpt-oss' call the thoughts of a message so."""


class RefusedError(Exception):
    """The template does not take a conversation; in its own words."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template of a run: the tokenizer's own or the run's."""

    tokenizer: PreTrainedTokenizerBase
    options: TemplateOptions

    def problems(self) -> list[Problem]:
        """Everything that keeps it from being used at all."""
        source = self.source()
        if not source:
            return [Problem("the tokenizer", "a chat template", "none", "Use an instruct model, or method: pt.")]
        if self.options.enable_thinking is not None and "enable_thinking" not in source:
            fix = "Leave data.enable_thinking out."
            return [Problem("data.enable_thinking", "a chat template that reads it", "one that does not", fix)]
        return []

    def source(self) -> str:
        """Its text; of a tokenizer with several templates all of them."""
        found = self.options.template or self.tokenizer.chat_template or ""
        return found if isinstance(found, str) else "\n".join(found.values())

    def render(self, row: Row, num_messages: int | None = None, *, prompt: bool = False) -> str:
        """The row's text, or that of its first messages.

        Args:
            row: A conversation.
            num_messages: How many of its messages; all if None.
            prompt: Whether the header of the assistant's next turn follows, as a server has it.

        Raises:
            RefusedError: The template does not take it.
        """
        options: dict[str, Any] = {"strftime_now": RENDER_DATE.strftime, **row.chat_template_kwargs}
        if self.options.enable_thinking is not None:
            options.setdefault("enable_thinking", self.options.enable_thinking)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    as_templates_read(row.messages[:num_messages], self.source()),
                    tools=list(row.tools) or None,
                    chat_template=self.options.template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **options,
                )
            )
        except Exception as exc:  # a template that meets what it was not made for fails in any way Python has
            reason = str(exc).splitlines()
            raise RefusedError(reason[0] if reason else type(exc).__name__) from exc


@lru_cache(maxsize=8)
def _reads_thinking(source: str) -> bool:
    return READS_THINKING.search(source) is not None


def as_templates_read(messages: Sequence[Message], source: str = "") -> list[dict[str, Any]]:
    """Messages as vLLM hands them to a template.

    Thoughts go by the names that vLLM gives them, `reasoning` and `reasoning_content`, and by `thinking` where the
    template, whose text is `source`, reads that. Source: vLLM 0.32 `renderers/chat_utils.py`.
    """
    reads_thinking = _reads_thinking(source)
    said = [message.for_template() for message in messages]
    for message in said:
        thought = message.get("reasoning_content")
        if thought is not None:
            message["reasoning"] = thought
            if reads_thinking:
                message["thinking"] = thought
    return said
