"""Several checks of one input: all run although one fails, and what they find becomes one error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from mcore.errors import ConfigError, InputError, Problem

T = TypeVar("T")

BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What a check ends with that rests on a value which is missing, or of no use."""


class Findings:
    """What checks have found so far."""

    def __init__(self) -> None:
        self.errors: list[InputError] = []
        self.broken: list[Exception] = []

    def of(self, check: Callable[[], T]) -> T | None:
        """What `check` returns; None if it finds the input wrong."""
        try:
            return check()
        except InputError as error:
            self.errors.append(error)
            return None

    def of_config(self, check: Callable[[], T]) -> T | None:
        """The same for a check that may break on what another one has to say of the config."""
        try:
            return self.of(check)
        except BROKEN as exc:
            self.broken.append(exc)
            return None

    def take(self, others: Findings) -> None:
        """Add what other checks have found."""
        self.errors += others.errors
        self.broken += others.broken

    @property
    def problems(self) -> list[Problem]:
        """All problems, each once. What only broke is one if nothing else explains it."""
        found = [problem for error in self.errors for problem in error.problems or (Problem(error.summary),)]
        if not found:
            found = [
                Problem("config.json", "values that make a model", f"{type(exc).__name__}: {exc}"[:500])
                for exc in self.broken
            ]
        return list(dict.fromkeys(found))

    def raise_all(self) -> NoReturn:
        """Raise everything: as the checks' own class of error if that is one."""
        kinds = {type(error) for error in self.errors}
        kind = kinds.pop() if len(kinds) == 1 else InputError
        summaries = [error.summary for error in self.errors] or ["the model can't be expressed"]
        parts = (part for summary in summaries for part in summary.split("; "))  # of `together`, several are joined
        raise kind("; ".join(dict.fromkeys(parts)), self.problems)


def together(*readers: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Entries of all the mappings that `readers` return.

    Raises:
        ConfigError: What all of them find wrong.
    """
    findings = Findings()
    found = [findings.of_config(reader) for reader in readers]
    if findings.errors or findings.broken:
        summaries = dict.fromkeys(error.summary for error in findings.errors)
        raise ConfigError("; ".join(summaries) or "the model can't be expressed", findings.problems)
    return {key: value for mapping in found if mapping is not None for key, value in mapping.items()}


def refuse(problems: list[Problem], summary: str = "the model can't be expressed") -> dict[str, Any]:
    """Nothing, for `together`, if there are no problems.

    Raises:
        ConfigError: There are.
    """
    if problems:
        raise ConfigError(summary, problems)
    return {}
