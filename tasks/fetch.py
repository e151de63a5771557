"""`fetch`: a remote model becomes an ordinary Hugging Face folder. A local folder is used where it is."""

from __future__ import annotations

from tasks.stage import Job, stage


@stage("fetch")
def fetch(job: Job) -> None:
    """Base model from its source, as a Hugging Face folder."""
    planned = job.ingredients["source"]
    job.python(
        "mcore.sources", "fetch", job.run.model.source, "--expect", planned, "--output", job.output, "--overwrite",
        env={"TQDM_DISABLE": "1"},  # bars draw over themselves, which a log does not show
    )  # fmt: skip
