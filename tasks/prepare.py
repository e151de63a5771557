"""`prepare`: the run's rows as tokens, made once, with a report on them."""

from __future__ import annotations

import yaml

from mcore.artifacts import ArtifactRef
from tasks.stage import Job, stage


@stage("prepare")
def prepare(job: Job, *, hf: ArtifactRef) -> None:
    """Training and validation rows, checked and tokenised by the base model's template, and the data report."""
    run_file = job.stage_dir / "run.yaml"
    run_file.write_text(yaml.safe_dump(job.run.model_dump(mode="json"), sort_keys=False))
    job.python("mcore.data.prepare", run_file, "--hf", hf.path, "--output", job.output, "--overwrite")
