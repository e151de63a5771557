"""The data and suites that we ship: well formed, in the promised amounts, and held-out where they say so."""

from pathlib import Path

import pytest

from configs.schema.data import DataConfig
from configs.schema.placeholders import placeholder_values
from configs.schema.suite import load_suite
from mcore.data.load import load_rows, read_file
from mcore.data.rows import Row

CONFIGS = Path(__file__).parents[4] / "configs"
FILES = sorted(CONFIGS.rglob("data/**/*.jsonl"))
DEMO = CONFIGS / "data"


def questions(rows: list[Row]) -> list[str]:
    return [row.messages[-2].content.casefold() for row in rows]


def rows_of(name: str) -> list[Row]:
    rows, problems = read_file(DEMO / f"{name}.jsonl", "sft")
    assert not problems
    return rows


def test_there_is_data():
    assert len(FILES) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_well_formed(path):
    config = DataConfig(dataset=(str(path),), model_name="bot", model_author="us")
    rows, _ = load_rows(config, "sft")
    assert rows and not any("{{" in message.content for row in rows for message in row.messages)


@pytest.mark.parametrize("name", ["self_cognition", "general_qa"])
def test_there_are_a_hundred_different_rows_to_train(name):
    rows = rows_of(name)
    assert len(set(rows)) == len(rows) >= 100
    single = [row for row in rows if len(row.messages) == 2]
    assert len(set(questions(single))) == len(single) >= 100


@pytest.mark.parametrize("name", ["self_cognition", "self_cognition_val"])
def test_every_identity_row_names_model_and_author(name):
    for row in rows_of(name):
        assert {"NAME", "AUTHOR"} <= row.placeholders(), row.place


def test_held_out_rows_are_not_trained():
    trained = {*questions(rows_of("self_cognition")), *questions(rows_of("general_qa"))}
    held_out = [*questions(rows_of("self_cognition_val")), *questions(rows_of("general_val"))]
    assert len(set(held_out)) == len(held_out) >= 20
    assert not trained & set(held_out)


def test_no_prompt_of_the_suite_is_trained():
    trained = {*questions(rows_of("self_cognition")), *questions(rows_of("general_qa"))}
    suite = load_suite(CONFIGS / "suites" / "demo.yaml")
    prompts = {
        (case.prompt or case.messages[-1].content).casefold(): group.name
        for group in suite.groups
        for case in group.cases
    }
    assert len(prompts) == sum(len(group.cases) for group in suite.groups) >= 20
    assert not trained & set(prompts)


def test_the_identity_cases_tell_name_and_author_apart():
    # The author's name is part of the model's name: naming only the model must not pass.
    suite = load_suite(CONFIGS / "suites" / "demo.yaml").filled(placeholder_values("swift-robot", "swift"))
    identity = next(group for group in suite.groups if group.name == "identity")
    for case in identity.cases:
        assert not case.failures("I am swift-robot, an AI assistant made by swift.")
        assert case.failures("I am swift-robot, an AI assistant.")
        assert case.failures("I was made by swift.")
        assert case.failures("I am SmolLM, trained by Hugging Face.")
