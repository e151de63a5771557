"""One line of what the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]
"""As it should be; works, but not as well or not for everything; does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked at.

    Attributes:
        subject: What.
        state: How it is.
        found: What was found.
        fix: What to do about it; empty if nothing.
    """

    subject: str
    state: State
    found: str
    fix: str = ""


def judged(subject: str, is_well: bool, found: str, fix: str, *, otherwise: State = "fail") -> Finding:
    """A finding that is ok, or `otherwise` with what to do about it."""
    return Finding(subject, "ok", found) if is_well else Finding(subject, otherwise, found, fix)
