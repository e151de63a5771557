"""Rows of other shapes as `messages`: ShareGPT, Alpaca, query/response/history, and prompt/completion.

The shape is found by its columns. Columns that a shape does not use stay beside `messages`, so that the check of rows
(`mcore.data.formats.row`) judges them like any other; nothing is repaired, and a row of no shape or two is named.

Source: column names as Megatron-SWIFT 4.6, LLaMA-Factory and TRL document them.
"""

from __future__ import annotations

from typing import Any

from mcore.data.formats.tool_turns import join_tool_turns
from mcore.data.rows import RowError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "tool_call", "observation": "tool"}
"""Names of speakers in ShareGPT rows that have another name in `messages`; others are taken as they are."""

COLUMNS = {
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
    "query/response": ("query", "response"),
    "prompt/completion": ("prompt", "completion"),
}
"""The columns by which a shape is known."""


def to_messages(data: dict[str, Any]) -> dict[str, Any]:
    """The row with its conversation in `messages`; a row that has `messages`, or is of no known shape, as it is.

    Raises:
        RowError: The columns are those of two shapes, or what they hold is not of the shape.
    """
    if "messages" in data:
        messages = data["messages"]
        return {**data, "messages": join_tool_turns(messages)} if isinstance(messages, list) else data
    found = [name for name, columns in COLUMNS.items() if all(column in data for column in columns)]
    if not found:
        return data
    if len(found) > 1:
        raise _misshapen("ambiguous_shape", f"columns of {' and of '.join(found)}")
    rest = dict(data)
    system = rest.pop("system", None) or ""
    if found[0] == "ShareGPT":
        messages = join_tool_turns(_sharegpt(rest))
    elif found[0] == "prompt/completion":
        asked = as_messages(rest.pop("prompt"), "user", "prompt")
        messages = [*asked, *as_messages(rest.pop("completion"), "assistant", "completion")]
    else:
        messages = _turns(rest, *COLUMNS[found[0]])
    first = [{"role": "system", "content": system}] if system != "" else []
    return {**rest, "messages": [*first, *messages]}


def as_messages(value: Any, role: str, name: str) -> list[Any]:
    """A column that holds one speaker's text, or messages.

    Raises:
        RowError: It holds neither.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return join_tool_turns(value)
    raise _misshapen("bad_shape", f"{name} that is {type(value).__name__}, neither text nor messages")


def _sharegpt(rest: dict[str, Any]) -> list[dict[str, Any]]:
    turns = rest.pop("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {"from", "value"} <= set(turn) for turn in turns
    ):
        raise _misshapen("bad_shape", "conversations that are no list of objects with from and value")
    messages = []
    for turn in turns:
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        speaker = turn["from"]
        role = SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
        # Other keys, such as a weight, stay, so that the check of rows refuses them.
        messages.append({**others, "role": role, "content": turn["value"]})
    return messages


def _turns(rest: dict[str, Any], asked: str, answered: str) -> list[dict[str, Any]]:
    question, answer = rest.pop(asked), rest.pop(answered)
    more = rest.pop("input", None) if asked == "instruction" else None
    if more and not isinstance(question, str):
        raise _misshapen("bad_shape", f"an instruction that is {type(question).__name__}, not text")
    if more is not None and not isinstance(more, str):
        raise _misshapen("bad_shape", f"an input that is {type(more).__name__}, not text")
    if more:
        question = f"{question}\n{more}" if question else more
    history = rest.pop("history", None) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise _misshapen("bad_shape", "a history that is no list of pairs of question and answer")
    return [
        {"role": role, "content": content}
        for pair in (*history, (question, answer))
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _misshapen(reason: str, found: str) -> RowError:
    fix = 'Write the row as {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}.'
    return RowError(reason, "", "columns of one shape of rows", found, fix)
