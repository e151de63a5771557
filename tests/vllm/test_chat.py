"""`mcore-flows chat` with the real SmolLM2 in a real `vllm serve`: several turns, and nothing is left behind."""

import os
import subprocess
import uuid
from pathlib import Path

import pytest

from tests.unit.flows.command_line import COMMAND
from tests.vllm.vllm_child import VLLM_PYTHON, processes_with

pytestmark = [pytest.mark.vllm, pytest.mark.long]


def test_it_answers_knows_what_was_said_and_ends_its_server(smollm2: Path, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    questions = "What is the capital of France?\nAnd of which country did I ask?\n"
    words = ["chat", smollm2, "--max-tokens", 40, "--max-model-len", 512, "--python", VLLM_PYTHON]
    done = subprocess.run(
        [str(COMMAND), *map(str, words)],
        cwd=tmp_path, input=questions, capture_output=True, text=True,
        env=os.environ | {"MCORE_FLOWS_TEST_MARK": mark},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert "Paris" in first
    assert "France" in second
    assert processes_with(mark) == []
