"""The questions of a suite file, and what the model's answers to them are worth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema.load import RunFileError
from configs.schema.placeholders import OPTION_OF, fill_placeholders, placeholder_values, placeholders_in
from configs.schema.suite import Case, Suite, load_suite
from mcore.data.template import RENDER_DATE
from mcore.errors import ConfigError, Problem
from mcore.evaluate.engine import Answer, Messages
from mcore.evaluate.statistics import wilson

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Question:
    """One case of a suite, ready to be asked. `number` counts from 1 within the group."""

    group: str
    number: int
    case: Case
    messages: Messages
    forgetting: bool = False

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"{self.group} {self.number}"

    @property
    def prompt(self) -> str:
        """The user's last turn."""
        return self.messages[-1]["content"]


def read_questions(
    path: Path, *, model_name: str = "", model_author: str = "", system: str | None = None
) -> tuple[Suite, list[Question]]:
    """A suite file and its questions, placeholders filled.

    Args:
        path: A suite file (`configs.schema.suite`).
        model_name: Fills `{{NAME}}`.
        model_author: Fills `{{AUTHOR}}`.
        system: System message where neither case nor suite brings one.

    Raises:
        ConfigError: All that is wrong with the file, and every placeholder that has no value.
    """
    try:
        suite = load_suite(path)
    except RunFileError as exc:
        problems = [
            Problem(f"{path}: {place}" if place != str(path) else place, found=what) for place, what in exc.problems
        ]
        raise ConfigError("the suite can't be used", problems) from exc
    values = placeholder_values(model_name, model_author)
    missing = (suite.placeholders() | placeholders_in(system or "")) - values.keys()
    if missing:
        problems = [
            Problem(f"{path} holds {{{{{name}}}}}", f"{OPTION_OF[name]} to be given", "nothing")
            for name in sorted(missing)
        ]
        raise ConfigError("the suite can't be used", problems)
    filled = suite.filled(values)
    default = filled.system if filled.system is not None else fill_placeholders(system or "", values)
    return filled, _questions(filled, default)


def _questions(suite: Suite, system: str) -> list[Question]:
    return [
        Question(group.name, number, case, _messages(case, system), group.forgetting)
        for group in suite.groups
        for number, case in enumerate(group.cases, start=1)
    ]


def _messages(case: Case, system: str) -> Messages:
    turns = [{"role": turn.role, "content": turn.content} for turn in case.messages]
    if case.prompt is not None:
        turns = [{"role": "user", "content": case.prompt}]
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def prompt_problems(
    questions: Iterable[Question], tokenizer: PreTrainedTokenizerBase, *, max_model_len: int, max_tokens: int
) -> list[Problem]:
    """Questions that the model's chat template refuses, or that leave no room for an answer."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return [Problem("the tokenizer", "a chat template", "none", "Evaluate an instruct model.")]
    problems = []
    for question in questions:
        room = 0 if question.case.choices else max_tokens  # choices are measured with their own tokens
        try:
            ids = tokenizer.apply_chat_template(
                question.messages, add_generation_prompt=True, return_dict=False, strftime_now=RENDER_DATE.strftime
            )
        except TemplateError as exc:
            problems.append(Problem(f"question {question.name}", "messages that the chat template takes", str(exc)))
            continue
        if len(ids) + room > max_model_len:
            problems.append(
                Problem(
                    f"question {question.name}",
                    f"at most {max_model_len - max_tokens} tokens (max_model_len - max_tokens)",
                    str(len(ids)),
                    "Raise max_model_len, or lower max_tokens.",
                )
            )
    return problems


def expectation(case: Case) -> str:
    """What the answer must look like, in words."""
    parts = []
    if case.equals is not None:
        parts.append(f"equals {case.equals!r}")
    if case.contains:
        parts.append(f"contains {' and '.join(map(repr, case.contains))}")
    if case.regex is not None:
        parts.append(f"matches {case.regex!r}")
    if case.choices:
        normalised = " for its length" if case.length_normalised else ""
        others = " or ".join(map(repr, case.choices[1:]))
        parts.append(f"finds {case.choices[0]!r} more probable{normalised} than {others}")
        if case.answer_prefix:
            parts.append(f"behind {case.answer_prefix!r}")
    if case.number is not None:
        beside = f" within {case.tolerance:g}" if case.tolerance else ""
        parts.append(f"ends with the number {case.number}{beside}")
    if case.json_schema is not None:
        parts.append(f"is JSON of the schema {json.dumps(case.json_schema, sort_keys=True)}")
    if case.rubric is not None:
        rules = json.dumps([rule.model_dump(exclude_defaults=True) for rule in case.rubric.rules], ensure_ascii=False)
        parts.append(f"scores at least {case.rubric.min_score:g} by the rules {rules}")
    if case.not_contains:
        parts.append(
            f"contains neither {' nor '.join(map(repr, case.not_contains))}"
            if len(case.not_contains) > 1
            else f"does not contain {case.not_contains[0]!r}"
        )
    return ", ".join(parts)


def score(questions: Sequence[Question], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """One record a question: the lines of `answers.jsonl`."""
    records = []
    for question, answer in zip(questions, answers, strict=True):
        failures = question.case.failures(answer.text)
        records.append(
            {
                "group": question.group,
                "case": question.number,
                "prompt": question.prompt,
                "messages": question.messages,
                "expectation": expectation(question.case),
                "answer": answer.text,
                "passed": not failures,
                "failures": failures,
                "finish_reason": answer.finish_reason,
                "num_prompt_tokens": len(answer.prompt_token_ids),
                "num_tokens": len(answer.token_ids),
                "prompt_token_ids": answer.prompt_token_ids,
                "token_ids": answer.token_ids,
                "first_token_s": answer.first_token_s,
                "forgetting": question.forgetting,
            }
        )
    return records


def pass_rates(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Number of cases, number passed and pass rate of each group, in the order in which they appear."""
    passed: dict[str, list[bool]] = {}
    for record in records:
        passed.setdefault(record["group"], []).append(record["passed"])
    return {
        group: {
            "num_cases": len(found),
            "num_passed": sum(found),
            "pass_rate": sum(found) / len(found),
            "interval": wilson(sum(found), len(found)),
        }
        for group, found in passed.items()
    }
