"""Packages of both environments, against the ranges that the code is written for, and whether vLLM can be imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from flows.doctor.finding import Finding, judged
from mcore.devices import installed_gpus, visible
from tasks.preflight.versions import driver_problems, packages
from tasks.preflight.vllm import environment_of, interpreter_problems

PINNED = ("prefect", "fastapi", "torch", "megatron-core", "transformers")
"""Packages that get a line of their own. With a newer FastAPI Prefect's server dies while it starts."""
PYTHONS = ((3, 11), (3, 12))
IMPORT_TIMEOUT_S = 180.0


def software_findings(vllm_python: Path) -> Iterator[Finding]:
    """What holds for this environment and for vLLM's.

    Args:
        vllm_python: Interpreter of vLLM's environment.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    yield judged("Python", sys.version_info[:2] in PYTHONS, version, "Set up with Python 3.11 or 3.12.")
    wrong = 0
    found = list(packages())
    for name, wanted, there, fits in found:
        if name in PINNED or not fits:
            yield judged(name, fits, there, f"Needs {wanted}: run `make setup` again.")
        wrong += not fits
    yield judged("packages", not wrong, f"{len(found) - wrong} of {len(found)} in range", "Run `make setup` again.")
    yield from _vllm(str(vllm_python))


def _vllm(python: str) -> Iterator[Finding]:
    problems = interpreter_problems(python)
    for problem in problems:
        yield Finding("vLLM", "fail", f"{problem.subject}: {problem.found}, expected {problem.expected}", problem.fix)
    environment = environment_of(python)
    if problems or isinstance(environment, str):
        return
    for problem in driver_problems(visible(installed_gpus()), environment["cuda"], "vLLM"):
        yield Finding(problem.subject, "fail", f"{problem.found}, needs {problem.expected}", problem.fix)
    versions = f"vLLM {environment['vllm']}, torch {environment['torch']}, transformers {environment['transformers']}"
    try:
        asked = subprocess.run(
            [python, "-c", "import vllm, mcore.evaluate"], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S
        )
        error = (asked.stderr.strip().splitlines() or [f"exit status {asked.returncode}"])[-1]
        works = asked.returncode == 0
    except subprocess.TimeoutExpired:
        works, error = False, f"no answer in {IMPORT_TIMEOUT_S:g} s"
    yield judged("vLLM", works, f"imports: {versions}" if works else error, "Run `make setup` again.")
