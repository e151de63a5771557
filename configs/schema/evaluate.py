"""`evaluate`: base and tuned model in vLLM, and the gate that compares them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.schema.base import StrictModel


class EvaluateConfig(StrictModel):
    """Evaluation of base and tuned model on the same prompts with the same engine settings."""

    suite: str
    """File with prompts and expectations (`configs/suites/*.yaml`)."""
    perplexity_dataset: tuple[str, ...] = ()
    """Held-out rows for perplexity on the assistant's tokens, as in `data.dataset`."""
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype that vLLM computes in; `auto` is the dtype of the checkpoint."""
    max_model_len: int = Field(default=1024, ge=32)
    """Tokens: the longest prompt and answer together."""
    max_tokens: int = Field(default=64, ge=1)
    """Tokens: the longest answer."""
    min_pass_rate: float | None = Field(default=None, ge=0, le=1)
    """Gate: smallest fraction of the suite's cases that the tuned model must pass."""
    max_regression: float | None = Field(default=None, ge=0, le=1)
    """Gate: largest loss of pass rate, against the base, in any group of the suite."""
    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    """Gate: largest perplexity, in multiples of the base's, of any perplexity set that the suite marks with
    `forgetting`; of any set, held-out rows included, if it marks none."""
    worse_confidence: float | None = Field(default=None, ge=0.5, lt=1)
    """Gate: fails if the tuned model is worse than the base with this confidence (0.95 is usual) in any group that the
    suite marks with `forgetting`; in any group if it marks none. By McNemar's exact test on the differing cases."""
    num_served_prompts: int = Field(default=0, ge=0)
    """Real prompts of the run's data that vLLM must render as training does, and find as probable as transformers does,
    before the tuned model is judged (`verify_served`); 0 leaves this proof out."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that vLLM divides the model over."""
    python: str = ".venv-vllm/bin/python"
    """Interpreter of the environment that vLLM is installed in. Does not change the result, so it is in no key."""
