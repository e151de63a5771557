"""The environment that vLLM lives in."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from typing import Any

from mcore.environment import describe_other
from mcore.errors import Problem

FIX = "Run `make setup`, or name the Python that vLLM is installed for."


def interpreter_problems(python: str) -> list[Problem]:
    """Whether an interpreter is there and finds vLLM and this code; nothing is imported, which would take long."""
    place = f"evaluate.python: {python}"
    found = environment_of(python)
    if isinstance(found, str):
        return [Problem(place, "a Python interpreter", found, FIX)]
    if found["vllm"] is None:
        return [Problem(place, "vLLM in its environment", "none", FIX)]
    expected = {"mcore": "this package (pip install --no-deps --editable .)", "torch": "torch"}
    missing = [what for key, what in expected.items() if not found[key]]
    return [Problem(place, f"{what} in its environment", "none", FIX) for what in missing]


@cache
def environment_of(python: str) -> dict[str, Any] | str:
    """What its environment has (`mcore/environment.py`), or why that can't be told."""
    program = shutil.which(python)
    if program is None:
        return "none"
    try:
        return describe_other(program)
    except (OSError, ValueError, subprocess.TimeoutExpired) as exc:
        return str(exc)
