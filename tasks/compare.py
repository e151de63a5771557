"""`compare`: the tuned model against the base, and the gate on it."""

from __future__ import annotations

from mcore.artifacts import ArtifactRef
from tasks.stage import Job, stage


@stage("compare")
def compare(job: Job, *, base: ArtifactRef, tuned: ArtifactRef) -> None:
    """Table of base against tuned; fails if the tuned model is not good enough."""
    assert job.run.evaluate is not None
    limits = {
        "--min-pass-rate": job.run.evaluate.min_pass_rate,
        "--max-regression": job.run.evaluate.max_regression,
        "--max-perplexity-ratio": job.run.evaluate.max_perplexity_ratio,
        "--worse-confidence": job.run.evaluate.worse_confidence,
    }
    options = [word for option, value in limits.items() if value is not None for word in (option, value)]
    job.python(
        "mcore.evaluate", "compare", "--base", base.path, "--tuned", tuned.path, "--output", job.output, "--overwrite",
        *options,
    )  # fmt: skip
