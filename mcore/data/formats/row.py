"""From the columns of one row to a checked `Row`, by what the row is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mcore.data.formats.conversations import to_messages
from mcore.data.formats.messages import check_messages, check_text, check_tools
from mcore.data.formats.pairs import take_pair
from mcore.data.rows import Dropped, Message, Method, Row, RowError, short

MEANINGFUL_COLUMNS = ("role", "content", "system", "history", "images", "videos", "audios", "objects")
"""Columns beside `messages` that would belong to the training text. Rows that use them are refused, because ignoring
them would train something else; all other columns are ignored."""

SFT_FIX = 'Write the row as {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}.'
PT_FIX = 'Write the row as {"text": …}.'


def to_row(data: Any, method: Method, place: str) -> Row | Dropped:
    """The row, or why it can't be used.

    Args:
        data: What the source holds at `place`.
        method: What the row is for.
        place: `file:line` or `source#row`.
    """
    try:
        if not isinstance(data, dict):
            raise RowError("not_an_object", "", "one JSON object", type(data).__name__)
        return MAKERS[method](data, place)
    except RowError as exc:
        return exc.dropped(place)


def _pt(data: dict[str, Any], place: str) -> Row:
    if "text" not in data and (document := _only_answer(data.get("messages"))) is not None:
        return Row(text=check_text(document, "messages[0].content"), place=place)
    if "text" not in data:
        raise _no_column("text", data, PT_FIX)
    return Row(text=check_text(data["text"], "text"), place=place)


def _only_answer(messages: Any) -> Any:
    """What is said where one message of the assistant stands for a document, as Megatron-SWIFT has it."""
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], dict):
        return None
    is_so = set(messages[0]) == {"role", "content"} and messages[0]["role"] == "assistant"
    return messages[0]["content"] if is_so else None


def _sft(data: dict[str, Any], place: str) -> Row:
    row = _conversation(data, place)
    if row.messages[-1].role != "assistant":
        raise RowError("no_answer", "the last message must be the assistant's")
    if not any(is_trained(turn) for turn in row.messages):
        raise RowError("nothing_trained", "messages", "an assistant's turn that is trained", "loss: false in all")
    return row


def is_trained(message: Message) -> bool:
    """Whether a row leaves a message to be trained."""
    return message.role == "assistant" and message.loss is not False and message.loss_scale != 0


def _conversation(data: dict[str, Any], place: str) -> Row:
    data = to_messages(data)
    if "messages" not in data:
        raise _no_column("messages", data, SFT_FIX)
    for name in MEANINGFUL_COLUMNS:
        if data.get(name):
            raise RowError("unused_column", "", f"no column {name!r} beside messages", short(data[name]), SFT_FIX)
    messages = check_messages(data["messages"])
    if not messages or messages[-1].role == "system":
        raise RowError("no_turn", "messages hold no turn")
    kwargs = data.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise RowError("bad_template_kwargs", "chat_template_kwargs", "an object", short(kwargs))
    tag = data.get("tag")
    return Row(
        messages,
        place=place,
        tools=check_tools(data.get("tools")),
        chat_template_kwargs=kwargs,
        language=tag if tag in ("zh", "en") else None,
    )


def _pair(data: dict[str, Any], place: str) -> Row:
    data, rejected, num_chosen = take_pair(data)
    return replace(_sft(data, place), rejected=rejected, num_chosen=num_chosen)


def _kto(data: dict[str, Any], place: str) -> Row:
    row = _sft(data, place)
    if "label" not in data:
        raise _no_column("label", data, "")
    if not isinstance(data["label"], bool):
        raise RowError("bad_label", "label", "true or false: whether the answer is wanted", short(data["label"]))
    return replace(row, label=data["label"])


def _seq_cls(data: dict[str, Any], place: str) -> Row:
    if "messages" not in data and "query" in data and "response" not in data:
        query = data["query"]
        rest = {key: value for key, value in data.items() if key != "query"}
        data = {**rest, "messages": [{"role": "user", "content": query}]}
    row = _conversation(data, place)
    if "label" not in data:
        raise _no_column("label", data, "")
    label = data["label"]
    if isinstance(label, int) and not isinstance(label, bool) and label >= 0:
        return replace(row, label=label)
    if _is_number(label) and isinstance(label, float):
        return replace(row, label=label)
    if isinstance(label, list) and label and all(map(_is_number, label)):
        return replace(row, label=tuple(map(float, label)))
    raise RowError("bad_label", "label", "a class from 0 on, a number, or one number a class", short(label))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


MAKERS: dict[Method, Callable[[dict[str, Any], str], Row]] = {
    "pt": _pt,
    "sft": _sft,
    "dpo": _pair,
    "rm": _pair,
    "kto": _kto,
    "seq_cls": _seq_cls,
}
"""What makes a row, by what it is for."""


def _no_column(name: str, data: dict[str, Any], fix: str) -> RowError:
    return RowError("no_column", name, "this column", f"only {', '.join(sorted(data)) or 'no column'}", fix)
