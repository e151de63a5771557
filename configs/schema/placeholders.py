"""The placeholders `{{NAME}}` and `{{AUTHOR}}` of rows and suites, also written `{{ NAME }}`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

FIELD_OF = {"NAME": "data.model_name", "AUTHOR": "data.model_author"}
"""The field of a run that fills each placeholder."""
OPTION_OF = {"NAME": "--model-name", "AUTHOR": "--model-author"}
"""The option of `mcore-flows evaluate` that does."""

_PLACEHOLDER = re.compile(r"\{\{\s*(NAME|AUTHOR)\s*\}\}")


Names = str | tuple[str, str]
"""One value for all rows, or one for those in Chinese and one for all others."""


def in_language(value: Names, language: Literal["zh", "en"] | None = None) -> str:
    """The value for rows of a language; without one, of two the second."""
    if isinstance(value, str):
        return value
    return value[0] if language == "zh" else value[1]


def placeholder_values(
    model_name: Names, model_author: Names, language: Literal["zh", "en"] | None = None
) -> dict[str, str]:
    """The values of a run by placeholder, for rows of a language; what the run leaves empty is left out."""
    values = {"NAME": in_language(model_name, language), "AUTHOR": in_language(model_author, language)}
    return {name: value for name, value in values.items() if value}


def placeholders_in(text: str) -> set[str]:
    """Names of the placeholders that a text holds."""
    return set(_PLACEHOLDER.findall(text))


def fill_placeholders(text: str, values: Mapping[str, str], *, escape: Callable[[str], str] = str) -> str:
    """The text with its placeholders replaced.

    Args:
        text: Any text; without placeholders it comes back unchanged.
        values: What to put in, by placeholder name.
        escape: Applied to each value, such as `re.escape` where the text is a regular expression.

    Raises:
        KeyError: The text has a placeholder that has no value.
    """
    return _PLACEHOLDER.sub(lambda match: escape(values[match[1]]), text)
