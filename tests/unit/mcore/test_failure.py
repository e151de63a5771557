"""Errors and log tails as they come, and what they are taken for."""

import signal
import subprocess
import sys
import textwrap

import pytest

from mcore.errors import (
    ConfigError,
    DataError,
    EvaluationGateError,
    InfrastructureError,
    LaunchError,
    PipelineError,
    PrecisionError,
    StoppedError,
    TrainingError,
)
from mcore.failure import FailedRank, diagnose, first_failed_rank

KILLED = -signal.SIGKILL

CASES = {
    "rows": (DataError("no rows"), 0, "data"),
    "run file": (ConfigError("no", ["train.lr"]), 0, "configuration"),
    "proof": (PrecisionError("logits differ"), 0, "gate"),
    "worse model": (EvaluationGateError("worse"), 0, "gate"),
    "loss": (TrainingError("iteration 5: loss nan"), 0, "numerical"),
    "gradient": (TrainingError("iteration 5: gradient norm inf"), 0, "numerical"),
    "no progress": (TrainingError("training makes no progress between its stops"), 0, "internal"),
    "defect": (PipelineError("unexpected KeyError: 'x'", ["this is a defect"]), 0, "internal"),
    "nccl": (PipelineError("unexpected DistBackendError: NCCL error in: …, remote process exited"), 0, "transient"),
    "gloo": (PipelineError("unexpected RuntimeError: [gloo/pair.cc:534] Connection closed by peer [::1]"), 0,
             "transient"),
    "gpu memory": (PipelineError("unexpected OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"), 0,
                   "out_of_memory"),
    "host memory": (PipelineError("unexpected RuntimeError: DefaultCPUAllocator: can't allocate memory"), 0,
                    "out_of_memory"),
    "disk": (PipelineError("unexpected OSError: [Errno 28] No space left on device"), 0, "configuration"),
    "too slow": (LaunchError("mcore.train took longer than 5 s and was ended", tail="Connection reset by peer"), 0,
                 "configuration"),
    "vLLM": (LaunchError("mcore.evaluate ended with exit status 1", returncode=1,
                         tail="ValueError: No available memory for the cache blocks."), 0, "out_of_memory"),
    "an exit": (LaunchError("ended with exit status 1", returncode=1, tail="assert x"), 0, "internal"),
    "killed": (InfrastructureError("was ended by SIGKILL", returncode=KILLED), 0, "transient"),
    "killed by the kernel": (InfrastructureError("was ended by SIGKILL", returncode=KILLED), 1, "out_of_memory"),
    "segmentation fault beside an oom kill": (InfrastructureError("was ended", returncode=-11), 1, "transient"),
    "stall": (InfrastructureError("mcore.train stood still for 600 s and was ended", returncode=143), 0, "transient"),
    "stopped": (StoppedError("saved and left"), 0, "transient"),
    "foreign": (RuntimeError("what"), 0, "internal"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_class_of_an_error(case: str) -> None:
    error, oom_kills, kind = CASES[case]
    assert diagnose(error, oom_kills=oom_kills).kind == kind


def test_what_a_process_says_itself_counts_and_not_the_noise_around_it() -> None:
    """The text of its last lines belongs to the error only if nobody could say what it was."""
    noise = "warning: Connection reset by peer, trying again"
    assert diagnose(LaunchError("ended with exit status 1", returncode=1, tail=noise)).kind == "transient"
    assert diagnose(PipelineError("unexpected ValueError: shapes differ")).kind == "internal"


def test_the_first_rank_of_a_real_torchrun_is_found() -> None:
    """Rank 2 kills itself; the others are asked to end because of it."""
    code = """
        import os, signal, time
        if os.environ["RANK"] == "2":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
         "--nproc_per_node=3", "--no-python", sys.executable, "-S", "-c", textwrap.dedent(code)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert first_failed_rank(done.stdout + done.stderr) == FailedRank(2, KILLED), done.stderr


ACCOUNT = """
Failures:
[1]:
  time      : 2026-01-01_00:00:00
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 12)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : {status} (pid: 11)
"""


def test_one_that_was_only_asked_to_end_did_not_begin_it() -> None:
    assert first_failed_rank(ACCOUNT.format(status=1)) == FailedRank(0, 1)
    assert first_failed_rank(ACCOUNT.format(status=-15)) == FailedRank(1, -9)
    assert first_failed_rank(ACCOUNT.format(status=-15).replace("-9", "-15")) == FailedRank(0, -15)
    assert first_failed_rank("no account") is None
