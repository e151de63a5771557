"""Six models' own templates: ids and masks are those of an independent computation, prompts those that vLLM makes.

What a template can't show is refused; `REFUSED` says which conversations these are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mcore.data.chat.options import TemplateOptions, stop_tokens
from mcore.data.chat.served import Served, write_served_template
from mcore.data.rows import Message, Row
from mcore.data.template import Sample, encode_rows, load_tokenizer
from mcore.errors import Problem
from tests.templates.conversations import rows
from tests.templates.fetch import NAMES, fetch
from tests.templates.reference import DATE, NO_THOUGHT, Answer, Reference
from tests.vllm.vllm_child import run_with_vllm

pytestmark = pytest.mark.templates

ROWS = rows()
NO_TOOLS_NO_THOUGHTS = {
    name
    for name, row in ROWS.items()
    if row.tools or any(message.reasoning_content is not None for message in row.messages)
}
"""What templates that know neither can't show, and what comes of it."""

REFUSED = {
    "smollm2": NO_TOOLS_NO_THOUGHTS,
    "llama3": NO_TOOLS_NO_THOUGHTS,
    "deepseek_v3": NO_TOOLS_NO_THOUGHTS,  # it wants arguments as text, which vLLM does not give it
    "gemma3": NO_TOOLS_NO_THOUGHTS,
    # A prompt that says not to think, and an answer with a thought.
    "qwen3": {
        f"{name}, enable_thinking false"
        for name in (
            "a thought",
            "a thought as text",
            "a thought in the last turn",
            "a thought with a system message",
            "thoughts in both turns",
            "a call with a thought",
        )
    },
    # It shows one call a message; and a call's thought or words as long as no last answer is there, so that the prompt
    # of that answer begins no text.
    "gptoss": {"two calls at once", "a call with words"}
    | {f"a call with a thought{switch}" for switch in ("", ", enable_thinking true", ", enable_thinking false")},
}


@dataclass(frozen=True)
class Known:
    """One tokenizer, the other computation of it, and what became of every row: samples, or a problem."""

    name: str
    folder: Path
    reference: Reference
    samples: dict[str, list[Sample]]
    problems: dict[str, Problem]


def encode(folder: Path, some: Sequence[Row], **options: Any) -> tuple[dict[str, list[Sample]], dict[str, Problem]]:
    samples, problems = encode_rows(
        some,
        load_tokenizer(folder),
        "sft",
        options=TemplateOptions(**{"stop_tokens": frozenset(stop_tokens(folder)), "multi_turn": "split"} | options),
    )
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.place, []).append(sample)
    places = sorted((row.place for row in some), key=len, reverse=True)
    return found, {next(p for p in places if one.subject.startswith(p)): one for one in problems}


@pytest.fixture(scope="module", params=NAMES)
def known(request: pytest.FixtureRequest) -> Known:
    folder = fetch(request.param)
    return Known(request.param, folder, Reference(request.param, folder), *encode(folder, list(ROWS.values())))


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As a template is given them: thoughts under every name that there is."""
    found = []
    for message in messages:
        said: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            said["tool_calls"] = list(message.tool_calls)
        if message.reasoning_content is not None:
            said |= dict.fromkeys(("reasoning_content", "thinking"), message.reasoning_content)
        found.append(said)
    return found


def expected(known: Known, row: Row) -> list[tuple[list[int], list[float]]]:
    """Samples of a row: one if its answers are the same when nothing follows them, or else one an answer."""
    reference = known.reference
    without = row.chat_template_kwargs.get("enable_thinking") is False and known.name == "qwen3"

    def shown(messages: Sequence[Message]) -> tuple[str, list[Answer]]:
        text = reference.render(plain(messages), row.tools, **row.chat_template_kwargs)
        return text, reference.answers(text, without_thinking=without)

    turns = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    text, answers = shown(row.messages)
    parts = [shown(row.messages[: index + 1]) for index in turns]
    assert len(answers) == len(turns)
    assert not without or all(of_part[-1].said.startswith(NO_THOUGHT) for _, of_part in parts)
    if [one.said for one in answers] == [of_part[-1].said for _, of_part in parts]:
        return [reference.encode(text, answers)]
    return [reference.encode(of_part, found[-1:]) for of_part, found in parts]


def test_there_are_conversations_enough(known: Known) -> None:
    assert len(ROWS) >= 50
    assert known.samples.keys().isdisjoint(known.problems) and known.samples.keys() | known.problems.keys() == set(ROWS)
    assert len(known.samples) >= 30
    assert set(known.problems) == REFUSED[known.name]


def test_ids_and_masks_are_those_of_the_other_computation(known: Known) -> None:
    for name, samples in known.samples.items():
        found = [(list(sample.token_ids), list(sample.loss_mask)) for sample in samples]
        assert found == expected(known, ROWS[name]), name


def as_requests_have_them(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As a client sends them to an OpenAI server."""
    found = []
    for message in messages:
        said: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            said["content"] = message.content or None
            said["tool_calls"] = [
                {
                    "id": f"call-{number}",
                    "type": "function",
                    "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])},
                }
                for number, call in enumerate(message.tool_calls)
            ]
        if message.reasoning_content is not None:
            said["reasoning"] = message.reasoning_content
        if message.role == "tool":
            said["tool_call_id"] = "call-0"
        found.append(said)
    return found


