"""vLLM, started offline in this process: greedy answers, and log-probabilities of given tokens.

The engine core runs inside the calling process and always eagerly: it starts in seconds, nothing is compiled, and with
one GPU or a CPU there is no other process that could be left behind.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mcore.bridge.hf_config import max_served_tokens
from mcore.data.template import RENDER_DATE
from mcore.errors import EvaluationError, Problem
from mcore.progress import progress, say

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Messages = list[dict[str, str]]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # a model is always a local folder here
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # compiles at start, and greedy answers do not sample
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "OMP_WAIT_POLICY": "passive",  # spinning threads cost two thirds of the speed where cores are shared
}
CHANGEABLE_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM on a CPU asks for nine tenths of the machine's memory
}


MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be made ready for. Source: vLLM 0.32 `config/lora.py`."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is started with.

    Attributes:
        model: Hugging Face folder.
        adapter: Folder of a PEFT adapter that answers are given with; None for the model as it is.
        torch_dtype: Dtype of weights and computation; `auto` is the one that the folder's `config.json` names.
        max_model_len: Tokens: the longest prompt and answer together.
        tensor_parallel_size: GPUs to divide the model over.
        seed: vLLM's seed. Greedy answers do not depend on it.
    """

    model: Path
    torch_dtype: Dtype = "auto"
    max_model_len: int = 1024
    tensor_parallel_size: int = 1
    seed: int = 0
    adapter: Path | None = None

    def problems(self) -> list[Problem]:
        """Everything that keeps the folder from being served like this, as far as its `config.json` tells."""
        path = self.model / "config.json"
        try:
            config = json.loads(path.read_text())
            limit = max_served_tokens(config)
        except (OSError, ValueError, AttributeError) as exc:
            return [Problem(str(path), "the configuration of a Hugging Face model", str(exc))]
        found = []
        if not any(self.model.glob("*.safetensors")):
            found.append(Problem(str(self.model), "weights in *.safetensors", "none"))
        if self.torch_dtype == "auto" and _dtype_of(config) not in ("float32", "bfloat16", "float16"):
            found.append(
                Problem(
                    f"{path}: dtype", "float32, bfloat16 or float16", repr(_dtype_of(config)), "Pass --torch-dtype."
                )
            )
        if limit is not None and self.max_model_len > limit:
            expected = f"at most {limit} (max_position_embeddings of the model, and its rope factor)"
            found.append(Problem(f"--max-model-len {self.max_model_len}", expected))
        return found + self._adapter_problems()

    def _adapter_problems(self) -> list[Problem]:
        if self.adapter is None:
            return []
        path = self.adapter / "adapter_config.json"
        try:
            rank = json.loads(path.read_text())["r"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            return [Problem(str(path), "PEFT's config of a LoRA adapter", repr(exc))]
        if rank > MAX_LORA_RANKS[-1]:
            return [Problem(f"{path}: r", f"at most {MAX_LORA_RANKS[-1]}, which is all that vLLM serves", str(rank))]
        return []

    @property
    def lora_options(self) -> dict[str, Any]:
        """What vLLM is started with for the adapter."""
        if self.adapter is None:
            return {}
        rank = json.loads((self.adapter / "adapter_config.json").read_text())["r"]
        return {"enable_lora": True, "max_lora_rank": next(size for size in MAX_LORA_RANKS if size >= rank)}

    @property
    def resolved_dtype(self) -> str:
        """The dtype by name. vLLM's own `auto` would turn a float32 checkpoint into 16 bits."""
        if self.torch_dtype != "auto":
            return self.torch_dtype
        return str(_dtype_of(json.loads((self.model / "config.json").read_text())))


def _dtype_of(config: dict[str, Any]) -> str | None:
    return config.get("dtype") or config.get("torch_dtype")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one conversation.

    Attributes:
        text: The answer without special tokens.
        token_ids: The answer's tokens, the end token included if the model came to its end.
        prompt_token_ids: What the chat template made of the conversation.
        finish_reason: `stop`, or `length` where `max_tokens` cut the answer.
        first_token_s: Seconds from asking to the first token, those of waiting for other questions included.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    first_token_s: float | None = None


def prepare_environment() -> None:
    """Set what vLLM and its threads read from the environment. Before torch is imported, or it has no effect."""
    os.environ.update(ENVIRONMENT)
    for name, value in CHANGEABLE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class Engine:
    """A started vLLM. Made by `start_engine`."""

    def __init__(self, llm: LLM, vllm_version: str, device: str, adapter: Path | None = None) -> None:
        self._llm = llm
        self._lora: dict[str, Any] = {}
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._lora = {"lora_request": LoRARequest("adapter", 1, str(adapter))}
        self.vllm_version = vllm_version
        self.device = device

    def chat(self, conversations: Sequence[Messages], *, max_tokens: int) -> list[Answer]:
        """Greedy answers, by the chat template in the model's folder.

        Args:
            conversations: Each ends with the user's turn.
            max_tokens: Tokens: the longest answer.

        Raises:
            EvaluationError: vLLM failed, or the model's logits are not numbers.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=0)
        with progress("answer", len(conversations), "prompts") as advance:
            outputs = _of_vllm(
                "vLLM could not answer",
                lambda: self._llm.chat(
                    conversations,
                    params,
                    use_tqdm=_bar(advance),
                    chat_template_kwargs={"strftime_now": RENDER_DATE.strftime},
                    **self._lora,
                ),
            )
        answers = []
        for output in outputs:
            best = output.outputs[0]
            _refuse_nan(best.logprobs[place][token_id].logprob for place, token_id in enumerate(best.token_ids))
            answers.append(
                Answer(
                    best.text,
                    list(best.token_ids),
                    list(output.prompt_token_ids),
                    str(best.finish_reason),
                    output.metrics.first_token_latency if output.metrics else None,
                )
            )
        return answers

    def rendered(self, asked: Mapping[str, Any]) -> list[int]:
        """Tokens that the chat template in the model's folder makes of a conversation, as a server renders it.

        Args:
            asked: `messages`, and where there are any `tools`, `chat_template_kwargs` and `chat_template`.

        Raises:
            EvaluationError: vLLM or the template does not take it.
        """
        from vllm import SamplingParams

        (output,) = _of_vllm(
            "vLLM could not render a prompt",
            lambda: self._llm.chat(
                [list(asked["messages"])],
                SamplingParams(temperature=0.0, max_tokens=1),
                use_tqdm=False,
                chat_template=asked.get("chat_template"),
                tools=list(asked.get("tools") or ()) or None,
                chat_template_kwargs={"strftime_now": RENDER_DATE.strftime, **asked.get("chat_template_kwargs", {})},
                **self._lora,
            ),
        )
        return list(output.prompt_token_ids)

    def token_logprobs(self, sequences: Sequence[Sequence[int]], what: str = "perplexity") -> list[list[float]]:
        """For each sequence the log-probability (nats) of its tokens from the second on, each given those before it.

        Args:
            sequences: Token ids; at most `max_model_len - 1` each, as vLLM always generates one token more.
            what: What they are for, in lines of progress.

        Raises:
            EvaluationError: vLLM failed, or the model's logits are not numbers.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        # vLLM 0.32 can't give the prompts' log-probabilities of several sequences at once beside an adapter.
        batches = [[ids] for ids in sequences] if self._lora else [sequences]
        outputs: list[RequestOutput] = []
        with progress(what, len(sequences), "rows") as advance:
            for batch in batches:
                prompts = [{"prompt_token_ids": list(ids)} for ids in batch]
                outputs += _of_vllm(
                    "vLLM could not compute log-probabilities",
                    partial(self._llm.generate, prompts, params, use_tqdm=_bar(advance), **self._lora),
                )
        found = [
            [position[token_id].logprob for position, token_id in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, sequences, strict=True)
        ]
        for logprobs in found:
            _refuse_nan(logprobs)
        return found


@contextmanager
def start_engine(settings: EngineSettings) -> Iterator[Engine]:
    """Start vLLM for the block, and end it with all it started however the block ends.

    `prepare_environment` must have been called before.

    Raises:
        EvaluationError: vLLM is not installed here, or can't load the model.
    """
    try:
        import vllm
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.platforms import current_platform
    except ImportError as exc:
        raise EvaluationError(
            "vLLM can't be imported",
            [Problem(str(exc), fix="Run this with the interpreter of vLLM's own environment (.venv-vllm).")],
        ) from exc
    dtype = settings.resolved_dtype
    device = str(current_platform.device_type)
    beside = "" if settings.adapter is None else f" with {settings.adapter}"
    say(f"start vLLM {vllm.__version__} on {device}, {dtype}: {settings.model}{beside}")
    llm = None
    try:
        llm = _of_vllm(
            f"vLLM could not start with {settings.model}",
            lambda: vllm.LLM(
                model=str(settings.model),
                dtype=dtype,
                max_model_len=settings.max_model_len,
                tensor_parallel_size=settings.tensor_parallel_size,
                seed=settings.seed,
                enforce_eager=True,
                use_tqdm_on_load=False,
                disable_log_stats=False,  # times of first tokens; what would be logged is below the log's level
                **settings.lora_options,
            ),
        )
        yield Engine(llm, vllm.__version__, device, settings.adapter)
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def _of_vllm(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as exc:  # vLLM raises whatever torch, transformers or pydantic raise below it
        fix = "VLLM_LOGGING_LEVEL=INFO shows vLLM's own log."
        raise EvaluationError(what, [Problem(f"{type(exc).__name__}: {exc}", fix=fix)]) from exc


def _refuse_nan(logprobs: Iterator[float] | Sequence[float]) -> None:
    if any(math.isnan(logprob) for logprob in logprobs):
        raise EvaluationError(
            "the model can't be judged",
            [Problem("its logits", "numbers", "NaN", "Its weights are damaged, or its values do not fit the dtype.")],
        )


def _bar(advance: Callable[[int], None]) -> Callable[..., Any]:
    """Our progress in the shape of the tqdm bar that vLLM moves."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        monitor_interval = 0  # no thread that watches the bar

        def update(self, n: float = 1) -> None:
            if self.desc.startswith("Processed"):  # vLLM also counts the rendering of prompts
                advance(int(n))
            super().update(n)

    return partial(Bar, file=io.StringIO())
