"""Rows of other shapes become `messages`, or are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mcore.data.load import read_file

ASKED = [("user", "Hello?"), ("assistant", "Hello.")]
SYSTEM = ("system", "Be short.")
FIRST = [("user", "One?"), ("assistant", "Two.")]


def read(folder: Path, row: dict[str, Any]) -> tuple[list[list[tuple[str, str]]], list[str]]:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    rows, problems = read_file(path, "sft")
    return [[(turn.role, turn.content) for turn in row.messages] for row in rows], [str(found) for found in problems]


TURNS = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": TURNS}, ASKED),
        ({"conversations": [{"from": "system", "value": "Be short."}, *TURNS]}, [SYSTEM, *ASKED]),
        ({"conversations": TURNS, "system": "Be short.", "id": 7}, [SYSTEM, *ASKED]),
        ({"instruction": "Hello?", "input": "", "output": "Hello."}, ASKED),
        ({"instruction": "Hello?", "input": None, "output": "Hello."}, ASKED),
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, [("user", "Add.\n1 1"), ("assistant", "2")]),
        ({"query": "Hello?", "response": "Hello."}, ASKED),
        ({"query": "Hello?", "response": "Hello.", "history": None, "system": ""}, ASKED),
        (
            {"query": "Hello?", "response": "Hello.", "history": [["One?", "Two."]], "system": "Be short."},
            [SYSTEM, *FIRST, *ASKED],
        ),
    ],
)
def test_shapes(tmp_path: Path, row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    assert read(tmp_path, row) == ([messages], [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": "Hello"}, "conversations that are no list"),
        ({"conversations": [{"role": "user", "content": "Hello?"}]}, "conversations that are no list"),
        ({"conversations": [{"from": "human", "value": "Hello?"}]}, "the last message must be the assistant's"),
        ({"conversations": [{**TURNS[0], "weight": 0}, TURNS[1]]}, "no key but role and content"),
        (
            {"conversations": [TURNS[0], {"from": "function_call", "value": "{}"}]},
            "messages[1].tool_calls[0]: expected a",
        ),
        ({"conversations": [{"from": 1, "value": "x"}]}, "messages[0].role"),
        ({"conversations": TURNS, "tools": "[1]"}, "tools[0]: expected a function"),
        ({"conversations": TURNS, "system": ["x"]}, "messages[0].content"),
        ({"instruction": "Add.", "input": 3, "output": "2"}, "an input that is int"),
        ({"instruction": "Add.", "input": "1 1", "output": ""}, "messages[1].content: is empty"),
        ({"instruction": "Add.", "output": None}, "messages[1].content"),
        ({"instruction": "Add.", "input": "1 1"}, "expected this column"),
        ({"query": "Hello?", "response": "Hello.", "history": [["One?"]]}, "a history that is no list of pairs"),
        ({"query": "Hello?", "response": "Hello.", "instruction": "a", "output": "b"}, "Alpaca and of query/response"),
    ],
)
def test_what_is_no_such_row_is_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    rows, problems = read(tmp_path, row)
    assert not rows
    assert any(reason in problem for problem in problems), problems
