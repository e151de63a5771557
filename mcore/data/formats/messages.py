"""The `messages` of a row: each message, and who may speak when.

A conversation is an optional system message, then turns: the user, the assistant, and, after an assistant that calls
tools, the tools' answers and the assistant again. Nothing is repaired: two turns of one speaker in a row, a tool that
nobody called, or content that is no text are named.

Source: OpenAI's chat format (`tool_calls`, `tool_call_id`), and Megatron-SWIFT 4.6 for `loss` and `loss_scale`.
"""

from __future__ import annotations

import json
import math
from typing import Any, get_args

from mcore.data.rows import Message, Role, RowError, short

ROLES = get_args(Role)
KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content", "tool_calls", "loss", "loss_scale"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
"""What a message may hold, by its role. Any other key would change what is trained, so it is refused."""
FOLLOWERS = {
    "the beginning": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "an assistant that calls tools": ("tool",),
    "tool": ("tool", "assistant"),
}
"""Who may speak after whom."""


def check_messages(value: Any, where: str = "messages", *, after: str = "the beginning") -> tuple[Message, ...]:
    """Messages of a row, each checked, and their order.

    Args:
        value: What the row holds under `where`.
        where: Name of the column, for messages of errors.
        after: Who spoke before the first of them (a key of `FOLLOWERS`).

    Raises:
        RowError: What is wrong first.
    """
    if not isinstance(value, list):
        raise RowError("wrong_type", where, "a valid list", short(value))
    messages = tuple(_message(item, f"{where}[{index}]") for index, item in enumerate(value))
    for index, message in enumerate(messages):
        allowed = FOLLOWERS[after]
        if message.role not in allowed:
            must = " or ".join(allowed[-1:] if after == "the beginning" else allowed)
            raise RowError(
                "wrong_turn",
                f"{where}[{index}] is from {message.role} where {must} must speak "
                "(an optional system message, then user and assistant in turn, with tools' answers after their calls)",
            )
        after = speaker(message)
    return messages


def speaker(message: Message) -> str:
    """The key of `FOLLOWERS` that a message is."""
    return "an assistant that calls tools" if message.tool_calls else message.role


def check_text(value: Any, where: str, *, may_be_empty: bool = False) -> str:
    """A text that is one, says something, and has no half characters.

    Raises:
        RowError: It is none.
    """
    if not isinstance(value, str):
        reason = "non_text_content" if isinstance(value, list | dict) else "wrong_type"
        raise RowError(reason, where, "a valid string", short(value))
    if not may_be_empty and not value.strip():
        raise RowError("empty_content", f"{where}: is empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            at = f"{where}: holds half a character (a lone surrogate) at {exc.start}"
            raise RowError("broken_unicode", at) from exc
    return value


def check_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The functions that a row offers: a list, or a JSON text of one; each bare or as `{"type": "function", …}`.

    Raises:
        RowError: They are none.
    """
    if not value:
        return ()
    value = _from_json(value, "tools", "bad_tools")
    if not isinstance(value, list):
        raise RowError("bad_tools", "tools", "a list of functions", short(value))
    tools = []
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise RowError("bad_tools", f"tools[{index}]", "a function with a name", short(tool))
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise RowError("wrong_type", where, "an object with role and content", short(value))
    # Tables hold all columns in each row: what a message lacks is null there.
    said = {key: item for key, item in value.items() if item is not None or key in ("role", "content")}
    if "role" not in said:
        raise RowError("no_role", f"{where}.role", "this key", "none")
    role = said["role"]
    if role not in ROLES:
        raise RowError("unknown_role", f"{where}.role", f"{', '.join(map(repr, ROLES[:-1]))} or 'tool'", short(role))
    for key in said:
        if key not in KEYS[role]:
            raise RowError("unknown_key", f"{where}.{key}", f"no key but {_named(KEYS[role])}", short(said[key]))
    calls = tuple(_tool_calls(said["tool_calls"], f"{where}.tool_calls")) if said.get("tool_calls") else ()
    content = said.get("content", "" if calls else None)
    if "content" not in said and not calls:
        raise RowError("no_content", f"{where}.content", "this key", "none")
    content = "" if content is None and calls else content
    thought = said.get("reasoning_content")
    loss, loss_scale = _loss(said, where)
    return Message(
        role,
        check_text(content, f"{where}.content", may_be_empty=bool(calls) or role == "tool"),
        check_text(thought, f"{where}.reasoning_content", may_be_empty=True) if thought is not None else None,
        calls,
        loss,
        loss_scale,
        name=_optional_text(said, "name", where),
        tool_call_id=_optional_text(said, "tool_call_id", where),
    )  # fmt: skip


def _named(keys: set[str]) -> str:
    first = [key for key in ("role", "content") if key in keys]
    names = [*first, *sorted(keys - set(first))]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _loss(said: dict[str, Any], where: str) -> tuple[bool | None, float | None]:
    loss, scale = said.get("loss"), said.get("loss_scale")
    if loss is not None and not isinstance(loss, bool):
        raise RowError("bad_loss", f"{where}.loss", "true or false", short(loss))
    if scale is not None:
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not is_number or not math.isfinite(scale) or scale < 0:
            raise RowError("bad_loss_scale", f"{where}.loss_scale", "a number from 0 on", short(scale))
        if loss is False and scale > 0:
            raise RowError("bad_loss_scale", f"{where}.loss_scale", "0, since loss is false", short(scale))
    return loss, None if scale is None else float(scale)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    value = _from_json(value, where, "bad_tool_call")
    if not isinstance(value, list):
        raise RowError("bad_tool_call", where, "a list of calls", short(value))
    calls = []
    for index, call in enumerate(value):
        at = f"{where}[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError("bad_tool_call", at, "a call of a function with a name", short(call))
        arguments = _from_json(function.get("arguments") or {}, f"{at}.function.arguments", "bad_tool_call")
        if not isinstance(arguments, dict):
            raise RowError("bad_tool_call", f"{at}.function.arguments", "an object", short(arguments))
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _from_json(value: Any, where: str, reason: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise RowError(reason, where, "JSON", str(exc)) from exc


def _optional_text(said: dict[str, Any], key: str, where: str) -> str | None:
    return check_text(said[key], f"{where}.{key}") if key in said else None
