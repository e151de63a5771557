"""An evaluation suite: prompts in groups, and what an answer to each must look like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from configs.schema.base import StrictModel
from configs.schema.load import RunFileError, read_run_file, validation_problems
from configs.schema.placeholders import fill_placeholders, placeholders_in


class SuiteMessage(StrictModel):
    """One turn of a conversation that leads to the answer under test."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str = Field(min_length=1)
    """What is said."""


class Case(StrictModel):
    """One prompt and its expectation: exactly one of `equals`, `contains` and `regex`, or `not_contains` alone.

    All texts may hold `{{NAME}}` and `{{AUTHOR}}`, filled from the run.
    """

    prompt: str | None = None
    """The question, as a single user turn. Give this or `messages`."""
    messages: tuple[SuiteMessage, ...] = ()
    """A whole conversation that ends with the user's turn. Give this or `prompt`."""
    equals: str | None = None
    """The answer is this text; white space at both ends does not count."""
    contains: tuple[str, ...] = ()
    """Each of these texts is in the answer as whole words: no Latin letter, digit, `_` or `-` touches it, so `12` is
    not in `2012` and `swift` is not in `swift-robot`."""
    regex: str | None = None
    """Python regular expression that is found somewhere in the answer; `.` matches line ends too. Placeholders are
    filled in as literal text."""
    not_contains: tuple[str, ...] = ()
    """None of these texts is in the answer, as whole words in the sense of `contains`."""
    ignore_case: bool = True
    """Whether upper and lower case count as the same in all of these."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if (self.prompt is None) == (not self.messages):
            problems.append("give exactly one of prompt and messages")
        if self.prompt is not None and not self.prompt.strip():
            problems.append("prompt is empty")
        if self.messages and self.messages[-1].role != "user":
            problems.append("messages must end with the user's turn")
        given = [name for name in ("equals", "contains", "regex") if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            problems.append(f"give only one of equals, contains and regex (given: {', '.join(given)})")
        if not given and not self.not_contains:
            problems.append("give one of equals, contains, regex and not_contains")
        if any(not text.strip() for text in (*self.contains, *self.not_contains)):
            problems.append("contains and not_contains must not hold an empty text")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as exc:
                problems.append(f"regex {self.regex!r} is no regular expression: {exc}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def failures(self, answer: str) -> list[str]:
        """What is wrong with an answer, in words; an empty list if it passes. Placeholders must be filled before."""
        flags = re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)
        found = []
        if self.equals is not None and not re.fullmatch(re.escape(self.equals.strip()), answer.strip(), flags):
            found.append(f"is not {self.equals.strip()!r}")
        found += [f"lacks {text!r}" for text in self.contains if not _whole_words(text, flags).search(answer)]
        if self.regex is not None and not re.search(self.regex, answer, flags):
            found.append(f"does not match {self.regex!r}")
        found += [f"has {text!r}" for text in self.not_contains if _whole_words(text, flags).search(answer)]
        return found

    def texts(self) -> list[str]:
        """Every text of the case that may hold a placeholder."""
        texts = [self.prompt, self.equals, self.regex, *self.contains, *self.not_contains]
        return [text for text in (*texts, *(message.content for message in self.messages)) if text is not None]

    def filled(self, values: Mapping[str, str]) -> Self:
        """The case with its placeholders replaced.

        Raises:
            KeyError: A placeholder has no value.
        """

        def fill(text: str | None) -> str | None:
            return None if text is None else fill_placeholders(text, values)

        return self.model_copy(
            update={
                "prompt": fill(self.prompt),
                "messages": tuple(
                    SuiteMessage(role=message.role, content=fill_placeholders(message.content, values))
                    for message in self.messages
                ),
                "equals": fill(self.equals),
                "contains": tuple(fill_placeholders(text, values) for text in self.contains),
                "regex": None if self.regex is None else fill_placeholders(self.regex, values, escape=re.escape),
                "not_contains": tuple(fill_placeholders(text, values) for text in self.not_contains),
            }
        )


def _whole_words(text: str, flags: int) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9_-]){re.escape(text)}(?![A-Za-z0-9_-])", flags)


class Group(StrictModel):
    """Cases that are counted together: a gate compares base and tuned model group by group."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name in tables: lowercase letters, digits, `_`, `-`."""
    cases: tuple[Case, ...]
    """The cases, at least one."""

    @model_validator(mode="after")
    def _has_cases(self) -> Self:
        # Not min_length: pydantic would count only the valid ones and add a second, misleading problem.
        if not self.cases:
            raise ValueError("cases are empty")
        return self


class Suite(StrictModel):
    """A suite file (`configs/suites/*.yaml`)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name in tables: lowercase letters, digits, `_`, `-`."""
    system: str | None = None
    """System message for cases that bring none; without it the chat template's own default stands."""
    groups: tuple[Group, ...]
    """Groups of cases, at least one, in the order of the tables."""

    @model_validator(mode="after")
    def _has_groups_of_different_names(self) -> Self:
        if not self.groups:
            raise ValueError("groups are empty")
        names = [group.name for group in self.groups]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"group names are given twice: {', '.join(twice)}")
        return self

    def placeholders(self) -> set[str]:
        """Names of the placeholders that the suite needs values for."""
        texts = [text for group in self.groups for case in group.cases for text in case.texts()]
        return {name for text in (*texts, self.system or "") for name in placeholders_in(text)}

    def filled(self, values: Mapping[str, str]) -> Self:
        """The suite with its placeholders replaced (`configs.schema.placeholders.placeholder_values`).

        Raises:
            KeyError: A placeholder has no value.
        """
        groups = tuple(
            Group(name=group.name, cases=tuple(case.filled(values) for case in group.cases)) for group in self.groups
        )
        system = None if self.system is None else fill_placeholders(self.system, values)
        return self.model_copy(update={"system": system, "groups": groups})


def load_suite(path: Path) -> Suite:
    """The validated suite of a file, its placeholders not yet filled.

    Raises:
        RunFileError: All problems of the file at once.
    """
    raw = read_run_file(path)
    try:
        return Suite.model_validate(raw)
    except ValidationError as exc:
        raise RunFileError(validation_problems(exc, Suite)) from exc
