"""What a row is once it has been read and checked, and what a row becomes that can't be used.

Light: no torch, no tokenizer, no library of data sets. Where rows come from is in `mcore.data.sources`, what shapes
they may have there in `mcore.data.formats`, and which of them a run takes in `mcore.data.load`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from configs.schema.placeholders import fill_placeholders, placeholders_in
from mcore.errors import DataError, Problem

Method = Literal["pt", "sft", "dpo", "kto", "rm", "seq_cls"]
"""What a row is for. Training itself knows `pt` and `sft`."""

Role = Literal["system", "user", "assistant", "tool"]

MAX_LISTED = 50
"""Problems that an error lists; the others are counted."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said; empty for an assistant that only calls tools, and for a tool that returns nothing.
        reasoning_content: What the assistant thought before; None if the row says nothing about it.
        tool_calls: `{"type": "function", "function": {"name": str, "arguments": dict}}`, and `id` where there is one.
        loss: Whether an assistant's turn is trained; None leaves it to the run.
        loss_scale: Weight of its tokens in the loss; None leaves it to the run.
        name: Of a tool's answer: the tool.
        tool_call_id: Of a tool's answer: the call.
    """

    role: Role
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    loss: bool | None = None
    loss_scale: float | None = None
    name: str | None = None
    tool_call_id: str | None = None

    def __hash__(self) -> int:  # tool calls are dicts
        return hash((self.role, self.content, self.reasoning_content))

    def for_template(self) -> dict[str, Any]:
        """The message as a chat template is given it: only what it has, and nothing that is about training."""
        said: dict[str, Any] = {"role": self.role, "content": self.content}
        for key in ("reasoning_content", "name", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                said[key] = value
        if self.tool_calls:
            said["tool_calls"] = list(self.tool_calls)
        return said

    def filled(self, fill: Callable[[str], str]) -> Message:
        """The message with its texts replaced; what a tool is called with stays as it is."""
        thought = None if self.reasoning_content is None else fill(self.reasoning_content)
        return replace(self, content=fill(self.content), reasoning_content=thought)


@dataclass(frozen=True, slots=True)
class Row:
    """One checked row. Rows with the same content are equal, wherever they are.

    Attributes:
        messages: The conversation; of a preference pair the one with the better answer. Empty for `pt`.
        text: The document of `pt`.
        place: `file:line`, or `source#row` where a file has no lines.
        tools: JSON-schema functions for the template, `{"type": "function", "function": {...}}`.
        rejected: Of a preference pair: the messages that stand in place of the last turns of `messages`, behind the
            prompt that both share. `messages[: len(messages) - num_chosen]` is that prompt.
        num_chosen: Of a preference pair: how many of the last messages are the better answer.
        label: Of `kto` whether the answer is wanted; of `seq_cls` the class, a number, or one number a class.
        chat_template_kwargs: Handed to the template, such as `enable_thinking`.
        language: `zh` or `en` if the row is tagged so: which of two `model_name` fills its placeholders.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    place: str = field(default="", compare=False)
    tools: tuple[dict[str, Any], ...] = ()
    rejected: tuple[Message, ...] = ()
    num_chosen: int = 0
    label: bool | int | float | tuple[float, ...] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    language: Literal["zh", "en"] | None = field(default=None, compare=False)

    def __hash__(self) -> int:  # tools and keyword arguments are dicts
        return hash((self.messages, self.text, self.rejected, self.label))

    def filled(self, values: Mapping[str, str]) -> Row:
        """The row with its placeholders replaced.

        Raises:
            KeyError: A placeholder has no value.
        """
        if not self.placeholders():
            return self

        def fill(text: str) -> str:
            return fill_placeholders(text, values)

        return replace(
            self,
            messages=tuple(turn.filled(fill) for turn in self.messages),
            text=fill(self.text),
            rejected=tuple(turn.filled(fill) for turn in self.rejected),
        )

    def placeholders(self) -> set[str]:
        """Names of the placeholders that the row holds."""
        turns = (*self.messages, *self.rejected)
        texts = (self.text, *(text for turn in turns for text in (turn.content, turn.reasoning_content or "")))
        return {name for text in texts if "{{" in text for name in placeholders_in(text)}

    def with_system(self, system: str | None) -> Row:
        """The row with a system message in front, if it has a conversation and none of its own."""
        if system is None or not self.messages or self.messages[0].role == "system":
            return self
        return replace(self, messages=(Message("system", system), *self.messages))


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a row that can't be used becomes.

    Attributes:
        reason: A short word for it, which a report can count by: `not_json`, `empty_content` …
        problem: What is wrong in words. Its subject begins with the row's place.
        place: Where the row is, as in `Row`.
    """

    reason: str
    problem: Problem
    place: str = ""


class RowError(Exception):
    """Why a row can't be used, found while it is taken apart; `dropped` gives it its place.

    Args:
        reason: As in `Dropped`.
        where: The part of the row, such as `messages[2].content`; empty for the row as a whole.
        expected: As in `Problem`, and so are the others.
    """

    def __init__(self, reason: str, where: str = "", expected: str = "", found: str = "", fix: str = "") -> None:
        super().__init__(reason, where, expected, found, fix)
        self.reason = reason
        self.where = where
        self.finding = (expected, found, fix)

    def dropped(self, place: str) -> Dropped:
        """The row at `place`, left out for this."""
        subject = f"{place}: {self.where}" if self.where else place
        return Dropped(self.reason, Problem(subject, *self.finding), place)


def short(value: Any) -> str:
    """A value as it is shown in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def raise_problems(summary: str, problems: Iterable[Problem]) -> None:
    """Raise the problems together, the first `MAX_LISTED` of them listed and the others counted; none, no error.

    Raises:
        DataError: There are problems.
    """
    listed = list(problems)
    if len(listed) > MAX_LISTED:
        listed = [*listed[:MAX_LISTED], Problem(f"and {len(listed) - MAX_LISTED} more problems")]
    if listed:
        raise DataError(summary, listed)
