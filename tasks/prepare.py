"""`prepare`: the run's rows as tokens, made once, with a report on them."""

from __future__ import annotations

import yaml

from mcore.artifacts import ArtifactRef
from mcore.data.sources.identity import pinned
from tasks.stage import Job, stage


@stage("prepare")
def prepare(job: Job, *, hf: ArtifactRef) -> None:
    """Training and validation rows, checked and tokenised by the base model's template, and the data report."""
    run_file = job.stage_dir / "run.yaml"
    run = job.run.model_dump(mode="json")
    for name in ("dataset", "val_dataset"):
        # What the key was made of, and not what a hub has by now.
        run["data"][name] = [pinned(entry) for entry in run["data"][name]]
    run_file.write_text(yaml.safe_dump(run, sort_keys=False))
    job.python("mcore.data.prepare", run_file, "--hf", hf.path, "--output", job.output, "--overwrite")
