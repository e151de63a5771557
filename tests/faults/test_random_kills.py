"""kill -9 at ten random moments of training: it ends, bit for bit, as a run that nobody disturbed.

Half of them come while a checkpoint is written, in the background or not. After each kill the tracker must name a
checkpoint that is whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mcore.metrics import read_metrics
from mcore.select import completeness_problems, iteration_dir, iterations_in, read_tracker
from tests.faults import train_server
from tests.parallel.launch import REPOSITORY
from tests.tiny_runs import make_base, saved_tensors, tiny_run, write_run

pytestmark = pytest.mark.faults

NUM_KILLS = 10
OFTEN = {"train_iters": 24, "save_steps": 2, "eval_steps": 4, "save_total_limit": 3}
LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.2, "target_modules": ("all-linear", "all-embedding")}
ASYNC = {"async_save": True}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full-async": {**ASYNC, "save_safetensors": True},
    "lora": LORA,
    "lora-async": {**LORA, **ASYNC},
}
TIMES = ("time", "step_time_s", "tokens_per_s", "mfu", "memory_gib")


class Server:
    """The process that training is forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", train_server.__file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
            )  # fmt: skip

    def start(self, run: Path, output: Path) -> int:
        job = {"run": str(run), "base": str(self.folder / "base"), "output": str(output)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def status(self) -> int:
        status = self._answer()
        assert status != 1, (self.folder / "log").read_text()[-3000:]
        return status

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("kills")
    make_base(folder / "base", "llama")
    server = Server(folder)
    yield server
    server.close()


def last_logged(output: Path) -> int:
    return max((record["iteration"] for record in read_metrics(output / "metrics.jsonl")), default=-1)


def unfinished(output: Path) -> list[int]:
    return [i for i in iterations_in(output) if not (iteration_dir(output, i) / "metadata.json").exists()]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "what the kill waited for did not come"
        time.sleep(0.001)


def records(output: Path) -> list[dict[str, Any]]:
    found = read_metrics(output / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in found]


@pytest.mark.parametrize("case", CASES)
def test_ten_kills_leave_no_trace(server: Server, case: str) -> None:
    folder = server.folder
    run_file = write_run(folder / f"{case}.yaml", tiny_run(folder, **OFTEN, **CASES[case]))
    undisturbed, output = folder / f"{case}-undisturbed", folder / f"{case}-killed"
    server.start(run_file, undisturbed)
    assert server.status() == 0

    draw = random.Random(case)
    num_in_a_save = 0
    for kill in range(NUM_KILLS):
        begun_at = read_tracker(output) or 0
        assert isinstance(begun_at, int)
        known = set(iterations_in(output))
        pid = server.start(run_file, output)
        if kill % 2:
            wait_for(lambda: set(unfinished(output)) - known)  # noqa: B023  the loop waits for it
            time.sleep(draw.uniform(0, 0.03))
        else:
            step = begun_at + draw.randint(1, 3)
            wait_for(lambda: last_logged(output) >= step)  # noqa: B023
            time.sleep(draw.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert server.status() == -signal.SIGKILL
        num_in_a_save += bool(unfinished(output))
        named = read_tracker(output)
        if named is not None:
            assert not completeness_problems(iteration_dir(output, named))
    assert num_in_a_save >= 3
    server.start(run_file, output)
    assert server.status() == 0

    assert records(output) == records(undisturbed)
    assert iterations_in(output) == iterations_in(undisturbed)
    for iteration in iterations_in(output):
        expected, found = (saved_tensors(iteration_dir(run, iteration)) for run in (undisturbed, output))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    names = {path.name for path in undisturbed.iterdir()}
    assert {path.name for path in output.iterdir()} == names
    for weights in undisturbed.glob("hf_*/*.safetensors"):
        assert (output / weights.relative_to(undisturbed)).read_bytes() == weights.read_bytes()
