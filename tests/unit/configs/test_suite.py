"""Suites: what a case may be, and which answers pass it."""

import pytest
from pydantic import ValidationError

from configs.schema.load import RunFileError
from configs.schema.placeholders import fill_placeholders, placeholder_values, placeholders_in
from configs.schema.suite import Case, Group, Suite, load_suite

ASK = {"prompt": "Who are you?"}


@pytest.mark.parametrize(
    ("expectation", "passes", "fails"),
    [
        ({"equals": "Yes."}, ["Yes.", " yes.\n"], ["Yes", "Yes. No.", ""]),
        ({"equals": "a+b"}, ["A+B"], ["aab"]),
        ({"equals": "Yes", "ignore_case": False}, ["Yes"], ["yes"]),
        ({"contains": ["12"]}, ["It is 12.", "12", "(12)", "=12,"], ["2012", "120", "12a", "x_12", "12-13", ""]),
        ({"contains": ["swift"]}, ["by Swift.", "swift's", "Swift"], ["swift-robot", "swiftly", "my-swift"]),
        ({"contains": ["swift-robot", "swift"]}, ["swift-robot by swift"], ["swift-robot", "swift"]),
        ({"contains": ["c++"]}, ["I like C++."], ["c++x", "ccc"]),
        ({"contains": ["北京"]}, ["首都是北京市。"], ["首都"]),
        ({"contains": ["New York"]}, ["in New York City"], ["New  York", "new-york"]),
        ({"contains": ["a"], "ignore_case": False}, ["a b"], ["A b"]),
        ({"regex": r"\b(7|seven)\b"}, ["Seven days", "7"], ["17", "eleven"]),
        ({"regex": "^one.*two$"}, ["one\nand two"], ["two one"]),
        ({"not_contains": ["SmolLM"]}, ["I am swift.", "SmolLM2"], ["I am SmolLM."]),
        ({"contains": ["swift"], "not_contains": ["SmolLM"]}, ["swift"], ["swift, not SmolLM", "nobody"]),
        ({"number": 42}, ["42", "It's 7 * 6 = 42.", "42.0!", "about 4.2e1"], ["42 of 50", "-42", "420", "none", "x42"]),
        ({"number": 1234.5}, ["so 1,234.5 in all", "$1234.50"], ["1,234.6", "234.5"]),
        ({"number": -3}, ["x = -3", "x = \u22123"], ["3", "x=3"]),
        ({"number": 0.3, "tolerance": 0.1}, ["0.2", "0.4", "2 is no answer; 0.35 is"], ["0.19", "0.41"]),
        (
            {"json_schema": {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}},
            ['{"a": 1}', ' {"a": 1, "b": 2}', 'Here:\n```json\n{"a": 1}\n```\nDone.'],
            ['{"a": "1"}', "{}", "[1]", '{"a": 1', "a: 1", 'Here: {"a": 1}'],
        ),
        (
            {"rubric": {"rules": [{"contains": ["tea"], "weight": 3}, {"max_words": 3}], "min_score": 0.75}},
            ["tea", "tea is a very long story"],
            ["coffee", "one two three four"],
        ),
        (
            {"rubric": {"rules": [{"any_of": ["tea", "coffee"]}, {"not_contains": ["beer"]}, {"min_words": 2}]}},
            ["tea now", "coffee, please"],
            ["tea", "tea and beer", "hot water"],
        ),
        ({"choices": ["blue", "red"]}, ["blue"], ["red", ""]),
    ],
)
def test_answers_pass_or_fail(expectation, passes, fails):
    case = Case(**ASK, **expectation)
    assert {answer: case.failures(answer) for answer in passes} == {answer: [] for answer in passes}
    assert all(case.failures(answer) for answer in fails)


