"""An exported model's template says without being told what the run trained with."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mcore.data.chat.served import Served, prelude, write_served_template
from mcore.errors import SourceError
from tests.unit.mcore.data.tokenizers_for_tests import TEMPLATES, small_tokenizer

QUESTION = [{"role": "user", "content": "Hi"}]
SYSTEMS = ["Be brief.", "", "She said: \"{{ x }}\" \\ '%}' {% endif %}\n\ttab\r\n漢字 🤖 \u2028 \\n {# #}", "-}}"]


def rendered(template: str, messages: list[dict[str, str]], kind: str = "chatml", **options: object) -> str:
    tokenizer = small_tokenizer(kind)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
    )


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("kind", ["chatml", "headers", "thinking"])
def test_a_conversation_without_a_system_message_gets_the_runs(kind: str, system: str) -> None:
    template = prelude(system, None) + TEMPLATES[kind]
    given_it = [{"role": "system", "content": system}, *QUESTION]
    assert rendered(template, QUESTION, kind) == rendered(TEMPLATES[kind], given_it, kind)
    own = [{"role": "system", "content": "Mine."}, *QUESTION]
    assert rendered(template, own, kind) == rendered(TEMPLATES[kind], own, kind)


@settings(max_examples=200, deadline=None)
@given(st.text(st.one_of(st.sampled_from("\"'\\{}%#-\n\r\t u0041"), st.characters(exclude_categories=["Cs"]))))
def test_any_system_message_arrives_as_it_is(system: str) -> None:
    template = prelude(system, None) + "{{ messages[0].content }}|{{ messages | length }}"
    assert rendered(template, QUESTION) == f"{system}|2"


@pytest.mark.parametrize(
    "start", ["\n", "  {% if true %}x{% endif %}\n y", " \n\n{{ 1 }}", "{#- a -#}\n\n b", "\t{%- if 1 %} z{% endif %}"]
)
def test_a_template_begins_as_it_did(start: str) -> None:
    assert rendered(prelude("s", True) + start, QUESTION) == rendered(start, QUESTION)


def test_a_switch_has_the_runs_value_where_a_request_has_none() -> None:
    template = prelude(None, False) + "{{ enable_thinking }}"
    assert rendered(template, QUESTION) == "False"
    assert rendered(template, QUESTION, enable_thinking=True) == "True"
    assert rendered(prelude(None, True) + "{{ enable_thinking }}", QUESTION) == "True"


def folder_of(path: Path, template: object) -> Path:
    tokenizer = copy.deepcopy(small_tokenizer("chatml"))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def loaded(folder: Path, **options: object) -> str:
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return tokenizer.apply_chat_template(QUESTION, tokenize=False, **options)


WITH_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_wherever_the_template_is(tmp_path: Path) -> None:
    as_file = folder_of(tmp_path / "file", TEMPLATES["chatml"])
    assert write_served_template(as_file, Served(system="Be brief.")) == ["chat_template.jinja"]
    in_config = folder_of(tmp_path / "config", None)
    path = in_config / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATES["chatml"]}))
    assert write_served_template(in_config, Served(system="Be brief.")) == ["tokenizer_config.json"]
    several = folder_of(tmp_path / "several", {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["chatml"]})
    assert len(write_served_template(several, Served(system="Be brief."))) == 2
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    assert loaded(as_file) == loaded(in_config) == loaded(several) == loaded(several, tools=tools) == WITH_SYSTEM


def test_a_template_of_the_run_takes_the_place_of_all(tmp_path: Path) -> None:
    for name, template in (("one", "old"), ("several", {"default": "old", "tool_use": "old too"})):
        folder = folder_of(tmp_path / name, template)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "old as well"}))
        write_served_template(folder, Served("Be brief.", None, TEMPLATES["chatml"]))
        assert loaded(folder) == WITH_SYSTEM
        assert "chat_template" not in json.loads(path.read_text())
        assert not (folder / "additional_chat_templates").exists()


def test_nothing_asked_changes_nothing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", TEMPLATES["chatml"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert write_served_template(folder, Served()) == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_without_a_template_can_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="can't be written into the model"):
        write_served_template(folder_of(tmp_path, None), Served(system="Be brief."))
