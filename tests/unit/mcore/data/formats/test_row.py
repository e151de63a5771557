"""Rows for every method: conversations with tools, preference pairs, labels; what adapters make of other columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.schema.data import DataConfig
from mcore.data.formats.row import to_row
from mcore.data.rows import Dropped, Message, Row
from mcore.data.sources.source import open_source, read
from mcore.errors import DataError

USER = {"role": "user", "content": "2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
ASKED, ANSWERED, WRONG = Message("user", "2+2?"), Message("assistant", "4"), Message("assistant", "5")


def row(data: dict[str, Any], method: Any = "sft") -> Row:
    found = to_row(data, method, "rows:1")
    assert isinstance(found, Row), found
    return found


def test_a_conversation_with_tools() -> None:
    written = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    found = row({
        "messages": [
            {"role": "system", "content": "Count."},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [written], "reasoning_content": "hm", "loss_scale": 2},
            {"role": "tool", "content": "", "tool_call_id": "1", "name": "add"},
            {"role": "tool", "content": "4"},
            {**GOOD, "loss": True},
        ],
        "tools": json.dumps([{"name": "add", "parameters": {}}, {"type": "function", "function": {"name": "sub"}}]),
        "chat_template_kwargs": {"enable_thinking": False},
    })  # fmt: skip
    assert found.messages == (
        Message("system", "Count."),
        ASKED,
        Message("assistant", "", "hm", ({"id": "1", **CALL},), loss_scale=2.0),
        Message("tool", "", name="add", tool_call_id="1"),
        Message("tool", "4"),
        Message("assistant", "4", loss=True),
    )
    assert found.tools == (
        {"type": "function", "function": {"name": "add", "parameters": {}}},
        {"type": "function", "function": {"name": "sub"}},
    )
    assert found.chat_template_kwargs == {"enable_thinking": False}
    assert found.messages[2].for_template() == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [{"id": "1", **CALL}],
    }
    assert len({found, row({"messages": [USER, GOOD]})}) == 2  # rows with tools can be told apart in a set


def test_a_conversation_may_end_with_a_call() -> None:
    found = row({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]})
    assert found.messages[1].tool_calls == (CALL,)


@pytest.mark.parametrize(
    "data",
    [
        {"messages": [
            USER,
            {"role": "assistant", "content": "Well."},
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 2}}'},
            {"role": "tool_call", "content": '{"name": "add", "arguments": "{\\"a\\": 2}"}'},
            {"role": "tool_response", "content": "4"},
            GOOD,
        ]},
        {"conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "gpt", "value": "Well."},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4"},
        ]},
    ],
    ids=["Megatron-SWIFT", "ShareGPT"],
)  # fmt: skip
def test_calls_that_are_turns_of_their_own(data: dict[str, Any]) -> None:
    called = Message("assistant", "Well.", tool_calls=(CALL, CALL))
    assert row(data).messages == (ASKED, called, Message("tool", "4"), ANSWERED)


PAIRS: dict[str, dict[str, Any]] = {
    "rejected_response": {"messages": [USER, GOOD], "rejected_response": "5"},
    "rejected_response as messages": {"messages": [USER, GOOD], "rejected_response": [BAD]},
    "rejected_messages": {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    "query and response": {"query": "2+2?", "response": "4", "rejected_response": "5"},
    "TRL": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "TRL conversational": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 9},
}


@pytest.mark.parametrize("method", ["dpo", "rm"])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, method: str) -> None:
    found = row(PAIRS[name], method)
    assert (found.messages, found.rejected, found.num_chosen) == ((ASKED, ANSWERED), (WRONG,), 1)


def test_a_pair_may_part_before_the_last_answer() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    data = {"chosen": [USER, call, {"role": "tool", "content": "4"}, GOOD], "rejected": [USER, BAD]}
    found = row(data, "dpo")
    assert (len(found.messages), found.num_chosen, found.rejected) == (4, 3, (WRONG,))


def test_documents_and_labels() -> None:
    assert row({"text": "once"}, "pt").text == row({"messages": [{**GOOD, "content": "once"}]}, "pt").text == "once"
    assert row({"messages": [USER, GOOD], "label": False}, "kto").label is False
    assert row({"prompt": "2+2?", "completion": "4", "label": True}, "kto").messages == (ASKED, ANSWERED)
    assert row({"query": "2+2?", "label": 3}, "seq_cls").label == 3
    assert row({"messages": [USER, GOOD], "label": 0.5}, "seq_cls").label == 0.5
    assert row({"messages": [USER], "label": [1, 0.0]}, "seq_cls").label == (1.0, 0.0)


@pytest.mark.parametrize(
    ("data", "method", "reason"),
    [
        ({"messages": [USER, GOOD]}, "dpo", "no_pair"),
        ({"messages": [USER, GOOD], "rejected_response": "5", "rejected_messages": [USER, BAD]}, "dpo", "no_pair"),
        ({"rejected": "5"}, "rm", "no_pair"),
        ({"rejected_response": "5"}, "dpo", "no_column"),
        ({"messages": [USER, GOOD], "rejected_response": "4"}, "dpo", "bad_pair"),
        ({"messages": [USER, GOOD], "rejected_response": ""}, "dpo", "empty_content"),
        ({"messages": [USER, GOOD], "rejected_response": 5}, "dpo", "bad_shape"),
        ({"messages": [USER, GOOD], "rejected_response": [BAD, USER]}, "dpo", "bad_pair"),
        ({"messages": [USER], "rejected_response": "5"}, "dpo", "bad_pair"),
        ({"messages": [USER, GOOD], "rejected_messages": [{**USER, "content": "3+3?"}, BAD]}, "dpo", "bad_pair"),
        ({"chosen": "4", "rejected": "5"}, "dpo", "bad_pair"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "?"}, BAD]}, "dpo", "bad_pair"),
        ({"messages": [USER, GOOD]}, "kto", "no_column"),
        ({"messages": [USER, GOOD], "label": 1}, "kto", "bad_label"),
        ({"messages": [USER, GOOD]}, "seq_cls", "no_column"),
        ({"messages": [USER], "label": -1}, "seq_cls", "bad_label"),
        ({"messages": [USER], "label": True}, "seq_cls", "bad_label"),
        ({"messages": [USER], "label": []}, "seq_cls", "bad_label"),
        ({"messages": [USER], "label": float("nan")}, "seq_cls", "bad_label"),
        ({"text": 3}, "pt", "wrong_type"),
        ({"messages": [USER, GOOD]}, "pt", "no_column"),
    ],
)
def test_rows_that_do_not_fit_their_method(data: dict[str, Any], method: Any, reason: str) -> None:
    found = to_row(data, method, "rows:1")
    assert isinstance(found, Dropped) and found.reason == reason, found
    assert found.place == "rows:1" and found.problem.subject.startswith("rows:1")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return str(path)


def test_an_adapter_names_columns_and_values(tmp_path: Path) -> None:
    (tmp_path / "adapter.yaml").write_text(
        'columns: {answer: response}\nvalues: {label: {good: true, bad: false, "1": true}}\n'
    )
    config = DataConfig(dataset=(), adapter=str(tmp_path / "adapter.yaml"), columns={"question": "query"})
    rows = [{"question": "2+2?", "answer": "4", "label": label} for label in ("good", "bad", 1, "fair")]
    *found, dropped = read(open_source(write(tmp_path / "rows.jsonl", *rows), config), "kto")
    assert [(item.messages, item.label) for item in found if isinstance(item, Row)] == [
        ((ASKED, ANSWERED), True),
        ((ASKED, ANSWERED), False),
        ((ASKED, ANSWERED), True),
    ]
    assert isinstance(dropped, Dropped) and dropped.reason == "unmapped_value"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "can't be read"),
        ("colums: {}", "colums"),
        ("- a", "must hold a mapping"),
        ("columns: {question: query}", "expected other columns than those of"),
    ],
)
def test_adapters_that_are_none(tmp_path: Path, text: str | None, found: str) -> None:
    path = tmp_path / "adapter.yaml"
    if text is not None:
        path.write_text(text)
    config = DataConfig(dataset=(), adapter=str(path), columns={"question": "query"})
    with pytest.raises(DataError, match=found):
        open_source(write(tmp_path / "rows.jsonl", {"query": "a", "response": "b"}), config)


def test_names_in_two_languages(tmp_path: Path) -> None:
    rows = [
        {"query": "你是谁?", "response": "我是{{NAME}}, {{AUTHOR}}", "tag": "zh"},
        {"query": "Who?", "response": "{{NAME}} by {{AUTHOR}}", "tag": "en"},
        {"query": "Who?", "response": "{{NAME}} by {{AUTHOR}}"},
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    config = DataConfig(dataset=(), model_name=("小黄", "Huang"), model_author="魔搭", system="{{NAME}}")
    found = [item.messages for item in read(open_source(path, config), "sft") if isinstance(item, Row)]
    assert [(turns[0].content, turns[-1].content) for turns in found] == [
        ("小黄", "我是小黄, 魔搭"),
        ("Huang", "Huang by 魔搭"),
        ("Huang", "Huang by 魔搭"),
    ]
