"""Broken rows of many kinds in one file: each is counted by its reason and has its place, and none is lost."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from configs.schema.data import DataConfig
from mcore.data.load import load_rows
from mcore.data.rows import Dropped, Row
from mcore.data.sources.source import open_source, read
from mcore.errors import DataError


def turns(*pairs: tuple[str, Any], **last: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in pairs]
    messages[-1] |= last
    return {"messages": messages}


GOOD = turns(("user", "Hello?"), ("assistant", "Hello."))
USER = ("user", "Hello?")
CALL = {"name": "f", "arguments": "{}"}

# fmt: off
BROKEN: dict[str, list[Any]] = {
    "empty_line": [b"", b" \t"],
    "not_utf8": [b'{"messages": "\xff"}'],
    "not_json": [b"hello", b'{"messages": [{"role"', b'{} {}', b"\xef\xbb\xbf{}", b"[" * 100_000],
    "duplicate_key": [b'{"messages": [], "messages": []}'],
    "not_an_object": [[1], 3, None, "text"],
    "no_column": [{}, {"prompt": "hi", "response": "hello"}],
    "ambiguous_shape": [{"query": "a", "response": "b", "instruction": "a", "output": "b"}],
    "bad_shape": [{"conversations": "hi"}, {"query": "a", "response": "b", "history": ["c"]},
                  {"prompt": 3, "completion": "b"}],
    "unused_column": [{**GOOD, "images": ["cat.png"]}, {**GOOD, "system": "Be brief."}],
    "no_turn": [{"messages": []}, turns(("system", "Be brief."))],
    "wrong_type": [{"messages": None}, {"messages": "hi"}, {"messages": ["hi"]}, turns(("user", 5))],
    "no_role": [{"messages": [{"content": "hi"}]}],
    "unknown_role": [turns(("narrator", "hi")), turns((None, "hi"))],  # type: ignore[arg-type]
    "no_content": [{"messages": [{"role": "user"}]}],
    "empty_content": [turns(USER, ("assistant", "")), turns(USER, ("assistant", " \n"))],
    "non_text_content": [turns(("user", [{"type": "image_url", "image_url": {"url": "x"}}]))],
    "broken_unicode": [b'{"messages": [{"role": "user", "content": "\\ud83d"}]}'],
    "unknown_key": [turns(("user", "hi"), loss=True), turns(USER, ("assistant", "a"), weight=1)],
    "wrong_turn": [turns(USER, USER), turns(("assistant", "a")), turns(USER, ("assistant", "a"), ("assistant", "b")),
                   turns(USER, ("system", "x")), turns(USER, ("tool", "4")),
                   turns(USER, ("assistant", "a"), ("tool", "4"))],
    "no_answer": [turns(USER), turns(USER, ("assistant", "a"), USER)],
    "nothing_trained": [turns(USER, ("assistant", "a"), loss=False), turns(USER, ("assistant", "a"), loss_scale=0)],
    "bad_loss": [turns(USER, ("assistant", "a"), loss="yes")],
    "bad_loss_scale": [turns(USER, ("assistant", "a"), loss_scale=-1), turns(USER, ("assistant", "a"), loss_scale="2"),
                       turns(USER, ("assistant", "a"), loss_scale=float("nan")),
                       turns(USER, ("assistant", "a"), loss_scale=2, loss=False)],
    "bad_tools": [{**GOOD, "tools": "no JSON"}, {**GOOD, "tools": {"name": "f"}},
                  {**GOOD, "tools": [{"function": {}}]}],
    "bad_tool_call": [turns(USER, ("assistant", ""), tool_calls=[{**CALL, "arguments": "{"}]),
                      turns(USER, ("assistant", ""), tool_calls=[{**CALL, "arguments": [1]}]),
                      turns(USER, ("assistant", ""), tool_calls=[{"name": ""}]),
                      turns(USER, ("assistant", ""), tool_calls="f()"), turns(USER, ("tool_call", "f(3)"))],
    "bad_template_kwargs": [{**GOOD, "chat_template_kwargs": "thinking"}],
    "no_model_name": [turns(USER, ("assistant", "I am {{NAME}}."))],
    "column_twice": [{"question": "a", "query": "b", "response": "c"}],
    "unmapped_value": [{"query": "a", "response": "b", "tag": "fr"}],
}
# fmt: on
ADAPTER = "columns: {question: query}\nvalues: {tag: {chinese: zh, english: en}}\n"


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    lines = [json.dumps(GOOD).encode()]
    for rows in BROKEN.values():
        for row in rows:
            lines += [row if isinstance(row, bytes) else json.dumps(row).encode(), json.dumps(GOOD).encode()]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "adapter.yaml").write_text(ADAPTER)
    return DataConfig(dataset=(str(tmp_path / "rows.jsonl"),), adapter=str(tmp_path / "adapter.yaml"))


NUM_BROKEN = sum(map(len, BROKEN.values()))


def test_each_kind_is_counted_by_its_reason_and_none_is_lost(config: DataConfig) -> None:
    assert len(BROKEN) >= 25
    items = list(read(open_source(config.dataset[0], config), "sft"))
    assert len(items) == 2 * NUM_BROKEN + 1
    dropped = [item for item in items if isinstance(item, Dropped)]
    assert Counter(item.reason for item in dropped) == {reason: len(rows) for reason, rows in BROKEN.items()}
    # Every second line is broken.
    assert [item.place for item in dropped] == [f"{config.dataset[0]}:{2 * n}" for n in range(1, NUM_BROKEN + 1)]
    assert all(str(item.problem).startswith(item.place) and item.problem.subject for item in dropped)
    assert all(isinstance(item, Row) and item.messages[1].content == "Hello." for item in items[::2])


def test_the_budget_is_respected_to_the_row(config: DataConfig) -> None:
    # The row without a value is the run file's fault: it is in no budget.
    named = config.model_copy(update={"model_name": "bot", "max_dropped_rows": NUM_BROKEN - 1})
    assert len(load_rows(named, "sft")[0]) == NUM_BROKEN + 2
    for budget in (0, NUM_BROKEN - 2):
        with pytest.raises(DataError) as caught:
            load_rows(named.model_copy(update={"max_dropped_rows": budget}), "sft")
        assert caught.value.exit_status == 2
        told = f"at most {budget} rows left out (data.max_dropped_rows), found {NUM_BROKEN - 1}"
        assert (told in str(caught.value)) == (budget > 0)
    with pytest.raises(DataError, match=r"1 rows hold \{\{NAME\}\}"):
        load_rows(config.model_copy(update={"max_dropped_rows": NUM_BROKEN}), "sft")


def test_no_row_may_be_dropped_unless_the_run_says_so() -> None:
    assert DataConfig(dataset=()).max_dropped_rows == 0
