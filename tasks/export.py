"""`export`: megatron-core to Hugging Face."""

from __future__ import annotations

from configs.schema.data import DataConfig
from configs.schema.placeholders import fill_placeholders, placeholder_values
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
        *([] if not wanted.merge_lora else _served(job.run.data)),
    )  # fmt: skip


def _served(data: DataConfig) -> list[str]:
    """What a server is to do as training did, though nobody tells it."""
    words = []
    if data.system is not None:
        filled = fill_placeholders(data.system, placeholder_values(data.model_name, data.model_author))
        words.append(f"--system={filled}")  # in one word, as it may begin with a dash
    if data.enable_thinking is not None:
        words.append("--enable-thinking" if data.enable_thinking else "--no-enable-thinking")
    return words if data.template is None else [*words, "--template", data.template]
