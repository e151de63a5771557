"""An evaluation suite: prompts in groups, and what an answer to each must look like."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from configs.schema.base import StrictModel
from configs.schema.load import RunFileError, read_run_file, validation_problems
from configs.schema.placeholders import fill_placeholders, placeholders_in
from configs.schema.rubric import Rubric
from configs.schema.scoring import has_words, json_failures, number_failures, regex_problems, schema_problems

EXPECTATIONS = ("equals", "contains", "regex", "choices", "number", "json_schema", "rubric")
"""Fields of a case that say what an answer must be; a case has one of them at most."""
HELD_OUT = "held_out"
"""Name of the perplexity set that a run's own held-out rows are."""


class SuiteMessage(StrictModel):
    """One turn of a conversation that leads to the answer under test."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str = Field(min_length=1)
    """What is said."""


class Case(StrictModel):
    """One prompt and its expectation: exactly one of `equals`, `contains`, `regex`, `choices`, `number`, `json_schema`
    and `rubric`, or `not_contains` alone. `not_contains` may stand beside any of them but `choices`.

    All texts but those of `json_schema` may hold `{{NAME}}` and `{{AUTHOR}}`, filled from the run.
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
    choices: tuple[str, ...] = ()
    """Answers to choose from, the right one first. Nothing is generated: the model passes if it gives the first the
    highest log-probability behind the prompt."""
    answer_prefix: str = ""
    """Of `choices`: what the assistant has said already, and each choice goes on from, with a space between."""
    length_normalised: bool = False
    """Of `choices`: whether the log-probability is divided by the number of the choice's tokens, so that a long choice
    is not less probable for its length."""
    number: int | float | None = None
    """The last number in the answer is this one; `1,234.5` is read as 1234.5."""
    tolerance: float = Field(default=0.0, ge=0)
    """Of `number`: how far the answer may be from it, in either direction."""
    json_schema: dict[str, Any] | None = None
    """JSON schema (draft 2020-12) that the answer conforms to: the whole of it, or what is in its first ``` fence."""
    rubric: Rubric | None = None
    """Rules with weights; the answer passes with a large enough share of them."""
    ignore_case: bool = True
    """Whether upper and lower case count as the same in all texts and expressions."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._question_problems(), *self._expectation_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _question_problems(self) -> Iterator[str]:
        if (self.prompt is None) == (not self.messages):
            yield "give exactly one of prompt and messages"
        if self.prompt is not None and not self.prompt.strip():
            yield "prompt is empty"
        if self.messages and self.messages[-1].role != "user":
            yield "messages must end with the user's turn"

    def _expectation_problems(self) -> Iterator[str]:
        given = [name for name in EXPECTATIONS if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            yield f"give only one of {_listed(EXPECTATIONS)} (given: {', '.join(given)})"
        if not given and not self.not_contains:
            yield f"give one of {_listed((*EXPECTATIONS, 'not_contains'))}"
        if any(not text.strip() for text in (*self.contains, *self.not_contains)):
            yield "contains and not_contains must not hold an empty text"
        if self.regex is not None:
            yield from regex_problems(self.regex)
        if self.json_schema is not None:
            yield from schema_problems(self.json_schema)
        yield from self._choice_problems()
        if self.tolerance and self.number is None:
            yield "tolerance is about number, which is not given"

    def _choice_problems(self) -> Iterator[str]:
        if not self.choices:
            about = [name for name in ("answer_prefix", "length_normalised") if getattr(self, name)]
            if about:
                yield f"{' and '.join(about)} are about choices, which are not given"
            return
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
            yield "choices must be two or more, and all different"
        if any(not text.strip() or text != text.strip() for text in self.choices):
            yield "choices must not be empty, nor begin or end with white space"
        if self.not_contains:
            yield "not_contains is about answers that are generated; with choices none is"

    def failures(self, answer: str) -> list[str]:
        """What is wrong with an answer, in words; an empty list if it passes. Placeholders must be filled before."""
        flags = re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)
        found = []
        if self.equals is not None and not re.fullmatch(re.escape(self.equals.strip()), answer.strip(), flags):
            found.append(f"is not {self.equals.strip()!r}")
        found += [f"lacks {text!r}" for text in self.contains if not has_words(text, answer, flags)]
        if self.regex is not None and not re.search(self.regex, answer, flags):
            found.append(f"does not match {self.regex!r}")
        if self.choices and answer != self.choices[0]:
            found.append(f"is not {self.choices[0]!r}")
        if self.number is not None:
            found += number_failures(answer, self.number, self.tolerance)
        if self.json_schema is not None:
            found += json_failures(answer, self.json_schema)
        if self.rubric is not None:
            found += self.rubric.failures(answer, flags)
        found += [f"has {text!r}" for text in self.not_contains if has_words(text, answer, flags)]
        return found

    def texts(self) -> list[str]:
        """Every text of the case that may hold a placeholder."""
        texts = [
            *(self.prompt, self.equals, self.regex, self.answer_prefix),
            *(*self.contains, *self.not_contains, *self.choices),
            *(message.content for message in self.messages),
            *(self.rubric.texts() if self.rubric else ()),
        ]
        return [text for text in texts if text is not None]

    def filled(self, values: Mapping[str, str]) -> Self:
        """The case with its placeholders replaced.

        Raises:
            KeyError: A placeholder has no value.
        """

        def fill(text: str | None) -> str | None:
            return None if text is None else fill_placeholders(text, values)

        def fill_all(texts: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(fill_placeholders(text, values) for text in texts)

        return self.model_copy(
            update={
                "prompt": fill(self.prompt),
                "messages": tuple(
                    SuiteMessage(role=message.role, content=fill_placeholders(message.content, values))
                    for message in self.messages
                ),
                "equals": fill(self.equals),
                "contains": fill_all(self.contains),
                "regex": None if self.regex is None else fill_placeholders(self.regex, values, escape=re.escape),
                "not_contains": fill_all(self.not_contains),
                "choices": fill_all(self.choices),
                "answer_prefix": fill(self.answer_prefix),
                "rubric": None if self.rubric is None else self.rubric.filled(values),
            }
        )


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


class Group(StrictModel):
    """Cases that are counted together: a gate compares base and tuned model group by group."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name in tables: lowercase letters, digits, `_`, `-`."""
    forgetting: bool = False
    """Whether this is what the base model knows and the tuned one must not have lost."""
    cases: tuple[Case, ...]
    """The cases, at least one."""

    @model_validator(mode="after")
    def _has_cases(self) -> Self:
        # Not min_length: pydantic would count only the valid ones and add a second, misleading problem.
        if not self.cases:
            raise ValueError("cases are empty")
        return self


