"""`export`: megatron-core to Hugging Face."""

from __future__ import annotations

from mcore.artifacts import ArtifactRef
from tasks.stage import Job, stage


@stage("export")
def export(job: Job, *, trained: ArtifactRef, selection: ArtifactRef, base: ArtifactRef) -> None:
    """Chosen checkpoint as a Hugging Face folder, or as a PEFT adapter.

    Adapters are merged into the base that they were trained on, unless `export.merge_lora` says otherwise.
    """
    wanted = job.run.export
    merged_into = ["--base", base.path] if job.run.train.tuner_type == "lora" else []
    job.python(
        "mcore.bridge", "export", "--checkpoint", trained.path, "--iteration", selection.metrics["iteration"],
        *merged_into, *([] if wanted.merge_lora else ["--no-merge-lora"]), "--output", job.output, "--overwrite",
        "--torch-dtype", wanted.torch_dtype, "--max-shard-size-gb", wanted.max_shard_size_gb,
        "--workers", wanted.workers,
    )  # fmt: skip