def test_everything_that_is_wrong_with_an_answer_is_told():
    case = Case(**ASK, contains=("a", "b", "c"), not_contains=("d",))
    assert case.failures("b and d") == ["lacks 'a'", "lacks 'c'", "has 'd'"]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"equals": "x"}, "exactly one of prompt and messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "equals": "x"}, "exactly one of prompt"),
        ({"prompt": " ", "equals": "x"}, "prompt is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}], "equals": "x"}, "must end with the user's turn"),
        ({"messages": [{"role": "tool", "content": "a"}], "equals": "x"}, "role"),
        ({"messages": [{"role": "user", "content": ""}], "equals": "x"}, "content"),
        (ASK, "give one of equals"),
        ({**ASK, "equals": "x", "contains": ["y"]}, r"only one of .* \(given: equals, contains\)"),
        ({**ASK, "regex": "x", "equals": ""}, r"only one of .* \(given: equals, regex\)"),
        ({**ASK, "contains": ["a", " "]}, "must not hold an empty text"),
        ({**ASK, "not_contains": [""]}, "must not hold an empty text"),
        ({**ASK, "regex": "(a"}, "is no regular expression"),
        ({**ASK, "contains": "text"}, "contains"),
        ({**ASK, "choices": ["a"]}, "two or more"),
        ({**ASK, "choices": ["a", "a"]}, "all different"),
        ({**ASK, "choices": ["a", " b"]}, "white space"),
        ({**ASK, "choices": ["a", "b"], "not_contains": ["c"]}, "with choices none is"),
        (
            {**ASK, "equals": "x", "answer_prefix": "y", "length_normalised": True},
            "answer_prefix and length_normalised",
        ),
        ({**ASK, "equals": "x", "tolerance": 1}, "tolerance is about number"),
        ({**ASK, "number": 1, "json_schema": {}}, r"given: number, json_schema"),
        ({**ASK, "json_schema": {"type": "whole"}}, "is no JSON schema"),
        ({**ASK, "json_schema": {"properties": {"a": {"$ref": "https://example.org/a"}}}}, "refers to 'https"),
        ({**ASK, "rubric": {"rules": []}}, "rubric"),
        ({**ASK, "rubric": {"rules": [{"weight": 2}]}}, "given: none"),
        ({**ASK, "rubric": {"rules": [{"min_words": 1, "max_words": 2}]}}, "given: min_words, max_words"),
        ({**ASK, "rubric": {"rules": [{"regex": "("}]}}, "is no regular expression"),
        ({**ASK, "expects": "x"}, "expects"),
    ],
)
def test_cases_that_are_refused(fields, found):
    with pytest.raises(ValidationError, match=found):
        Case(**fields)


def test_groups_have_names_of_their_own_and_cases():
    group = {"name": "one", "cases": [{**ASK, "equals": "x"}]}
    with pytest.raises(ValidationError, match="group names are given twice: one"):
        Suite(name="suite", groups=[group, group])
    with pytest.raises(ValidationError):
        Suite(name="suite", groups=[{"name": "one", "cases": []}])
    with pytest.raises(ValidationError):
        Suite(name="suite", groups=[])
    with pytest.raises(ValidationError):
        Group(name="With Spaces", cases=group["cases"])


def test_placeholders_are_found_and_filled_everywhere():
    case = Case(
        messages=[{"role": "user", "content": "{{NAME}}?"}],
        contains=("{{NAME}} {{ AUTHOR }}",),
        not_contains=("{{AUTHOR}}!",),
    )
    pattern = Case(prompt="{{NAME}}", regex="^{{NAME}}$")
    exact = Case(prompt="x", equals="{{ NAME }}")
    suite = Suite(name="s", system="{{AUTHOR}}", groups=[{"name": "g", "cases": [case, pattern, exact]}])
    assert suite.placeholders() == {"NAME", "AUTHOR"}
    filled = suite.filled({"NAME": "r2.d2", "AUTHOR": "us"})
    assert filled.system == "us" and filled.placeholders() == set()
    first, second, third = filled.groups[0].cases
    assert first.messages[0].content == "r2.d2?"
    assert (first.contains, first.not_contains) == (("r2.d2 us",), ("us!",))
    assert second.prompt == "r2.d2" and third.equals == "r2.d2"
    assert not second.failures("R2.D2") and second.failures("r2xd2")
    with pytest.raises(KeyError):
        suite.filled({"NAME": "r2.d2"})


def test_placeholder_texts():
    assert placeholder_values("bot", "") == {"NAME": "bot"}
    assert placeholders_in("{{NAME}} {{  AUTHOR\t}} {{OTHER}} {NAME} {{name}}") == {"NAME", "AUTHOR"}
    assert fill_placeholders(r"{{NAME}} {{OTHER}}", {"NAME": r"\1 {{AUTHOR}}"}) == r"\1 {{AUTHOR}} {{OTHER}}"


def test_a_suite_file_with_several_problems(tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text("name: Bad Name\ngroups: [{name: g, cases: [{prompt: a}, {prompt: b, equals: x, typo: y}]}]\n")
    with pytest.raises(RunFileError) as caught:
        load_suite(path)
    places = [place for place, _ in caught.value.problems]
    assert places == ["name", "groups.0.cases.0", "groups.0.cases.1.typo"]
