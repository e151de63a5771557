"""Runs that are started in a folder of their own, with a scheduler's programs on the PATH, and what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mcore.launch import tail_of
from tests.flows import run_pipeline
from tests.flows.workspace import raw_run

ITERATIONS = 240
TRAIN = {"train_iters": ITERATIONS, "save_steps": 50, "eval_steps": ITERATIONS, "save_total_limit": 2}


@dataclass(frozen=True)
class Cluster:
    """A folder with a model and rows, the programs of a scheduler, and their state."""

    folder: Path
    programs: Path
    state: Path
    variables: dict[str, str]

    def start(self, store: str, **launch: Any) -> subprocess.Popen:
        """The flow of a run, in a process of its own."""
        common = {"retries": 0, "retry_delay_s": 0.1, "timeout_s": 400.0, "grace_s": 20.0, "store": store}
        run = raw_run(evaluate=None, train=TRAIN) | {"launch": common | launch}
        run_file = self.folder / f"{store}.json"
        run_file.write_text(json.dumps(run))
        environment = {
            **os.environ, "PREFECT_HOME": str(self.folder / f"prefect-{store}"), "OMP_NUM_THREADS": "1",
            "PATH": f"{self.programs}:{os.environ['PATH']}", **self.variables,
        }  # fmt: skip
        environment.pop("PREFECT_API_URL", None)
        return subprocess.Popen(
            [sys.executable, run_pipeline.__file__, run_file.name], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def calls(self, program: str) -> list[list[str]]:
        """How often a program was called, and with what."""
        lines = map(json.loads, (self.state / "calls.log").read_text().splitlines())
        return [words for words in lines if words[0] == program]

    def weights(self, store: str) -> bytes:
        (weights,) = (self.folder / store).glob("export/*/model.safetensors")
        return weights.read_bytes()

    def log(self, store: str) -> str:
        path = self.folder / store / "runs" / "tiny" / "train" / "stage.log"
        return path.read_text() if path.exists() else ""

    def failure(self, store: str) -> dict[str, Any]:
        return json.loads((self.folder / store / "runs" / "tiny" / "train" / "failure.json").read_text())

    def wait_for_iteration(self, store: str, iteration: int) -> None:
        """Wait until training has logged an iteration."""
        failure = self.folder / store / "runs" / "tiny" / "train" / "failure.txt"

        def has_come() -> bool:
            files = (self.folder / store).glob(".partial/train-*/metrics.jsonl")
            assert not failure.exists(), failure.read_text()
            return any(f'"iteration": {iteration}, "loss"' in tail_of(file) for file in files)

        wait_until(has_come, 200)


def wait_until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextmanager
def held_up(roots: Sequence[int]) -> Iterator[None]:
    """Training below these processes stands still for the block, so that it can't end before it is looked for."""
    trees = [process for root in roots for process in psutil.Process(root).children(recursive=True)]
    ranks = [one for one in trees if "mcore.train" in one.cmdline() and "torch.distributed.run" not in one.cmdline()]
    assert ranks
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()


def result_of(flow: subprocess.Popen) -> dict[str, Any]:
    out, err = flow.communicate(timeout=400)
    assert flow.returncode == 0, err[-8000:]
    return json.loads(out)


def kill(flow: subprocess.Popen) -> None:
    """kill -9 of the flow, and of its embedded server."""
    os.killpg(flow.pid, signal.SIGKILL)
    flow.communicate()
