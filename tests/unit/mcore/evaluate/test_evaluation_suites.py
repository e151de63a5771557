import re

import pytest

from configs.schema.suite import Case
from mcore.errors import ConfigError
from mcore.evaluate.engine import Answer
from mcore.evaluate.statistics import wilson
from mcore.evaluate.suites import Question, expectation, pass_rates, read_questions, score

SUITE = """
name: small
system: You are {{NAME}}.
groups:
  - name: identity
    cases:
      - {prompt: "Who are you?", contains: ["{{NAME}}", "{{AUTHOR}}"], not_contains: ["SmolLM"]}
      - messages:
          - {role: system, content: "Be short."}
          - {role: user, content: "Hi"}
          - {role: assistant, content: "Hi."}
          - {role: user, content: "Your name?"}
        regex: "^{{NAME}}[.!]?$"
  - name: general
    cases:
      - {prompt: "2 + 2?", equals: "4"}
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE)
    return path


def ask(suite, **options):
    return read_questions(suite, **({"model_name": "r2.d2", "model_author": "Ann"} | options))


def test_questions_in_order_with_placeholders_filled(suite):
    filled, questions = ask(suite)
    assert filled.name == "small"
    assert [question.name for question in questions] == ["identity 1", "identity 2", "general 1"]
    assert questions[0].messages == [
        {"role": "system", "content": "You are r2.d2."},
        {"role": "user", "content": "Who are you?"},
    ]
    assert questions[0].case.contains == ("r2.d2", "Ann")
    assert questions[1].prompt == "Your name?"
    assert questions[1].messages[0] == {"role": "system", "content": "Be short."}  # its own stands
    assert questions[1].case.failures("r2.d2!") == []
    assert questions[1].case.failures("r2xd2!")  # the name is no pattern


def test_system_of_the_run_stands_where_the_suite_has_none(suite):
    suite.write_text(SUITE.replace("system: You are {{NAME}}.\n", ""))
    assert [turn["role"] for turn in ask(suite)[1][0].messages] == ["user"]
    _, questions = ask(suite, system="I am {{AUTHOR}}'s.")
    assert questions[0].messages[0] == {"role": "system", "content": "I am Ann's."}
    assert questions[1].messages[0] == {"role": "system", "content": "Be short."}


def test_all_missing_values_are_named(suite):
    with pytest.raises(ConfigError) as caught:
        read_questions(suite)
    assert [problem.expected for problem in caught.value.problems] == [
        "--model-author to be given",
        "--model-name to be given",
    ]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("equals:", "equal:", "equal"),
        ('equals: "4"', 'regex: "("', "no regular expression"),
        ("name: general", "name: identity", "given twice"),
        (SUITE, "name: [", "suite.yaml"),
    ],
)
def test_a_wrong_suite_is_a_wrong_input(suite, old, new, named):
    suite.write_text(SUITE.replace(old, new))
    with pytest.raises(ConfigError, match=re.escape(named)) as caught:
        ask(suite)
    assert caught.value.exit_status == 2


def test_a_missing_suite_is_a_wrong_input(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        ask(tmp_path / "absent.yaml")


def test_scores(suite):
    _, questions = ask(suite)
    texts = ["I am r2.d2, made by SmolLM.", " r2.d2 ", "5"]
    records = score(questions, [Answer(text, [7, 8], [1, 2, 3], "stop") for text in texts])
    assert [record["passed"] for record in records] == [False, False, False]
    assert records[0]["failures"] == ["lacks 'Ann'", "has 'SmolLM'"]
    assert records[0]["expectation"] == "contains 'r2.d2' and 'Ann', does not contain 'SmolLM'"
    assert (records[0]["num_prompt_tokens"], records[0]["num_tokens"], records[0]["token_ids"]) == (3, 2, [7, 8])
    assert [(record["group"], record["case"], record["prompt"]) for record in records] == [
        ("identity", 1, "Who are you?"),
        ("identity", 2, "Your name?"),
        ("general", 1, "2 + 2?"),
    ]

    texts = ["R2.D2 by ann", "r2.d2.", " 4\n"]
    records = score(questions, [Answer(text, [7], [1], "length") for text in texts])
    assert all(record["passed"] for record in records)


def test_pass_rates():
    records = [{"group": group, "passed": passed} for group, passed in [("b", True), ("a", False), ("b", False)]]
    assert pass_rates(records) == {
        "b": {"num_cases": 2, "num_passed": 1, "pass_rate": 0.5, "interval": wilson(1, 2)},
        "a": {"num_cases": 1, "num_passed": 0, "pass_rate": 0.0, "interval": wilson(0, 1)},
    }


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"equals": "4"}, "equals '4'"),
        ({"contains": ("a", "b")}, "contains 'a' and 'b'"),
        ({"regex": "a+"}, "matches 'a+'"),
        ({"not_contains": ("a",)}, "does not contain 'a'"),
        ({"not_contains": ("a", "b")}, "contains neither 'a' nor 'b'"),
    ],
)
def test_expectation_in_words(case, words):
    assert expectation(Case(prompt="?", **case)) == words


def test_a_question_keeps_its_last_turn_as_prompt():
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    question = Question("g", 1, Case(prompt="three", equals="3"), [*messages, {"role": "user", "content": "three"}])
    assert question.prompt == "three"
