"""The environment that vLLM lives in."""

from __future__ import annotations

import shutil
import subprocess

from mcore.errors import Problem

HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


def interpreter_problems(python: str) -> list[Problem]:
    """Whether an interpreter is there and finds vLLM; vLLM is not imported, which would take many seconds."""
    place, fix = f"evaluate.python: {python}", "Run `make setup`, or name the Python that vLLM is installed for."
    found = shutil.which(python)
    if found is None:
        return [Problem(place, "a Python interpreter", "none", fix)]
    try:
        answer = subprocess.run([found, "-c", HAS_VLLM], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return [Problem(place, "a Python interpreter", str(exc), fix)]
    return [Problem(place, "vLLM in its environment", "none", fix)] if answer.returncode else []
