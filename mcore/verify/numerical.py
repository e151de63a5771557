"""T1 and T2: logits of transformers and of megatron-core on the same tokens, at every position.

The megatron side is what training would start from: a model of `mcore.backend` with the weights that megatron-core's
own `dist_checkpointing` loads from the checkpoint's files. One model is in memory at a time; of the first one only its
outputs stay (tokens x (2 x layers + 2) x hidden x 4 bytes, and tokens x vocabulary x 4 bytes).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel

from mcore.backend.layout import Layout
from mcore.backend.load import load_weights, padded_vocab_size
from mcore.backend.model import build_model
from mcore.backend.parallel import device
from mcore.errors import CheckpointError
from mcore.progress import progress, say
from mcore.verify.adapted import Adapted
from mcore.verify.compare import hidden_error, logit_gap
from mcore.verify.experts import MAX_EXTRA, ExpertCount
from mcore.verify.lengths import unreached_lengths
from mcore.verify.noise import relative_noise
from mcore.verify.prompts import Prompt, PromptSet, extra_prompt
from mcore.verify.report import NoiseResult, NumericalResult, PointResult, PromptResult, worst
from mcore.verify.traces import HEAD, Trace, hf_traces, load_hf_model, mcore_traces


@dataclass(frozen=True, slots=True)
class Reference:
    """What a transformers model computes on every prompt, and which experts the prompts did not reach, by layer.

    `pad_token_id` is the model's own, which has a default where `config.json` says nothing.
    """

    prompts: PromptSet
    traces: Sequence[Trace]
    num_experts: int = 0
    unreached: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    pad_token_id: int | None = None


def trace_hf(
    hf: Path, prompts: PromptSet, *, vocab_size: int, num_experts: int = 0, adapter: Path | None = None
) -> Reference:
    """What the transformers model of a folder computes on every prompt. The model is freed before this returns.

    Args:
        hf: Hugging Face folder.
        prompts: The prompts; more are added while a mixture-of-experts model has experts that none reaches.
        vocab_size: Rows of the embedding, without padding.
        num_experts: Experts of each mixture-of-experts layer; 0 if the model has none.
        adapter: Folder of an adapter that PEFT puts on it.

    Raises:
        ConfigError: transformers can't load the folder, or PEFT the adapter, or not all of it.
    """
    model = load_hf_model(hf, device(), adapter=adapter)
    count = ExpertCount(model, num_experts)
    traces: list[Trace] = []
    with progress("logits of transformers", len(prompts.prompts), "prompts") as advance, count.counting():
        for trace in hf_traces(model, prompts.prompts, device()):
            traces.append(trace)
            advance(1)
        extra: list[Prompt] = []
        while count.unreached() and len(extra) < MAX_EXTRA:
            extra.append(extra_prompt(len(extra), prompts, vocab_size=vocab_size))
            traces += hf_traces(model, extra[-1:], device())
    pad_token_id = getattr(model.config, "pad_token_id", None)
    del model
    gc.collect()  # a model is a graph with cycles; the next one may need its memory
    if extra:
        say(f"verify: {len(extra)} prompts were added to reach more of the experts")
    all_prompts = replace(prompts, prompts=(*prompts.prompts, *extra))
    return Reference(all_prompts, traces, num_experts, count.unreached(), pad_token_id)


def compare_with_mcore(
    reference: Reference,
    *,
    config: Mapping[str, Any],
    iteration_dir: Path,
    max_relative_error: float,
    rounded_to: str | None = None,
    adapted: Adapted | None = None,
) -> NumericalResult:
    """Run the checkpoint's model on the same prompts and compare, prompt by prompt.

    Process groups must be running (`mcore.backend.parallel`) with TP and PP of 1.

    Args:
        reference: What `trace_hf` gave.
        config: `config.json` of the checkpoint's side: what training builds the model from.
        iteration_dir: Folder of one iteration of the checkpoint.
        max_relative_error: The gate.
        rounded_to: Dtype (torch's name) that the checkpoint's weights are rounded to before they are used: what an
            export with a dtype of its own did to them.
        adapted: Adapters that count on top of the checkpoint's weights.

    Raises:
        ConfigError: megatron-core can't build a model of this config.
    """
    start = time.monotonic()
    results: list[PromptResult] = []
    errors: list[dict[str, float]] = []
    not_loaded: tuple[str, ...] = ()
    try:
        model = _mcore_model(config, iteration_dir, torch.float32, rounded_to, adapted)
    except CheckpointError as error:  # the folder is complete, so these weights do not make this model
        not_loaded = tuple(str(problem) for problem in error.problems) or (error.summary,)
    else:
        prompts = reference.prompts.prompts
        with progress("logits of megatron-core", len(prompts), "prompts") as advance:
            found = mcore_traces(model, prompts, device(), pad_token_id=reference.pad_token_id)
            for hf, mcore in zip(reference.traces, found, strict=True):
                result = PromptResult(
                    prompt=hf.prompt.name,
                    num_tokens=len(hf.prompt.token_ids),
                    **asdict(logit_gap(hf.logits, mcore.logits)),
                )
                results.append(result)
                errors.append(_hidden_errors(hf, mcore) | {HEAD: result.relative_error})
                advance(1)
    return NumericalResult(
        max_relative_error=max_relative_error,
        prompt_source=reference.prompts.source,
        prompt_digest=reference.prompts.digest,
        device=device().type,
        rounded_to=rounded_to,
        not_loaded=not_loaded,
        unreached_lengths=unreached_lengths(config, max(len(trace.prompt.token_ids) for trace in reference.traces)),
        num_experts=reference.num_experts,
        unreached_experts=dict(reference.unreached),
        prompts=tuple(results),
        points=tuple(
            PointResult(point=name, relative_error=worst(of_prompt[name] for of_prompt in errors))
            for name in (errors[0] if errors else ())
        ),
        seconds=round(time.monotonic() - start, 3),
    )


def compare_noise(
    reference: Reference,
    *,
    hf: Path,
    adapter: Path | None = None,
    config: Mapping[str, Any],
    iteration_dir: Path,
    dtype: Literal["bfloat16", "float16"],
    max_noise_ratio: float,
    adapted: Adapted | None = None,
) -> NoiseResult:
    """T2: how far both models are from the fp32 logits in a dtype. Process groups must be running.

    Args:
        reference: What `trace_hf` gave: fp32.
        hf: Hugging Face folder.
        adapter: Folder of an adapter that PEFT puts on it.
        config: `config.json` of the checkpoint's side.
        iteration_dir: Folder of one iteration of the checkpoint, whose weights megatron-core can load.
        dtype: Of weights and activations.
        max_noise_ratio: The gate: megatron-core's noise over that of transformers.
        adapted: Adapters that count on top of the checkpoint's weights.
    """
    start = time.monotonic()
    prompts, torch_dtype = reference.prompts.prompts, getattr(torch, dtype)
    fp32 = [trace.logits for trace in reference.traces]

    def noise(side: str, traces: Iterator[Trace]) -> float:
        logits = []
        with progress(f"{dtype} logits of {side}", len(prompts), "prompts") as advance:
            for trace in traces:
                logits.append(trace.logits)
                advance(1)
        gc.collect()
        return relative_noise(fp32, logits)

    hf_model = load_hf_model(hf, device(), torch_dtype, adapter=adapter)
    hf_noise = noise("transformers", hf_traces(hf_model, prompts, device(), with_points=False))
    del hf_model
    model = _mcore_model(config, iteration_dir, torch_dtype, adapted=adapted)
    pad_token_id = config.get("pad_token_id")
    found = mcore_traces(model, prompts, device(), with_points=False, pad_token_id=pad_token_id)
    mcore_noise = noise("megatron-core", found)
    return NoiseResult(
        dtype=dtype,
        hf_noise=hf_noise,
        mcore_noise=mcore_noise,
        max_noise_ratio=max_noise_ratio,
        seconds=round(time.monotonic() - start, 3),
    )


@torch.no_grad()
def _mcore_model(
    config: Mapping[str, Any],
    iteration_dir: Path,
    dtype: torch.dtype,
    rounded_to: str | None = None,
    adapted: Adapted | None = None,
) -> GPTModel:
    model = build_model(
        config,
        padded_vocab_size=padded_vocab_size(iteration_dir),
        layout=Layout(),
        params_dtype=dtype,
        backend="torch",  # the same arithmetic on every machine; Transformer Engine's is no fp32 reference
    )
    load_weights(model, iteration_dir)
    if adapted is not None:
        adapted.into(model, config)
    if rounded_to:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, rounded_to)))
    return model.eval()


def _hidden_errors(hf: Trace, mcore: Trace) -> dict[str, float]:
    return {name: hidden_error(hf_SH, mcore.points[name]) for name, hf_SH in hf.points.items()}
