"""T1: fp32 logits of transformers and of megatron-core on the same tokens, at every position.

The megatron side is what training would start from: a model of `mcore.backend` with the weights that megatron-core's
own `dist_checkpointing` loads from the checkpoint's files. One model is in memory at a time; of the first one only its
outputs stay (tokens x (2 x layers + 2) x hidden x 4 bytes, and tokens x vocabulary x 4 bytes).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from mcore.backend.layout import Layout
from mcore.backend.load import load_weights, padded_vocab_size
from mcore.backend.model import build_model
from mcore.backend.parallel import device
from mcore.errors import CheckpointError
from mcore.progress import progress
from mcore.verify.compare import hidden_error, logit_gap
from mcore.verify.prompts import PromptSet
from mcore.verify.report import NumericalResult, PointResult, PromptResult, worst
from mcore.verify.traces import HEAD, Trace, hf_traces, load_hf_model, mcore_traces


def trace_hf(hf: Path, prompts: PromptSet) -> list[Trace]:
    """What the transformers model of a folder computes on every prompt. The model is freed before this returns.

    Raises:
        ConfigError: transformers can't load the folder, or not all of it.
    """
    traces = []
    with progress("logits of transformers", len(prompts.prompts), "prompts") as advance:
        for trace in hf_traces(load_hf_model(hf, device()), prompts, device()):
            traces.append(trace)
            advance(1)
    gc.collect()  # a model is a graph with cycles; the next one may need its memory
    return traces


def compare_with_mcore(
    reference: Sequence[Trace],
    prompts: PromptSet,
    *,
    config: Mapping[str, Any],
    iteration_dir: Path,
    max_relative_error: float,
    rounded_to: str | None = None,
) -> NumericalResult:
    """Run the checkpoint's model on the same prompts and compare, prompt by prompt.

    Process groups must be running (`mcore.backend.parallel`) with TP and PP of 1.

    Args:
        reference: What `trace_hf` gave for these prompts.
        prompts: The prompts.
        config: `config.json` of the checkpoint's side: what training builds the model from.
        iteration_dir: Folder of one iteration of the checkpoint.
        max_relative_error: The gate.
        rounded_to: Dtype (torch's name) that the checkpoint's weights are rounded to before they are used: what an
            export with a dtype of its own did to them.

    Raises:
        ConfigError: megatron-core can't build a model of this config.
    """
    start = time.monotonic()
    results: list[PromptResult] = []
    errors: list[dict[str, float]] = []
    not_loaded: tuple[str, ...] = ()
    try:
        model = _mcore_model(config, iteration_dir, rounded_to)
    except CheckpointError as error:  # the folder is complete, so these weights do not make this model
        not_loaded = tuple(str(problem) for problem in error.problems) or (error.summary,)
    else:
        with progress("logits of megatron-core", len(prompts.prompts), "prompts") as advance:
            for hf, mcore in zip(reference, mcore_traces(model, prompts, device()), strict=True):
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
        prompt_source=prompts.source,
        prompt_digest=prompts.digest,
        device=device().type,
        rounded_to=rounded_to,
        not_loaded=not_loaded,
        prompts=tuple(results),
        points=tuple(
            PointResult(point=name, relative_error=worst(of_prompt[name] for of_prompt in errors))
            for name in (errors[0] if errors else ())
        ),
        seconds=round(time.monotonic() - start, 3),
    )


@torch.no_grad()
def _mcore_model(config: Mapping[str, Any], iteration_dir: Path, rounded_to: str | None) -> GPTModel:
    model = build_model(
        config,
        padded_vocab_size=padded_vocab_size(iteration_dir),
        layout=Layout(),
        params_dtype=torch.float32,
        backend="torch",  # the same arithmetic on every machine; Transformer Engine's is no fp32 reference
    )
    load_weights(model, iteration_dir)
    if rounded_to:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, rounded_to)))
    return model.eval()


def _hidden_errors(hf: Trace, mcore: Trace) -> dict[str, float]:
    return {name: hidden_error(hf_SH, mcore.points[name]) for name, hf_SH in hf.points.items()}
