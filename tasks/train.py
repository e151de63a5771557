"""`train`: from the proven base to tuned checkpoints, on as many processes as the run asks for."""

from __future__ import annotations

import os

import yaml

from mcore.artifacts import ArtifactRef
from tasks.progress import TrainingProgress
from tasks.stage import Job, stage

SAVE_GRACE_S = 120.0
"""Seconds to finish a step and save it after a cancel; given by the supervisor, even if the flow is gone by then."""


@stage("train")
def train(job: Job, *, base: ArtifactRef, proof: ArtifactRef) -> None:
    """Tuned checkpoints, metrics and TensorBoard. Goes on from the newest checkpoint that an earlier attempt saved."""
    run_file = job.stage_dir / "run.yaml"
    run_file.write_text(yaml.safe_dump(job.run.model_dump(mode="json"), sort_keys=False))
    num_ranks, num_cores = job.run.launch.nproc_per_node, len(os.sched_getaffinity(0))
    progress = TrainingProgress(job)
    job.launch(
        [
            # The address keeps torchrun from asking what the host is called, which not every host can answer.
            job.interpreter, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
            "--nproc_per_node", str(num_ranks), "--log-dir", str(job.stage_dir / "torchrun"),
            "-m", "mcore.train", str(run_file), "--base", base.path, "--output", str(job.output),
        ],
        env={
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, num_cores // num_ranks)),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(SAVE_GRACE_S) - 10),
        },
        grace_s=SAVE_GRACE_S,
        on_tick=progress.tick,
    )  # fmt: skip
    progress.tick(now=True)
