"""Commands as scripts hold them."""

import pytest

from flows.from_swift.shell import read_commands


def words(text: str) -> list[str]:
    commands, problems = read_commands(text)
    assert problems == []
    (command,) = commands
    return list(command.words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("megatron sft --lr 1e-5", ["megatron", "sft", "--lr", "1e-5"]),
        ("a b#500 'c d' \"e'f\" g\\ h", ["a", "b#500", "c d", "e'f", "g h"]),
        ("a \\\n   b \\\r\n\tc", ["a", "b", "c"]),
        ("# first\na b # last\n\n", ["a", "b"]),
        ("a 2 >log 2>&1", ["a", "2"]),
        ("a b &>> log.txt", ["a", "b"]),
        ('a \'E|(t|)*2,m|L\' \'{"k": [1, 2]}\' "say \\"x\\""', ["a", "E|(t|)*2,m|L", '{"k": [1, 2]}', 'say "x"']),
        ("N=3; M=\"$N/x\"\na $N ${M} '$N' ${O:-4}", ["a", "3", "3/x", "$N", "4"]),
        ("a --b=c\"d e\"'f'", ["a", "--b=cd ef"]),
        ("a ''", ["a", ""]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_variables_in_front_and_exported() -> None:
    commands, problems = read_commands("export A=1 B='x y'\nC=3\nD=4 E=$C first 5\nsecond; third | fourth && fifth &")
    assert problems == []
    assert [list(command.words) for command in commands] == [
        ["first", "5"],
        ["second"],
        ["third"],
        ["fourth"],
        ["fifth"],
    ]
    assert dict(commands[0].environment) == {"A": "1", "B": "x y", "D": "4", "E": "3"}
    assert dict(commands[1].environment) == {"A": "1", "B": "x y"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a $MODEL", "$MODEL: has no value"),
        ("a ${MODEL}/x", "$MODEL: has no value"),
        ("a $(date +%s)", "what a command prints"),
        ("a `date`", "a command in backticks"),
        ("a 'b c", "a quote that does not end"),
        ('a "b c', "a quote that does not end"),
    ],
)
def test_what_would_have_to_be_executed_is_a_problem(text: str, problem: str) -> None:
    _, problems = read_commands(text)
    assert len(problems) == 1 and problem in problems[0]