def prompts(row: Row, samples: Sequence[Sample]) -> list[tuple[list[Message], list[int]]]:
    """The messages before each trained answer, and the tokens that stand before it in a sample."""
    turns = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    found = []
    for number, sample in enumerate(samples):
        mask = list(sample.loss_mask)
        starts = [place for place in range(1, len(mask)) if mask[place] and not mask[place - 1]]
        of_sample = turns if len(samples) == 1 else [turns[number]]
        assert len(starts) == len(of_sample)
        found += [
            (list(row.messages[:turn]), list(sample.token_ids[:start]))
            for turn, start in zip(of_sample, starts, strict=True)
        ]
    return found


RUN_SYSTEM = Message("system", 'You are "Lumen" — {{ 漢字 }} \\ %}\nAnswer briefly. 🤖')


def exported(name: str, folder: Path) -> Path:
    """The tokenizer's files as an export of a run with a system message has them."""
    folder.mkdir()
    for path in fetch(name).iterdir():
        if path.name == "tokenizer.json":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, folder / path.name)
    assert write_served_template(folder, Served(RUN_SYSTEM.content, False if name == "qwen3" else None))
    return folder


def trained_with_system(name: str) -> dict[str, tuple[Row, list[Sample]]]:
    """Each row's samples in a run with a system message: those that bring one keep it."""
    given = {
        place: row if row.messages[0].role == "system" else replace(row, messages=(RUN_SYSTEM, *row.messages))
        for place, row in ROWS.items()
    }
    switch = {"enable_thinking": False} if name == "qwen3" else {}
    samples, _ = encode(fetch(name), list(given.values()), **switch)
    return {place: (given[place], of_row) for place, of_row in samples.items()}


def test_an_exported_template_makes_trainings_prompts_untold(known: Known, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(exported(known.name, tmp_path / "model"))
    trained = trained_with_system(known.name)
    assert len(trained) >= 30
    for name, (row, samples) in trained.items():
        for messages, ids in prompts(row, samples):
            asked = [message for message in messages if message is not RUN_SYSTEM]
            found = tokenizer.apply_chat_template(
                plain(asked),
                tools=list(row.tools) or None,
                add_generation_prompt=True,
                return_dict=False,
                strftime_now=DATE.strftime,
                **row.chat_template_kwargs,
            )
            assert found == ids, name


def test_what_stands_before_every_answer_is_the_prompt_that_vllm_makes(tmp_path: Path) -> None:
    """With the template as it is, and with that of an exported model, which is not told the run's system message."""
    cases: list[dict[str, Any]] = []
    wanted: list[tuple[str, str, list[int]]] = []
    for tokenizer in NAMES:
        samples, _ = encode(fetch(tokenizer), list(ROWS.values()))
        plain_rows = {name: (ROWS[name], of_row) for name, of_row in samples.items()}
        of_export = trained_with_system(tokenizer)
        for folder, rows_of in ((fetch(tokenizer), plain_rows), (exported(tokenizer, tmp_path / tokenizer), of_export)):
            for name, (row, of_row) in rows_of.items():
                for messages, ids in prompts(row, of_row):
                    wanted.append((str(folder), name, ids))
                    asked = [message for message in messages if message is not RUN_SYSTEM]
                    kwargs = dict(row.chat_template_kwargs)
                    said = {"messages": as_requests_have_them(asked), "tools": list(row.tools), "kwargs": kwargs}
                    cases.append({"folder": str(folder), **said})
    (tmp_path / "in.json").write_text(json.dumps(cases))
    done = run_with_vllm(
        "tests/templates/vllm_prompts.py", tmp_path / "in.json", tmp_path / "out.json", scratch=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == len(wanted) > 600
    wrong = [
        (folder, name, of_vllm if isinstance(of_vllm, dict) else "other ids")
        for (folder, name, ids), of_vllm in zip(wanted, found, strict=True)
        if of_vllm != ids
    ]
    assert not wrong, wrong[:10]


def test_whole_conversations_are_refused_where_earlier_answers_are_shown_otherwise(known: Known) -> None:
    samples, problems = encode(known.folder, [ROWS["three turns"]], multi_turn="whole")
    if known.name == "qwen3":  # which shows an empty thought before the last answer only
        assert "multi_turn: split" in str(problems["three turns"])
        [only] = encode(known.folder, [ROWS["three turns"]], multi_turn="whole", loss_scale="last_round")[0].values()
        assert [list(s.token_ids) for s in only] == [list(known.samples["three turns"][-1].token_ids)]
    else:
        assert not problems and len(samples["three turns"]) == 1


def test_a_mark_of_the_tokenizer_in_a_text_is_refused(known: Known) -> None:
    mark = load_tokenizer(known.folder).eos_token
    for place, message in (("user", Message("user", f"a{mark}")), ("tool", Message("tool", mark))):
        row = replace(ROWS["one turn"], messages=(message, Message("assistant", "b")), place=place)
        samples, problems = encode(known.folder, [row])
        assert not samples and "no special token of the tokenizer" in str(problems[place])
