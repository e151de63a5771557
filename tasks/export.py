"""`export`: megatron-core to Hugging Face."""

from __future__ import annotations

from mcore.artifacts import ArtifactRef
from tasks.stage import Job, stage


@stage("export")
def export(job: Job, *, trained: ArtifactRef, selection: ArtifactRef) -> None:
    """Chosen checkpoint as a Hugging Face folder."""
    wanted = job.run.export
    job.python(
        "mcore.bridge", "export", "--checkpoint", trained.path, "--iteration", selection.metrics["iteration"],
        "--output", job.output, "--overwrite",
        "--torch-dtype", wanted.torch_dtype, "--max-shard-size-gb", wanted.max_shard_size_gb,
        "--workers", wanted.workers,
    )  # fmt: skip
