"""Tools' turns of other formats as OpenAI's: a call belongs to the assistant's message, an answer is a tool's.

`tool_call` (Megatron-SWIFT) and `function_call` (ShareGPT) are turns of their own there, whose content is
`{"name": …, "arguments": …}` as JSON; `tool_response` and `observation` are the answers.
"""

from __future__ import annotations

import json
from typing import Any

from mcore.data.rows import RowError, short

CALLS = frozenset({"tool_call", "function_call"})
ANSWERS = frozenset({"tool_response", "observation"})


def join_tool_turns(messages: list[Any]) -> list[Any]:
    """Messages with each call in the assistant's message that makes it; others are left as they are.

    Raises:
        RowError: A call is no JSON object.
    """
    joined: list[Any] = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in CALLS | ANSWERS:
            joined.append(message)
        elif role in ANSWERS:
            joined.append({**message, "role": "tool"})
        else:
            call = {"type": "function", "function": _called(message, index)}
            others = {key: value for key, value in message.items() if key not in ("role", "content")}
            before = joined[-1] if joined and isinstance(joined[-1], dict) else {}
            if before.get("role") == "assistant" and not others:
                joined[-1] = {**before, "tool_calls": [*(before.get("tool_calls") or ()), call]}
            else:
                joined.append({**others, "role": "assistant", "content": "", "tool_calls": [call]})
    return joined


def _called(message: dict[str, Any], index: int) -> dict[str, Any]:
    content = message.get("content")
    try:
        call = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError) as exc:
        raise RowError("bad_tool_call", f"messages[{index}].content", "JSON", str(exc)) from exc
    if not isinstance(call, dict):
        raise RowError("bad_tool_call", f"messages[{index}].content", "an object with name and arguments", short(call))
    return call
