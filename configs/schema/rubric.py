"""A rubric: rules about an answer, each with a weight, that no language model need judge."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Self

from pydantic import Field, model_validator

from configs.schema.base import StrictModel
from configs.schema.placeholders import fill_placeholders
from configs.schema.scoring import has_words, regex_problems

CRITERIA = ("contains", "any_of", "not_contains", "regex", "min_words", "max_words")


class Rule(StrictModel):
    """One rule: exactly one of its criteria, and what it weighs."""

    contains: tuple[str, ...] = ()
    """All of these texts are in the answer, as whole words."""
    any_of: tuple[str, ...] = ()
    """At least one of these texts is in the answer, as whole words."""
    not_contains: tuple[str, ...] = ()
    """None of these texts is in the answer, as whole words."""
    regex: str | None = None
    """Python regular expression that is found somewhere in the answer."""
    min_words: int | None = Field(default=None, ge=1)
    """Words (by white space): the shortest answer."""
    max_words: int | None = Field(default=None, ge=1)
    """Words (by white space): the longest answer."""
    weight: float = Field(default=1.0, gt=0)
    """What the rule counts, in relation to the others."""

    @model_validator(mode="after")
    def _one_criterion(self) -> Self:
        given = [name for name in CRITERIA if getattr(self, name) not in (None, ())]
        problems = [] if self.regex is None else regex_problems(self.regex)
        if len(given) != 1:
            problems.append(f"a rule has one of {', '.join(CRITERIA)} (given: {', '.join(given) or 'none'})")
        if any(not text.strip() for text in (*self.contains, *self.any_of, *self.not_contains)):
            problems.append("contains, any_of and not_contains must not hold an empty text")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def failure(self, answer: str, flags: int) -> str | None:
        """What the answer lacks, in words; None if the rule is met."""
        missing = [text for text in self.contains if not has_words(text, answer, flags)]
        if missing:
            return f"lacks {' and '.join(map(repr, missing))}"
        if self.any_of and not any(has_words(text, answer, flags) for text in self.any_of):
            return f"has none of {', '.join(map(repr, self.any_of))}"
        there = [text for text in self.not_contains if has_words(text, answer, flags)]
        if there:
            return f"has {' and '.join(map(repr, there))}"
        if self.regex is not None and not re.search(self.regex, answer, flags):
            return f"does not match {self.regex!r}"
        num_words = len(answer.split())
        if self.min_words is not None and num_words < self.min_words:
            return f"has {num_words} words, fewer than {self.min_words}"
        if self.max_words is not None and num_words > self.max_words:
            return f"has {num_words} words, more than {self.max_words}"
        return None

    def texts(self) -> list[str]:
        """Every text of the rule that may hold a placeholder."""
        return [*self.contains, *self.any_of, *self.not_contains, *([] if self.regex is None else [self.regex])]

    def filled(self, values: Mapping[str, str]) -> Self:
        """The rule with its placeholders replaced."""
        lists = {
            name: tuple(fill_placeholders(text, values) for text in getattr(self, name))
            for name in ("contains", "any_of", "not_contains")
        }
        regex = None if self.regex is None else fill_placeholders(self.regex, values, escape=re.escape)
        return self.model_copy(update=lists | {"regex": regex})


class Rubric(StrictModel):
    """Rules with weights, and the share of them that an answer must meet."""

    rules: tuple[Rule, ...] = Field(min_length=1)
    """The rules."""
    min_score: float = Field(default=1.0, gt=0, le=1)
    """Smallest share of the weights, of the rules that are met, with which an answer passes."""

    def failures(self, answer: str, flags: int = 0) -> list[str]:
        """The rules that an answer breaks, if it scores too little; an empty list if it passes."""
        found = [(rule, rule.failure(answer, flags)) for rule in self.rules]
        broken = [failure for _, failure in found if failure is not None]
        met = sum(Fraction(str(rule.weight)) for rule, failure in found if failure is None)
        score = met / sum(Fraction(str(rule.weight)) for rule in self.rules)
        if score >= Fraction(str(self.min_score)):
            return []
        return [f"scores {float(score):.3g} of {self.min_score:g}", *broken]

    def texts(self) -> list[str]:
        """Every text of the rules that may hold a placeholder."""
        return [text for rule in self.rules for text in rule.texts()]

    def filled(self, values: Mapping[str, str]) -> Self:
        """The rubric with its placeholders replaced."""
        return self.model_copy(update={"rules": tuple(rule.filled(values) for rule in self.rules)})
