"""`train`: from the proven base to tuned checkpoints, on as many processes as the run asks for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import yaml

from mcore.artifacts import ArtifactRef
from mcore.errors import Problem, StoppedError, TrainingError
from mcore.launch import RECORD
from mcore.launchers.orders import RECORD_VARIABLE
from mcore.metrics import FILE_NAME as METRICS_FILE
from mcore.select import read_tracker
from tasks.cluster import orders_for
from tasks.progress import TrainingProgress
from tasks.stage import Job, stage


@stage("train")
def train(job: Job, *, base: ArtifactRef, data: ArtifactRef, proof: ArtifactRef) -> None:
    """Tuned checkpoints, metrics and TensorBoard. Goes on from the newest checkpoint that an earlier attempt saved."""
    limits = job.run.launch
    progress = TrainingProgress(job)
    if not limits.is_single_machine:
        folders = ("--base", base.path, "--data", data.path, "--output", str(job.output.absolute()))
        orders = orders_for(job, "mcore.train", *folders)
        # Its machines watch for a standstill themselves: the job may wait for them first, for as long as it must.
        launch_until_complete(
            job,
            [sys.executable, "-m", "mcore.launchers", "follow", str(orders.path)],
            env={RECORD_VARIABLE: str((job.stage_dir / RECORD).absolute())},
            grace_s=limits.grace_s,
            on_tick=progress.tick,
            num_devices=limits.nproc_per_node if limits.launcher == "local" else 0,  # schedulers hand out their own
        )
    else:
        _train_here(job, base, data, on_tick=progress.tick)
    progress.tick(now=True)


def _train_here(job: Job, base: ArtifactRef, data: ArtifactRef, *, on_tick: Callable[[], None]) -> None:
    run_file = job.stage_dir / "run.yaml"
    run_file.write_text(yaml.safe_dump(job.run.model_dump(mode="json"), sort_keys=False))
    limits = job.run.launch
    num_ranks, num_cores = limits.nproc_per_node, len(os.sched_getaffinity(0))
    launch_until_complete(
        job,
        [
            # The address keeps torchrun from asking what the host is called, which not every host can answer.
            job.interpreter, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
            "--nproc_per_node", str(num_ranks), "--log-dir", str(job.stage_dir / "torchrun"),
            "-m", "mcore.train", str(run_file),
            "--base", base.path, "--data", data.path, "--output", str(job.output),
        ],
        env={
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores // num_ranks)),
            # torchrun has to be through with its ranks when its own grace ends.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, int(limits.grace_s - min(10, limits.grace_s / 4)))),
        },
        grace_s=limits.grace_s,
        stall_timeout_s=limits.stall_timeout_s,
        progress=[job.output / METRICS_FILE, job.output],
        on_tick=on_tick,
        num_devices=num_ranks,
    )  # fmt: skip


def launch_until_complete(job: Job, argv: list[str], **options: Any) -> None:
    """Start training, and start it again as often as it saves and leaves before its end; that is no failure of it.

    Training leaves so at the end of `train.exit_duration_in_mins`, and if its processes are asked to stop by somebody
    else than this run.

    Args:
        job: The stage's.
        argv: The command.
        options: As in `mcore.launch.run`.

    Raises:
        TrainingError: It left without a checkpoint further on than the one that it had begun with.
    """
    while True:
        begun_at = read_tracker(job.output)
        try:
            job.launch(argv, **options)
        except StoppedError as stopped:
            if read_tracker(job.output) == begun_at:
                problem = Problem(
                    str(job.output),
                    "a checkpoint further on after each start",
                    f"iteration {begun_at} again" if begun_at is not None else "none",
                    "Give it more time (train.exit_duration_in_mins), or find out what stops it.",
                )
                raise TrainingError("training makes no progress between its stops", [problem]) from stopped
            job.say(f"{stopped.summary}; training is started again")
        else:
            return
