"""What is wrong with an answer: the checks that cases and rubrics of a suite are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)")
_FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)```", re.DOTALL)


def has_words(text: str, answer: str, flags: int = 0) -> bool:
    """Whether a text is in an answer as whole words: no Latin letter, digit, `_` or `-` touches it."""
    return re.search(rf"(?<![A-Za-z0-9_-]){re.escape(text)}(?![A-Za-z0-9_-])", answer, flags) is not None


def regex_problems(regex: str) -> list[str]:
    """What keeps a text from being a regular expression."""
    try:
        re.compile(regex)
    except re.error as exc:
        return [f"regex {regex!r} is no regular expression: {exc}"]
    return []


def last_number(answer: str) -> Decimal | None:
    """The last number in an answer: digits, with commas between thousands, a fraction and an exponent if it has them.

    A number that touches letters (`GPT4`, `3rd`) is a part of a word and none.
    """
    found = _NUMBER.findall(answer)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def number_failures(answer: str, number: float, tolerance: float) -> list[str]:
    """What is wrong with an answer of which the last number should be this one."""
    found = last_number(answer)
    if found is None:
        return ["has no number"]
    # Decimals, since 0.3 - 0.2 is less than 0.1 in floats; a limit is what was typed.
    if abs(found - Decimal(str(number))) > Decimal(str(tolerance)):
        beside = f" within {tolerance:g}" if tolerance else ""
        return [f"ends with the number {found}, not {number}{beside}"]
    return []


def schema_problems(schema: Mapping[str, Any]) -> list[str]:
    """What keeps a mapping from being a JSON schema that can be used without a network."""
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as exc:
        return [f"json_schema is no JSON schema: {exc.json_path}: {exc.message}"]
    return [
        f"json_schema refers to {reference!r}; only what is in the schema itself (#...) can be referred to"
        for reference in _references(schema)
        if not reference.startswith("#")
    ]


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key in {"$ref", "$dynamicRef"} and isinstance(value, str):
                yield value
            else:
                yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)


def json_failures(answer: str, schema: Mapping[str, Any]) -> list[str]:
    """What is wrong with an answer that should be JSON of a schema, all of it."""
    from jsonschema import Draft202012Validator

    fence = _FENCE.search(answer)
    try:
        value = json.loads(fence[1] if fence else answer)
    except (ValueError, RecursionError) as exc:
        return [f"is no JSON: {exc}"]
    errors = sorted(Draft202012Validator(schema).iter_errors(value), key=lambda error: error.json_path)
    return [f"breaks the schema at {error.json_path}: {error.message}" for error in errors]
