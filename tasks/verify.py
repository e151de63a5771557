"""`verify_convert` and `verify_export`: the proof behind each conversion, and the gate."""

from __future__ import annotations

from mcore.artifacts import ArtifactRef
from tasks.stage import Job, stage


@stage("verify_convert")
def verify_convert(job: Job, *, hf: ArtifactRef, mcore: ArtifactRef) -> None:
    """Proof that the converted base is the base: bit equality on disk, then logits."""
    _verify(job, hf, mcore)


@stage("verify_export")
def verify_export(
    job: Job,
    *,
    hf: ArtifactRef,
    mcore: ArtifactRef,
    selection: ArtifactRef,
    base: ArtifactRef,
    adapter: ArtifactRef | None = None,
) -> None:
    """Proof that the exported model is the chosen checkpoint: bit equality on disk, then logits.

    Of an adapter that was exported by itself, `hf` is the base model that it counts on top of.
    """
    trained_on = ["--base", base.path] if job.run.train.tuner_type == "lora" else []
    beside = [] if adapter is None else ["--adapter", adapter.path]
    _verify(job, hf, mcore, "--iteration", selection.metrics["iteration"], *trained_on, *beside)


def _verify(job: Job, hf: ArtifactRef, mcore: ArtifactRef, *options: str | int) -> None:
    limits = job.run.verify
    job.python(
        "mcore.verify", "--hf", hf.path, "--mcore", mcore.path, *options, "--output", job.output, "--overwrite",
        "--max-relative-error", limits.max_relative_error,
        "--num-prompts", limits.num_prompts,
        "--max-prompt-tokens", limits.max_prompt_tokens,
        "--dtype", limits.dtype,
        "--max-noise-ratio", limits.max_noise_ratio,
    )  # fmt: skip
