"""`verify_served`: the proof that vLLM serves what was trained, prompt by prompt and probability by probability."""

from __future__ import annotations

import yaml

from mcore.artifacts import ArtifactRef
from mcore.folders import remove
from tasks.stage import Job, stage


@stage("verify_served")
def verify_served(
    job: Job, *, model: ArtifactRef, base: ArtifactRef, proof: ArtifactRef, adapter: ArtifactRef | None = None
) -> None:
    """Proof that the exported model in vLLM is the one that was trained: real prompts' tokens, then log-probabilities.

    The first half runs where training does, with transformers; the second in vLLM's environment.
    """
    wanted = job.run.evaluate
    assert wanted is not None, "the graph has no such proof without the group"
    run_file, reference = job.stage_dir / "run.yaml", job.stage_dir / "reference"
    run_file.write_text(yaml.safe_dump(job.run.model_dump(mode="json"), sort_keys=False))
    beside = [] if adapter is None else ["--adapter", adapter.path]
    job.python(
        "mcore.evaluate.served", "reference", run_file, "--model", model.path, *beside, "--tokenizer", base.path,
        "--torch-dtype", wanted.torch_dtype,
        "--num-prompts", wanted.num_served_prompts, *(["--template-is-served"] if adapter is None else []),
        "--output", reference, "--overwrite",
    )  # fmt: skip
    check = [
        wanted.python, "-m", "mcore.evaluate.served", "check", "--reference", reference,
        "--model", model.path, *beside,
        "--torch-dtype", wanted.torch_dtype,
        "--max-model-len", wanted.max_model_len,
        "--tensor-parallel-size", wanted.tensor_parallel_size,
        "--output", job.output, "--overwrite",
    ]  # fmt: skip
    job.launch([str(word) for word in check], num_devices=wanted.tensor_parallel_size)
    remove(reference)
    run_file.unlink()
