"""Preference pairs: two answers to one prompt, the better one first.

    messages + rejected_response     the other answer in place of the last one: a text, or messages
    messages + rejected_messages     the other conversation as a whole
    prompt, chosen, rejected         TRL; each a text, or messages
    chosen, rejected                 TRL: two conversations that begin alike

Source: Megatron-SWIFT 4.6 (`rejected_response`, `rejected_messages`) and TRL's dataset formats.
"""

from __future__ import annotations

from typing import Any

from mcore.data.formats.conversations import as_messages, to_messages
from mcore.data.formats.messages import check_messages
from mcore.data.rows import Message, RowError

COLUMNS = ("rejected_response", "rejected_messages", "rejected")
PAIR_FIX = "Write the row with messages and rejected_response, or with prompt, chosen and rejected."


def take_pair(data: dict[str, Any]) -> tuple[dict[str, Any], tuple[Message, ...], int]:
    """The row with its better conversation in `messages`; the other answer; how many last messages it stands for.

    Raises:
        RowError: The row is no pair, or its two sides do not fit each other.
    """
    rest = dict(data)
    present = [name for name in COLUMNS if rest.get(name) is not None]
    if len(present) != 1:
        names = " and ".join(present) or f"only {', '.join(sorted(data)) or 'no column'}"
        raise RowError("no_pair", "", "one column with the answer that is worse", names, PAIR_FIX)
    other = rest.pop(present[0])
    if present[0] == "rejected":
        better, worse, num_shared = _trl(rest, other)
        rest["messages"] = better
    else:
        rest = to_messages(rest)
        found = rest.get("messages")
        if not isinstance(found, list):
            raise RowError("no_column", "messages", "this column", f"only {', '.join(sorted(data))}", PAIR_FIX)
        better, num_shared = found, _prompt_length(found)
        is_whole = present[0] == "rejected_messages"
        worse = as_messages(other, "assistant", present[0])
        worse = worse if is_whole else [*better[:num_shared], *worse]
    chosen, rejected = check_messages(better), check_messages(worse, present[0])
    if chosen[:num_shared] != rejected[:num_shared]:
        raise RowError("bad_pair", present[0], "the same turns up to the last question", "another prompt")
    for name, side in (("messages", chosen), (present[0], rejected)):
        if len(side) == num_shared or side[-1].role != "assistant":
            raise RowError("bad_pair", f"{name}: the last message must be the assistant's")
    if chosen == rejected:
        raise RowError("bad_pair", present[0], "another answer than the better one", "the same")
    return rest, rejected[num_shared:], len(chosen) - num_shared


def _trl(rest: dict[str, Any], other: Any) -> tuple[list[Any], list[Any], int]:
    if rest.get("chosen") is None:
        raise RowError("no_pair", "chosen", "this column", "none", PAIR_FIX)
    chosen = rest.pop("chosen")
    if rest.get("prompt") is not None:
        prompt = as_messages(rest.pop("prompt"), "user", "prompt")
        better = [*prompt, *as_messages(chosen, "assistant", "chosen")]
        return better, [*prompt, *as_messages(other, "assistant", "rejected")], len(prompt)
    if not isinstance(chosen, list) or not isinstance(other, list):
        raise RowError("bad_pair", "chosen and rejected", "a prompt beside, or two lists of messages", "text", PAIR_FIX)
    shared = next((i for i, (a, b) in enumerate(zip(chosen, other, strict=False)) if a != b), None)
    num_shared = min(len(chosen), len(other)) if shared is None else shared
    if not any(isinstance(turn, dict) and turn.get("role") == "user" for turn in chosen[:num_shared]):
        raise RowError("bad_pair", "chosen and rejected", "two conversations that begin alike", "no question in common")
    return chosen, other, min(num_shared, len(chosen) - 1, len(other) - 1)


def _prompt_length(messages: list[Any]) -> int:
    """Messages up to and with the last question."""
    asked = [index for index, turn in enumerate(messages) if isinstance(turn, dict) and turn.get("role") == "user"]
    return asked[-1] + 1 if asked else 0
