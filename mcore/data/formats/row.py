"""From the columns of one row to a checked `Row`, by what the row is for."""

from __future__ import annotations

from typing import Any

from mcore.data.formats.conversations import to_messages
from mcore.data.formats.messages import check_messages, check_text, check_tools
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
        return _pt(data, place) if method == "pt" else _sft(data, place)
    except RowError as exc:
        return exc.dropped(place)


def _pt(data: dict[str, Any], place: str) -> Row:
    if "text" not in data:
        raise _no_column("text", data, PT_FIX)
    return Row(text=check_text(data["text"], "text"), place=place)


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


def _no_column(name: str, data: dict[str, Any], fix: str) -> RowError:
    return RowError("no_column", name, "this column", f"only {', '.join(sorted(data)) or 'no column'}", fix)
