"""A training run that is killed, killed while it saves, and asked to stop ends like one that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mcore.child import ERROR_FILE_VARIABLE
from mcore.errors import EXIT_RESUME, StoppedError, error_from_json
from mcore.metrics import read_metrics
from mcore.select import completeness_problems, iteration_dir, iterations_in, read_tracker
from mcore.supervise import descendants
from tests.parallel.launch import REPOSITORY
from tests.tiny_runs import make_base, recorded, saved_tensors, tiny_run, write_run

TRAIN_ITERS, SAVE_STEPS = 40, 10
FIGURES = ("loss", "validation_loss", "grad_norm", "lr", "consumed_samples", "consumed_tokens")


class Attempt:
    """One start of the run under torchrun."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.error_file, self.log = folder / "error.json", folder / f"{output.name}.log"
        self.error_file.unlink(missing_ok=True)
        with self.log.open("w") as log:
            self.torchrun = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--local-addr",
                 "127.0.0.1", "--nproc_per_node", "2", "-m", "mcore.train", str(folder / "run.yaml"),
                 "--base", str(folder / "base"), "--output", str(output)],
                stdout=log, stderr=log, cwd=REPOSITORY, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", ERROR_FILE_VARIABLE: str(self.error_file)},
            )  # fmt: skip

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.torchrun.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def signal_all(self, number: signal.Signals) -> None:
        """To torchrun and to all that came of it, as a supervisor does."""
        for pid in (self.torchrun.pid, *descendants(self.torchrun.pid)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def end(self) -> int:
        try:
            return self.torchrun.wait(timeout=120)
        finally:
            self.signal_all(signal.SIGKILL)


def last_logged(output: Path) -> int:
    return max((record["iteration"] for record in read_metrics(output / "metrics.jsonl")), default=-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_base(folder / "base", "llama")
    run = tiny_run(folder, nproc=2, train_iters=TRAIN_ITERS, save_steps=SAVE_STEPS, eval_steps=5, save_total_limit=3)
    write_run(folder / "run.yaml", run)
    attempt = Attempt(folder, folder / "undisturbed")
    assert attempt.end() == 0, attempt.log.read_text()[-3000:]
    return folder


def test_a_run_survives_two_kills_and_a_stop(folder: Path) -> None:
    undisturbed, output = folder / "undisturbed", folder / "disturbed"
    kill_at = random.SystemRandom().randint(SAVE_STEPS + 1, 2 * SAVE_STEPS - 1)
    print(f"killed at step {kill_at}")

    attempt = Attempt(folder, output)
    attempt.wait_for(lambda: last_logged(output) >= kill_at)
    attempt.signal_all(signal.SIGKILL)
    attempt.end()

    attempt = Attempt(folder, output)
    second = iteration_dir(output, 2 * SAVE_STEPS)
    attempt.wait_for(lambda: second.exists() and last_logged(output) == 2 * SAVE_STEPS)
    attempt.signal_all(signal.SIGKILL)
    attempt.end()
    assert read_tracker(output) == SAVE_STEPS
    assert completeness_problems(second), "the kill came too late to be in the middle of a save"

    attempt = Attempt(folder, output)
    attempt.wait_for(lambda: last_logged(output) >= 2 * SAVE_STEPS + 2)
    attempt.signal_all(signal.SIGTERM)
    assert attempt.end() != 0
    error = error_from_json(attempt.error_file.read_text())
    assert isinstance(error, StoppedError) and error.exit_status == EXIT_RESUME
    stopped_at = read_tracker(output)
    assert isinstance(stopped_at, int) and stopped_at == last_logged(output) and stopped_at % SAVE_STEPS

    attempt = Attempt(folder, output)
    assert attempt.end() == 0, attempt.log.read_text()[-3000:]

    assert iterations_in(output) == iterations_in(undisturbed) == [20, 30, 40]
    for iteration in iterations_in(output):
        expected, found = (saved_tensors(iteration_dir(run, iteration)) for run in (undisturbed, output))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    before, after = (read_metrics(run / "metrics.jsonl") for run in (undisturbed, output))
    assert [record["iteration"] for record in after] == [record["iteration"] for record in before]
    for figure in FIGURES:
        assert recorded(after, figure) == recorded(before, figure)
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_a_complete_run_is_left_alone(folder: Path) -> None:
    output = folder / "undisturbed"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    attempt = Attempt(folder, output)
    assert attempt.end() == 0
    assert "is complete" in attempt.log.read_text()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
