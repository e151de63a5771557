"""All proofs of one Hugging Face folder against one megatron-core checkpoint, and the report of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.adapters import weights_and_adapters
from mcore.bridge.dims import ModelDims
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.further_tokens import config_of_files
from mcore.bridge.hf_config import HF_FOLDER, max_served_tokens, read_hf_config
from mcore.bridge.hf_headers import StoredTensor, read_headers
from mcore.errors import ConfigError, InputError, Problem
from mcore.findings import Findings
from mcore.folders import refuse_existing, whole_folder
from mcore.progress import say
from mcore.select import select_checkpoint
from mcore.verify.adapted import Adapted
from mcore.verify.numerical import Reference, compare_noise, compare_with_mcore, trace_hf
from mcore.verify.page import write_report
from mcore.verify.prompts import prompt_set
from mcore.verify.report import NoiseResult, NumericalResult, VerifyReport, package_versions
from mcore.verify.structural import compare_on_disk


def verify(
    hf: Path,
    mcore: Path,
    output: Path,
    *,
    base: Path | None = None,
    adapter: Path | None = None,
    iteration: int | None = None,
    max_relative_error: float = 1e-4,
    num_prompts: int = 4,
    max_prompt_tokens: int = 96,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    max_noise_ratio: float = 1.25,
    against_peers: bool = False,
    overwrite: bool = False,
) -> VerifyReport:
    """Prove that a Hugging Face folder and a checkpoint are the same model, or write down how they differ.

    The report's folder appears whole, whatever the verdict: `report.json`, `report.md`, `metrics.json`. It is the
    caller's part to act on the verdict (`VerifyReport.raise_if_failed`).

    Args:
        hf: Hugging Face folder: the reference, as transformers runs it.
        mcore: Checkpoint folder with the tracker, the iterations, and `hf/` with the config that training reads.
        output: Folder of the report.
        base: Checkpoint folder that a LoRA run started from, if `mcore` is such a run; its adapters then must be merged
            into the weights of `hf`, unless there is an `adapter`.
        adapter: PEFT adapter's folder, which PEFT puts on top of `hf`; None if `hf` is the whole model.
        iteration: Which iteration; the newest complete one if None.
        max_relative_error: Largest difference of fp32 logits that passes, as a fraction of the Hugging Face logits'
            standard deviation.
        num_prompts: Number of prompts.
        max_prompt_tokens: Tokens: the longest prompt.
        dtype: Dtype of the third proof; `auto` is the one that most of the weights have. float32 leaves it out.
        max_noise_ratio: Noise of megatron-core in that dtype that passes, in multiples of that of transformers.
        against_peers: Whether the page also says what other tools' rules make of the same logits.
        overwrite: Whether an existing `output` is replaced.

    Raises:
        InputError: A folder is missing or damaged, or the architecture can't be built; all that is wrong at once. What
            keeps a proof that comes later from being made is in the report, beside what the earlier ones found.
    """
    refuse_existing(output, overwrite=overwrite)
    torch.set_float32_matmul_precision("highest")  # a GPU's TF32 has ten bits: no fp32 proof
    findings = Findings()
    chosen = findings.of(lambda: select_checkpoint(mcore, "latest" if iteration is None else "iteration", iteration))
    of_hf = findings.of(lambda: read_hf_config(hf))
    stored = findings.of(lambda: read_headers(hf)) if hf.is_dir() else None
    # A checkpoint from elsewhere has no config beside it; then the Hugging Face folder says what model it is.
    beside = findings.of(lambda: read_hf_config(mcore / HF_FOLDER)) if (mcore / HF_FOLDER).is_dir() else of_hf
    if chosen is None or of_hf is None or stored is None or beside is None:
        findings.raise_all()
    config = config_of_files(of_hf, stored)
    mcore_config = config if beside is of_hf else beside
    family, dims = family_of_config(config), dims_of(config)
    say(f"verify: {hf} against {chosen.path}, as {chosen.reason}")
    weights, adapters = weights_and_adapters(mcore, chosen.path, base)
    if adapter is not None and adapters is None:
        problem = Problem(str(mcore), "the checkpoint of a LoRA run", "whole weights", "Leave the adapter out.")
        raise ConfigError("an adapter is compared with adapters", [problem])
    adapted = None
    if adapters is not None:
        dtypes = {name: tensor.dtype for name, tensor in stored.items()}
        adapted = Adapted(adapters, None if adapter is not None else dtypes)
    with whole_folder(output, overwrite=overwrite) as folder:
        structural = compare_on_disk(hf, weights, family=family, dims=dims, adapters=adapters, adapter_folder=adapter)
        say(f"verify: bits on disk are {structural.summary}")
        numerical: NumericalResult | None = None
        noise: NoiseResult | None = None
        logits = Findings()
        reference = None
        if structural.is_loadable:
            max_prompt_tokens = min(max_prompt_tokens, max_served_tokens(config) or max_prompt_tokens)
            reference = logits.of(lambda: _reference(hf, dims, num_prompts, max_prompt_tokens, adapter))
        if reference is not None:
            with parallel_processes(Layout()):
                numerical = logits.of(
                    partial(
                        compare_with_mcore,
                        reference,
                        config=mcore_config,
                        iteration_dir=weights,
                        max_relative_error=max_relative_error,
                        rounded_to=structural.cast_to,
                        adapted=adapted,
                    )
                )
                if numerical is not None:
                    say(f"verify: logits are {'equal' if numerical.passed else 'NOT equal'}, {numerical.summary}")
                noise_dtype = _noise_dtype(stored, dtype)
                if noise_dtype != "float32" and numerical is not None and numerical.passed:
                    noise = logits.of(
                        partial(
                            compare_noise,
                            reference,
                            hf=hf,
                            adapter=adapter,
                            config=mcore_config,
                            iteration_dir=weights,
                            dtype=noise_dtype,
                            max_noise_ratio=max_noise_ratio,
                            adapted=adapted,
                        )
                    )
                if noise is not None:
                    say(f"verify: {noise.summary}")
        report = VerifyReport(
            hf=str(hf),
            mcore=str(chosen.path),
            family=family.name,
            versions=package_versions(),
            structural=structural,
            numerical=numerical,
            noise=noise,
            not_compared=tuple(line for error in logits.errors for line in _lines(error)),
            passed=not logits.errors
            and structural.passed
            and numerical is not None
            and numerical.passed
            and (noise is None or noise.passed),
        )
        write_report(report, folder, against_peers=against_peers)
        (folder / "metrics.json").write_text(json.dumps(report.metrics(), indent=2) + "\n")
    return report


def _reference(hf: Path, dims: ModelDims, num_prompts: int, max_prompt_tokens: int, adapter: Path | None) -> Reference:
    """What transformers makes of the prompts. Raises a ConfigError if it can't, or if the tokenizer is of no use."""
    prompts = prompt_set(hf, vocab_size=dims.vocab, num_prompts=num_prompts, max_prompt_tokens=max_prompt_tokens)
    num_experts = dims.more.get("experts", 0)
    return trace_hf(hf, prompts, vocab_size=dims.vocab, num_experts=num_experts, adapter=adapter)


def _lines(error: InputError) -> Iterator[str]:
    for problem in error.problems or (Problem(""),):
        yield " ".join(f"{error.summary}: {problem}".split()).removesuffix(":")


def _noise_dtype(
    stored: Mapping[str, StoredTensor], dtype: Literal["auto", "float32", "bfloat16", "float16"]
) -> Literal["float32", "bfloat16", "float16"]:
    """The dtype that a proof of rounding is made in: `auto` is that of most of the folder's bytes."""
    if dtype != "auto":
        return dtype
    num_bytes: Counter[str] = Counter()
    for tensor in stored.values():
        num_bytes[tensor.dtype] += tensor.num_bytes
    most = num_bytes.most_common(1)[0][0]
    if most == "float32":
        return "float32"
    return "float16" if most == "float16" else "bfloat16"  # quantised weights are computed with in bf16
