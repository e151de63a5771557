"""`convert`: Hugging Face to megatron-core."""

from __future__ import annotations

from mcore.artifacts import ArtifactRef
from tasks.stage import Job, stage


@stage("convert")
def convert(job: Job, *, hf: ArtifactRef) -> None:
    """Base model as a megatron-core checkpoint (`release/`)."""
    divisor = job.run.convert.make_vocab_size_divisible_by
    job.python(
        "mcore.bridge", "convert", "--hf", hf.path, "--output", job.output, "--overwrite",
        "--make-vocab-size-divisible-by", divisor, "--workers", job.run.convert.workers,
    )  # fmt: skip
