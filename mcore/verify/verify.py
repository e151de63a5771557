"""Both proofs of one Hugging Face folder against one megatron-core checkpoint, and the report of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import HF_FOLDER
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import read_hf_config
from mcore.folders import refuse_existing, whole_folder
from mcore.progress import say
from mcore.select import select_checkpoint
from mcore.verify.numerical import compare_with_mcore, trace_hf
from mcore.verify.prompts import prompt_set
from mcore.verify.report import NumericalResult, VerifyReport, package_versions, write_report
from mcore.verify.structural import compare_on_disk


def verify(
    hf: Path,
    mcore: Path,
    output: Path,
    *,
    iteration: int | None = None,
    max_relative_error: float = 1e-4,
    num_prompts: int = 4,
    max_prompt_tokens: int = 96,
    overwrite: bool = False,
) -> VerifyReport:
    """Prove that a Hugging Face folder and a checkpoint are the same model, or write down how they differ.

    The report's folder appears whole, whatever the verdict: `report.json`, `report.md`, `metrics.json`. It is the
    caller's part to act on the verdict (`VerifyReport.raise_if_failed`).

    Args:
        hf: Hugging Face folder: the reference, as transformers runs it.
        mcore: Checkpoint folder with the tracker, the iterations, and `hf/` with the config that training reads.
        output: Folder of the report.
        iteration: Which iteration; the newest complete one if None.
        max_relative_error: Largest difference of fp32 logits that passes, as a fraction of the Hugging Face logits'
            standard deviation.
        num_prompts: Number of prompts.
        max_prompt_tokens: Tokens: the longest prompt.
        overwrite: Whether an existing `output` is replaced.

    Raises:
        InputError: A folder is missing or damaged, or the architecture can't be built.
        CheckpointError: There is no complete checkpoint.
    """
    refuse_existing(output, overwrite=overwrite)
    torch.set_float32_matmul_precision("highest")  # a GPU's TF32 has ten bits: no fp32 proof
    chosen = select_checkpoint(mcore, "latest" if iteration is None else "iteration", iteration)
    config, mcore_config = read_hf_config(hf), read_hf_config(mcore / HF_FOLDER)
    family, dims = family_of_config(config), dims_of(config)
    say(f"verify: {hf} against {chosen.path}, as {chosen.reason}")
    with whole_folder(output, overwrite=overwrite) as folder:
        structural = compare_on_disk(hf, chosen.path, family=family, dims=dims)
        say(f"verify: bits on disk are {'equal' if structural.passed else 'NOT equal'}")
        numerical: NumericalResult | None = None
        if structural.is_loadable:
            prompts = prompt_set(
                hf,
                vocab_size=dims.vocab,
                num_prompts=num_prompts,
                max_prompt_tokens=min(max_prompt_tokens, config.get("max_position_embeddings") or max_prompt_tokens),
            )
            reference = trace_hf(hf, prompts)
            with parallel_processes(Layout()):
                numerical = compare_with_mcore(
                    reference,
                    prompts,
                    config=mcore_config,
                    iteration_dir=chosen.path,
                    max_relative_error=max_relative_error,
                    rounded_to=structural.cast_to,
                )
            say(f"verify: logits are {'equal' if numerical.passed else 'NOT equal'}, {numerical.summary}")
        report = VerifyReport(
            hf=str(hf),
            mcore=str(chosen.path),
            family=family.name,
            versions=package_versions(),
            structural=structural,
            numerical=numerical,
            passed=structural.passed and numerical is not None and numerical.passed,
        )
        write_report(report, folder)
        (folder / "metrics.json").write_text(json.dumps(report.metrics(), indent=2) + "\n")
    return report
