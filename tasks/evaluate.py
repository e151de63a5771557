"""`evaluate_base` and `evaluate_tuned`: the same suite in vLLM, which lives in an environment of its own."""

from __future__ import annotations

from configs.schema.evaluate import EvaluateConfig
from configs.schema.placeholders import in_language
from configs.schema.run import RunConfig
from mcore.artifacts import ArtifactRef
from tasks.stage import Job, stage


def _evaluation(run: RunConfig) -> EvaluateConfig:
    assert run.evaluate is not None, "the graph has no evaluation without the group"
    return run.evaluate


@stage("evaluate_base", interpreter=lambda run: _evaluation(run).python)
def evaluate_base(job: Job, *, model: ArtifactRef) -> None:
    """Answers and perplexity of the base model."""
    _evaluate(job, model)


@stage("evaluate_tuned", interpreter=lambda run: _evaluation(run).python)
def evaluate_tuned(
    job: Job,
    *,
    model: ArtifactRef,
    proof: ArtifactRef,
    served: ArtifactRef | None = None,
    adapter: ArtifactRef | None = None,
) -> None:
    """Answers and perplexity of the tuned model, exported and proven: merged, or the base with an adapter."""
    _evaluate(job, model, adapter)


def _evaluate(job: Job, model: ArtifactRef, adapter: ArtifactRef | None = None) -> None:
    wanted, data = _evaluation(job.run), job.run.data
    perplexity = [word for file in wanted.perplexity_dataset for word in ("--perplexity", file)]
    system = [] if data.system is None else ["--system", data.system]
    beside = [] if adapter is None else ["--adapter", adapter.path]
    job.python(
        "mcore.evaluate", "run", "--model", model.path, *beside, "--suite", wanted.suite, *perplexity,
        "--method", job.run.train.method,
        "--output", job.output, "--overwrite",
        "--torch-dtype", wanted.torch_dtype,
        "--max-model-len", wanted.max_model_len,
        "--max-tokens", wanted.max_tokens,
        "--tensor-parallel-size", wanted.tensor_parallel_size,
        "--model-name", in_language(data.model_name), "--model-author", in_language(data.model_author), *system,
        num_devices=wanted.tensor_parallel_size,
    )  # fmt: skip
