"""Reading and checking rows: every kind of broken row is found, all at once, and good rows come out as they are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema.data import DataConfig
from mcore.data.load import load_files, load_rows, read_file
from mcore.data.rows import MAX_LISTED, Message
from mcore.errors import DataError, Problem


def chat(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]}


def write(path: Path, *rows) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def message(role: str = "user", content: object = "hi", **more: object) -> dict:
    return {"role": role, "content": content, **more}


def data_problems(config: DataConfig, method: str) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as caught:
        load_rows(config, method)
    return caught.value.problems


ANSWER = message("assistant", "hello")

BROKEN_SFT = {
    "empty line": (b"", "an empty line"),
    "blank line": (b"  \t", "an empty line"),
    "no JSON": (b"hello", "Expecting value"),
    "cut short": (b'{"messages": [{"role": "user", "con', "Unterminated string"),
    "a byte order mark": (b'\xef\xbb\xbf{"messages": []}', "BOM"),
    "two objects": (b'{"messages": []} {"messages": []}', "Extra data"),
    "a list": ([1, 2], "found list"),
    "a number": (3, "found int"),
    "null": (None, "found NoneType"),
    "no UTF-8": (b'{"messages": "\xff"}', "byte 0xff"),
    "a key twice": (b'{"messages": [], "messages": []}', "the key 'messages' twice"),
    "nested too deeply": (b"[" * 100_000, "recursion"),
    "no messages": ({"prompt": "hi", "response": "hello"}, "only prompt, response"),
    "empty object": ({}, "no column"),
    "messages null": ({"messages": None}, "messages: expected a valid list, found None"),
    "messages text": ({"messages": "hi"}, "messages: expected a valid list, found 'hi'"),
    "messages empty": ({"messages": []}, "hold no turn"),
    "a message that is text": ({"messages": ["hi"]}, "messages[0]"),
    "no role": ({"messages": [{"content": "hi"}, ANSWER]}, "messages[0].role: expected this key"),
    "no content": ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content: expected this key"),
    "unknown role": ({"messages": [message("human"), ANSWER]}, "messages[0].role: expected 'system', 'user'"),
    "content null": ({"messages": [message("user", None), ANSWER]}, "messages[0].content"),
    "content a number": ({"messages": [message("user", 5), ANSWER]}, "messages[0].content: expected a valid string"),
    "content in blocks": ({"messages": [message("user", [{"type": "text"}]), ANSWER]}, "messages[0].content"),
    "content empty": ({"messages": [message(), message("assistant", "")]}, "messages[1].content: is empty"),
    "content blank": ({"messages": [message(), message("assistant", " \n")]}, "messages[1].content: is empty"),
    "half a character": (
        b'{"messages":[{"role":"user","content":"\\ud83d"},{"role":"assistant","content":"a"}]}',
        "half",
    ),
    "another key": ({"messages": [message(name="Ann"), ANSWER]}, "no key but role and content"),
    "nothing trained": ({"messages": [message(), message("assistant", "a", loss=False)]}, "turn that is trained"),
    "ends with the user": ({"messages": [message()]}, "the last message must be the assistant's"),
    "only a system message": ({"messages": [message("system", "Be brief.")]}, "hold no turn"),
    "begins with the assistant": ({"messages": [ANSWER]}, "messages[0] is from assistant where user must speak"),
    "two users": ({"messages": [message(), message(), ANSWER]}, "messages[1] is from user where assistant must speak"),
    "system in the middle": ({"messages": [message(), message("system", "x"), ANSWER]}, "messages[1] is from system"),
    "two systems": (
        {"messages": [message("system"), message("system"), message(), ANSWER]},
        "messages[1] is from system",
    ),
    "tools beside": ({**chat("hi", "hello"), "tools": [{"nam": "f"}]}, "tools[0]: expected a function"),
    "system beside": ({**chat("hi", "hello"), "system": "Be brief."}, "no column 'system' beside messages"),
}
BROKEN_PT = {
    "no text": ({"messages": []}, "text: expected this column, found only messages"),
    "text null": ({"text": None}, "text: expected a valid string, found None"),
    "text a number": ({"text": 1}, "text: expected a valid string, found 1"),
    "text empty": ({"text": ""}, "text: is empty"),
    "text blank": ({"text": "\n"}, "text: is empty"),
}


@pytest.mark.parametrize(("row", "found"), BROKEN_SFT.values(), ids=BROKEN_SFT)
def test_a_broken_sft_row_is_named_with_its_line(tmp_path, row, found):
    path = write(tmp_path / "rows.jsonl", chat("hi", "hello"), row, chat("bye", "so long"))
    rows, problems = read_file(path, "sft")
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:3"]
    assert problems and all(str(problem).startswith(f"{path}:2") for problem in problems)
    assert found in "\n".join(map(str, problems))


@pytest.mark.parametrize(("row", "found"), BROKEN_PT.values(), ids=BROKEN_PT)
def test_a_broken_pt_row_is_named_with_its_line(tmp_path, row, found):
    path = write(tmp_path / "rows.jsonl", {"text": "good"}, row)
    rows, problems = read_file(path, "pt")
    assert [row.text for row in rows] == ["good"]
    assert len(problems) == 1 and str(problems[0]).startswith(f"{path}:2") and found in str(problems[0])


def test_all_problems_of_all_files_come_at_once(tmp_path):
    one = write(tmp_path / "one.jsonl", *(row for row, _ in BROKEN_SFT.values()))
    two = write(tmp_path / "two.jsonl", chat("hi", ""))
    config = DataConfig(
        dataset=(str(one), str(two), "gone.jsonl", f"{two}#many"), val_dataset=("gone",), split_dataset_ratio=0.1
    )
    with pytest.raises(DataError) as caught:
        load_rows(config, "sft")
    text = str(caught.value)
    assert caught.value.exit_status == 2
    for line in range(1, len(BROKEN_SFT) + 1):
        assert f"{one}:{line}" in text
    assert f"{two}:1: messages[1].content: is empty" in text
    assert "gone.jsonl: expected a jsonl file, found No such file or directory" in text
    assert "data.dataset[3]" in text and "'many' after #" in text
    assert "gone: expected a file (jsonl, txt, json, csv, parquet" in text
    assert "val_dataset or split_dataset_ratio" in text


def test_a_long_list_is_cut_and_counted(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[b"x"] * 130)
    problems = data_problems(DataConfig(dataset=(str(path),)), "sft")
    assert len(problems) == MAX_LISTED + 1
    assert str(problems[MAX_LISTED - 1]).startswith(f"{path}:{MAX_LISTED}:")
    assert str(problems[-1]) == "and 80 more problems"


def test_an_empty_file_and_no_file(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert "an empty file" in str(data_problems(DataConfig(dataset=(str(path),)), "sft")[0])
    assert "data.dataset" in str(data_problems(DataConfig(dataset=()), "sft")[0])


def test_good_rows_come_out_as_they_are(tmp_path):
    odd = 'tab\t, line\nend,   wide space, \u2028 separator, 漢字, 🤖 and  "quotes"'
    system = {"messages": [message("system", "Be brief."), message("user", odd), message("assistant", f" {odd} ")]}
    extra = {**chat("a", "b", "c", "d"), "id": 7, "source": "us", "tools": None, "system": ""}
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(system, ensure_ascii=False), json.dumps(extra)]
    path.write_text("\r\n".join(lines), newline="")  # Windows line ends, and none behind the last row
    rows, problems = read_file(path, "sft")
    assert not problems
    assert rows[0].messages == (
        Message("system", "Be brief."),
        Message("user", odd),
        Message("assistant", f" {odd} "),
    )
    assert [turn.content for turn in rows[1].messages] == ["a", "b", "c", "d"]


def test_placeholders_are_filled(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", chat("Are you {{NAME}}?", "I am {{ NAME }} by {{AUTHOR}}, not {{name}} {NAME}.")
    )
    config = DataConfig(dataset=(str(path),), model_name="bot", model_author="us", system="You are {{NAME}}.")
    rows, _ = load_rows(config, "sft")
    assert [turn.content for turn in rows[0].messages] == [
        "You are bot.",
        "Are you bot?",
        "I am bot by us, not {{name}} {NAME}.",
    ]


def test_a_value_that_looks_like_a_placeholder_is_left_alone(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": r"{{NAME}} {{AUTHOR}}"})
    rows, _ = load_rows(DataConfig(dataset=(str(path),), model_name="{{AUTHOR}}", model_author=r"\1"), "pt")
    assert rows[0].text == r"{{AUTHOR}} \1"


def test_a_placeholder_without_a_value_is_a_problem(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        chat("hi", "hello"),
        chat("who?", "{{NAME}}"),
        chat("a?", "{{NAME}}"),
        chat("b?", "{{AUTHOR}}"),
    )
    problems = data_problems(DataConfig(dataset=(str(path),)), "sft")
    assert [str(problem) for problem in problems] == [
        f"{path}: 1 rows hold {{{{AUTHOR}}}} (first: line 4): expected data.model_author to be set, found nothing",
        f"{path}: 2 rows hold {{{{NAME}}}} (first: line 2): expected data.model_name to be set, found nothing",
    ]
    config = DataConfig(dataset=(str(path), str(path)), system="You are {{ AUTHOR }}.", model_name="bot")
    assert [str(problem) for problem in data_problems(config, "sft")] == [
        "data.system holds {{AUTHOR}}: expected data.model_author to be set"
    ]


def test_a_system_message_of_the_row_stands(tmp_path):
    own = {"messages": [message("system", "Mine."), message(), ANSWER]}
    path = write(tmp_path / "rows.jsonl", own, chat("hi", "hello"))
    rows, _ = load_rows(DataConfig(dataset=(str(path),), system="Ours."), "sft")
    assert [row.messages[0].content for row in rows] == ["Mine.", "Ours."]


def test_counts_of_a_file_are_kept(tmp_path):
    path = write(tmp_path / "rows.jsonl", *(chat(f"question {n}", "answer") for n in range(10)))
    config = DataConfig(dataset=(f"{path}#3", f"{path}#25", str(path)))
    rows, validation = load_rows(config, "sft")
    assert len(rows) == 3 + 25 + 10 and not validation
    assert len(set(rows[:3])) == 3
    assert rows[3:13] == rows[13:23] == rows[28:] and len(set(rows[23:28])) == 5
    assert load_rows(config, "sft") == (rows, validation)
    assert load_rows(config.model_copy(update={"data_seed": 7}), "sft")[0] != rows
    unshuffled = load_rows(config.model_copy(update={"dataset_shuffle": False}), "sft")[0]
    assert unshuffled == rows[28:31] + rows[28:] * 2 + rows[28:33] + rows[28:]


def test_each_entry_has_a_draw_of_its_own(tmp_path):
    path = write(tmp_path / "rows.jsonl", *(chat(f"question {n}", "answer") for n in range(100)))
    train, validation = load_rows(DataConfig(dataset=(f"{path}#5", f"{path}#5"), val_dataset=(f"{path}#5",)), "sft")
    assert len({tuple(train[:5]), tuple(train[5:]), tuple(validation)}) == 3


def test_rows_are_set_aside_for_validation(tmp_path):
    path = write(tmp_path / "rows.jsonl", *(chat(f"question {n}", "answer") for n in range(20)))
    train, validation = load_rows(DataConfig(dataset=(f"{path}#50",), split_dataset_ratio=0.1), "sft")
    assert len(validation) == 2 and not set(train) & set(validation)
    assert len(set(train) | set(validation)) == 20


def test_a_split_that_leaves_nothing_to_train_is_a_problem(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[chat("the only question", "answer")] * 3)
    problems = data_problems(DataConfig(dataset=(str(path),), split_dataset_ratio=0.2), "sft")
    assert [str(problem) for problem in problems] == [
        "data.split_dataset_ratio: expected rows on both sides, found 0 and 1"
    ]


def test_other_files_of_a_run(tmp_path):
    path = write(tmp_path / "rows.jsonl", chat("hi", "{{NAME}}"))
    config = DataConfig(dataset=("not read",), model_name="bot")
    assert load_files([str(path)], config, "sft", "evaluate.perplexity_dataset")[0].messages[1].content == "bot"
    with pytest.raises(DataError, match=r"evaluate\.perplexity_dataset\[0\]"):
        load_files(["rows#0"], config, "sft", "evaluate.perplexity_dataset")


def test_reading_rows_needs_neither_torch_nor_transformers():
    code = (
        "import sys, mcore.data.load; print(sorted({'torch', 'transformers', 'numpy', 'megatron'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