class PerplexitySet(StrictModel):
    """Plain texts, not rendered by the chat template, on which a model's perplexity is measured."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name in tables: lowercase letters, digits, `_`, `-`."""
    forgetting: bool = False
    """Whether this is what the base model knows and the tuned one must not have lost."""
    texts: tuple[str, ...]
    """The texts, at least one. Tokens from each text's second on are counted."""

    @model_validator(mode="after")
    def _has_texts(self) -> Self:
        if not self.texts or any(not text.strip() for text in self.texts):
            raise ValueError("texts must be one or more, and none of them empty")
        return self


class Suite(StrictModel):
    """A suite file (`configs/suites/*.yaml`)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name in tables: lowercase letters, digits, `_`, `-`."""
    system: str | None = None
    """System message for cases that bring none; without it the chat template's own default stands."""
    groups: tuple[Group, ...]
    """Groups of cases, at least one, in the order of the tables."""
    perplexity: tuple[PerplexitySet, ...] = ()
    """Perplexity sets. Beside them the run's own held-out rows are the set `held_out`."""

    @model_validator(mode="after")
    def _has_groups_of_different_names(self) -> Self:
        problems = [] if self.groups else ["groups are empty"]
        for what, names in (
            ("group", [group.name for group in self.groups]),
            ("perplexity set", [one.name for one in self.perplexity]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                problems.append(f"{what} names are given twice: {', '.join(twice)}")
            if what == "perplexity set" and HELD_OUT in names:
                problems.append(f"{HELD_OUT} is the name of the run's own held-out rows")
        if problems:
            raise ValueError("\n".join(problems))
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
            group.model_copy(update={"cases": tuple(case.filled(values) for case in group.cases)})
            for group in self.groups
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
