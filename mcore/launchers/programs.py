"""Schedulers' own programs, called with lists of arguments and never through a shell."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT_S = 60.0
OURS = "MCORE_FLOWS_"
"""How the environment variables begin that tie a process to the flow that started it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program said, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """The last line that it said, for people."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1] if lines else f"exit status {self.status}"


def ask(argv: Sequence[str]) -> Answer:
    """Run a program to its end; one that is not there or does not answer is an answer of status 127 or 124.

    A job that it starts inherits nothing that ties children to this flow.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    try:
        done = subprocess.run(
            argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except OSError as exc:
        return Answer(127, "", f"{argv[0]}: {exc.strerror}")
    except subprocess.TimeoutExpired:
        return Answer(124, "", f"{argv[0]} did not answer within {TIMEOUT_S:g} s")
    return Answer(done.returncode, done.stdout, done.stderr)
