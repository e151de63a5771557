"""The digest beside a stage's log: what failed first, of what class, and what to do. Failed by real processes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.schema.run import RunConfig
from mcore import launch
from mcore.errors import InfrastructureError, LaunchError, PipelineError
from mcore.failure import Diagnosis
from tasks.failure import FAILURE, PAGE, next_step, record_failure, signal_name

RUN: dict[str, Any] = {
    "name": "failing",
    "model": {"source": "m"},
    "data": {"dataset": ["d"]},
    "train": {"train_iters": 1, "micro_batch_size": 4, "global_batch_size": 8, "lr": 1.0e-4},
}


def run_with(**launch_group: object) -> RunConfig:
    return RunConfig.model_validate({**RUN, "launch": launch_group})


def fail(folder: Path, code: str, **options: Any) -> PipelineError:
    command = [sys.executable, "-c", code]
    with pytest.raises(PipelineError) as caught:
        launch.run(command, log_path=folder / "stage.log", error_file=folder / "error.json", **options)
    return caught.value


def test_a_killed_process_is_told_with_signal_tail_and_what_to_do(tmp_path: Path) -> None:
    error = fail(tmp_path, "import os; print('last words', flush=True); os.kill(os.getpid(), 9)")
    failure = record_failure(error, run_with(), stage="convert", attempt=2, log=tmp_path / "stage.log")
    found = json.loads((tmp_path / FAILURE).read_text())
    assert (found["run"], found["stage"], found["attempt"]) == ("failing", "convert", 2)
    assert (found["kind"], found["signal"], found["exit_status"], found["rank"]) == ("transient", "SIGKILL", None, None)
    assert found["tail"] == ["last words"] and found["error"] == "InfrastructureError"
    assert failure.advice in (tmp_path / PAGE).read_text() and "last words" in (tmp_path / PAGE).read_text()
    assert error.is_transient and "Class: transient (SIGKILL)" in str(error) and "Next: Run the same" in str(error)


def test_the_rank_that_reports_an_error_is_named(tmp_path: Path) -> None:
    code = "from mcore.child import run_as_child\ndef main():\n    {}['key']\nrun_as_child(main)"
    error = fail(tmp_path, code, env={"RANK": "5"})
    failure = record_failure(error, run_with(), stage="train", attempt=1, log=tmp_path / "stage.log")
    assert (failure.kind, failure.rank, failure.exit_status) == ("internal", 5, 1)
    assert "KeyError" in "\n".join(failure.tail) and not error.is_transient
    assert f"Next: Read the log: less +G {tmp_path / 'stage.log'}" in str(error)


def test_what_stood_still_names_its_stacks(tmp_path: Path) -> None:
    error = fail(tmp_path, "import time; time.sleep(60)", stall_timeout_s=1.0, grace_s=0.5)
    failure = record_failure(error, run_with(), stage="train", attempt=1, log=tmp_path / "stage.log")
    assert failure.kind == "transient" and failure.stacks == str(tmp_path / "stacks")
    assert f"Stacks: {tmp_path / 'stacks'}" in (tmp_path / PAGE).read_text()


@pytest.mark.parametrize(
    ("kind", "stage", "said"),
    [
        ("out_of_memory", "train", "--set train.micro_batch_size=2"),
        ("out_of_memory", "evaluate_tuned", "more memory"),
        ("numerical", "train", "--set train.lr=5e-05"),
        ("gate", "verify_convert", "mcore-flows report failing --store store"),
        ("data", "train", "Correct what is named"),
    ],
)
def test_what_to_do_depends_on_the_class(kind: Any, stage: str, said: str) -> None:
    assert said in next_step(Diagnosis(kind), PipelineError("no"), run_with(), stage, Path("log"))


def test_a_time_limit_can_be_raised_as_it_says(tmp_path: Path) -> None:
    run = run_with(timeout_s=60.0)
    step = next_step(Diagnosis("configuration"), LaunchError("train took longer than 60 s"), run, "train", tmp_path)
    assert "--set 'launch.stage_timeout_s={\"train\": 120.0}'" in step
    assert run_with(stage_timeout_s={"train": 120.0}).launch.timeout_of("train") == 120.0


def test_a_digest_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    error = InfrastructureError("lost", returncode=-9)
    record_failure(error, run_with(), stage="train", attempt=1, log=tmp_path / "absent" / "stage.log")
    assert error.is_transient and str(error).startswith("lost\nClass: transient (SIGKILL)")


@pytest.mark.parametrize(("status", "name"), [(-9, "SIGKILL"), (137, "SIGKILL"), (143, "SIGTERM"), (1, ""), (None, "")])
def test_names_of_signals(status: int | None, name: str) -> None:
    assert signal_name(status) == name
