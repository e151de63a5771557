"""A training run that is killed, killed while it saves, or asked to stop ends like one that nobody disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class ByHand(Attempt):
    """One start of the run by `mcore-flows train`, in a session of its own."""

    def __init__(self, folder: Path, output: Path) -> None:
        self.log = folder / f"{output.name}.log"
        command = [Path(sys.executable).with_name("mcore-flows"), "train", folder / "run.yaml"]
        with self.log.open("w") as log:
            self.torchrun = subprocess.Popen(
                [*command, "--base", folder / "base", "--output", output],
                stdout=log, stderr=log, cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip


def last_logged(output: Path) -> int:
    return max((record["iteration"] for record in read_metrics(output / "metrics.jsonl")), default=-1)


FULL: dict[str, Any] = {}
LORA = {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.2, "target_modules": ("all-linear", "all-embedding")}


@pytest.fixture(scope="module", params=[FULL, pytest.param(LORA, marks=pytest.mark.faults)], ids=["full", "lora"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_base(folder / "base", "llama")
    often = {"train_iters": TRAIN_ITERS, "save_steps": SAVE_STEPS, "eval_steps": 5, "save_total_limit": 3}
    run = tiny_run(folder, nproc=2, **often, **request.param)
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


@pytest.mark.faults
def test_a_complete_run_is_left_alone(folder: Path) -> None:
    output = folder / "undisturbed"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    attempt = Attempt(folder, output)
    assert attempt.end() == 0
    assert "is complete" in attempt.log.read_text()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_by_hand_that_is_asked_to_stop_saves_and_goes_on(folder: Path, number: signal.Signals) -> None:
    output = folder / f"by-hand-{number.name}"
    stopped = ByHand(folder, output)
    stopped.wait_for(lambda: last_logged(output) >= SAVE_STEPS + 2)
    if number == signal.SIGINT:
        os.killpg(stopped.torchrun.pid, number)  # as a terminal does
    else:
        stopped.torchrun.send_signal(number)
    assert stopped.end() == EXIT_RESUME
    iteration = read_tracker(output)
    assert isinstance(iteration, int) and iteration == last_logged(output) and iteration % SAVE_STEPS
    told = stopped.log.read_text()
    assert told.count(f"StoppedError: asked to stop: iteration {iteration} of {TRAIN_ITERS} is saved") == 1
    assert "Run the same command again to go on." in told
    assert "Traceback" not in told and "SignalException" not in told and "OMP_NUM_THREADS" not in told

    again = ByHand(folder, output)
    assert again.end() == 0, again.log.read_text()[-3000:]
    for saved in iterations_in(output):
        expected, found = (saved_tensors(iteration_dir(run, saved)) for run in (folder / "undisturbed", output))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.faults
def test_torchrun_that_is_stopped_before_its_ranks_can_save_says_so(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import pathlib, sys, time\npathlib.Path(f'{sys.argv[1]}/{time.time_ns()}').touch()\ntime.sleep(60)"
    )
    (tmp_path / "ready").mkdir()
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "mcore.train.torchrun", "--standalone", "--local-addr", "127.0.0.1",
         "--nproc_per_node", "2", str(script), str(tmp_path / "ready")],
        stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "ready").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    torchrun.send_signal(signal.SIGINT)
    _, told = torchrun.communicate(timeout=60)
    assert torchrun.returncode == 128 + signal.SIGINT
    assert told == "stopped before training began; run the same command again\n"
