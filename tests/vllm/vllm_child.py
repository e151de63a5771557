"""A command in vLLM's own environment, and which of its processes outlive it."""

from __future__ import annotations

import os
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import PipelineError, error_from_json

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"


@dataclass(frozen=True)
class Finished:
    """How the command ended, what it told its parent, and its processes that are still alive."""

    returncode: int
    stdout: str
    stderr: str
    error: PipelineError | None
    left_behind: list[str]


def run_with_vllm(*arguments: object, scratch: Path) -> Finished:
    """Run `.venv-vllm/bin/python ARGUMENTS…` as the pipeline does: from the checkout, with a file for its error."""
    if not VLLM_PYTHON.exists():
        pytest.fail(f"{VLLM_PYTHON} does not exist: run `make setup`, which installs vLLM there", pytrace=False)
    mark = uuid.uuid4().hex  # in the environment of every process that vLLM starts
    error_file = scratch / f"error-{mark}.json"
    environment = os.environ | {ERROR_FILE_VARIABLE: str(error_file), "MCORE_FLOWS_TEST_MARK": mark}
    done = subprocess.run(
        [VLLM_PYTHON, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    error = error_from_json(error_file.read_text()) if error_file.exists() else None
    return Finished(done.returncode, done.stdout, done.stderr, error, processes_with(mark))


def processes_with(mark: str) -> list[str]:
    """Command lines of all processes that have a mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended meanwhile
    return found
