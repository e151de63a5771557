"""`select`: which checkpoint of the training run goes on. Reads file lengths, so it needs no process of its own."""

from __future__ import annotations

import json
from pathlib import Path

from mcore.artifacts import ArtifactRef
from mcore.select import select_checkpoint
from tasks.stage import METRICS, Job, stage


@stage("select")
def select(job: Job, *, trained: ArtifactRef) -> None:
    """Iteration of the checkpoint that goes on, and why that one."""
    wanted = job.run.select
    chosen = select_checkpoint(Path(trained.path), wanted.strategy, wanted.iteration)
    job.say(f"iteration {chosen.iteration}: {chosen.reason}")
    job.output.mkdir(parents=True, exist_ok=True)
    (job.output / METRICS).write_text(json.dumps({"iteration": chosen.iteration, "reason": chosen.reason}) + "\n")
