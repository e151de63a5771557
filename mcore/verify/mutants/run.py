"""Run every mutant and the healthy models beside them through both proofs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import convert
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import CONFIG_FILE, HF_FOLDER, read_hf_config
from mcore.bridge.hf_headers import SINGLE_FILE
from mcore.bridge.rules import Family
from mcore.progress import progress
from mcore.select import RELEASE
from mcore.verify.mutants.mutant import Mutant
from mcore.verify.mutants.tiny_models import FAMILIES, write_tiny_model
from mcore.verify.numerical import Reference, compare_with_mcore, trace_hf
from mcore.verify.peers import PeerVerdicts, peer_verdicts
from mcore.verify.prompts import prompt_set
from mcore.verify.report import NumericalResult, ReportModel, StructuralResult
from mcore.verify.structural import compare_on_disk

MAX_RELATIVE_ERROR = 1e-4
HEALTHY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True}),
    *((family, {}) for family in FAMILIES if family not in ("llama", "qwen2", "qwen3")),
)
"""Family and changed fields of the models that must raise no alarm."""


class Verdict(ReportModel):
    """What both proofs said about one conversion, and what a peer's rule would have said."""

    name: str
    family: str
    what: str
    """The mistake, or what kind of healthy model it is."""
    where: str
    """The part that must be named; empty for a healthy model."""
    structural_passed: bool
    """T0 as the converter itself would run it: with its own table and its own reading of the config."""
    numerical_passed: bool
    relative_error: float
    first_bad_point: str | None
    not_loaded: tuple[str, ...]
    mean_abs: float
    """Mean absolute difference of logits, the worst prompt's."""
    mean_cosine: float
    """Mean cosine similarity of logits, the worst prompt's."""
    top1_agreement: float

    @property
    def passes_mean_abs(self) -> bool:
        """Whether the mean absolute difference alone would have let it pass."""
        return PeerVerdicts(self.mean_abs, self.mean_cosine).passes_mean_abs

    @property
    def passes_cosine(self) -> bool:
        """Whether the cosine similarity alone would have let it pass."""
        return PeerVerdicts(self.mean_abs, self.mean_cosine).passes_cosine


class Results(ReportModel):
    """Everything that one run of the command found."""

    mutants: tuple[Verdict, ...]
    healthy: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Healthy:
    """A healthy model, and what transformers computes with it."""

    hf: Path
    reference: Reference


def run_mutants(mutants: Sequence[Mutant], scratch: Path) -> list[Verdict]:
    """Convert each mutant from its healthy model and verify it against that.

    Args:
        mutants: The mistakes.
        scratch: Folder for models and checkpoints; a few MB a mutant.
    """
    references = {
        key: reference(scratch / f"healthy_{key[0]}_{'tied' if key[1] else 'untied'}", *_model(key), seed=0)
        for key in dict.fromkeys((mutant.family, mutant.tied) for mutant in mutants)
    }
    structural = {}
    with progress("convert mutants", len(mutants), "mutants") as advance:
        for mutant in mutants:
            structural[mutant.name] = _convert_wrongly(mutant, references[mutant.family, mutant.tied].hf, scratch)
            advance(1)
    verdicts = []
    with parallel_processes(Layout()):
        for mutant in mutants:
            numerical = logits_of(references[mutant.family, mutant.tied], scratch / mutant.name)
            family = f"{mutant.family}{', tied' if mutant.tied else ''}"
            verdicts.append(
                _verdict(mutant.name, family, mutant.what, mutant.where, structural[mutant.name], numerical)
            )
    return verdicts


def run_healthy(num_seeds: int, scratch: Path) -> list[Verdict]:
    """Convert and verify healthy models: every kind in `HEALTHY`, `num_seeds` of each."""
    kinds = [(family, changes, seed) for family, changes in HEALTHY for seed in range(num_seeds)]
    made: list[tuple[Healthy, Path, StructuralResult]] = []
    for number, (family, changes, seed) in enumerate(kinds):
        healthy = reference(scratch / f"{number}_source", family, changes, seed=seed)
        checkpoint = scratch / f"{number}_mcore"
        convert(healthy.hf, checkpoint)
        made.append((healthy, checkpoint, _on_disk(healthy.hf, checkpoint, None)))
    verdicts = []
    with parallel_processes(Layout()):
        for (family, changes, seed), (healthy, checkpoint, structural) in zip(kinds, made, strict=True):
            kind = ", ".join(changes) or "untied"
            numerical = logits_of(healthy, checkpoint)
            verdicts.append(_verdict(f"{family}, {kind}, seed {seed}", family, kind, "", structural, numerical))
    return verdicts


def reference(folder: Path, family: str, changes: dict[str, Any], *, seed: int) -> Healthy:
    """A healthy tiny model, written to `folder`, and what transformers computes with it."""
    hf = write_tiny_model(folder, family, seed, **changes)
    config = read_hf_config(hf)
    prompts = prompt_set(hf, vocab_size=config["vocab_size"], num_prompts=2, max_prompt_tokens=96)
    dims = dims_of(config)
    return Healthy(hf, trace_hf(hf, prompts, vocab_size=dims.vocab, num_experts=dims.more.get("experts", 0)))


def logits_of(healthy: Healthy, checkpoint: Path) -> NumericalResult:
    """T1 of a converted checkpoint against the healthy model. Process groups must be running."""
    return compare_with_mcore(
        healthy.reference,
        config=read_hf_config(checkpoint / HF_FOLDER),
        iteration_dir=checkpoint / RELEASE,
        max_relative_error=MAX_RELATIVE_ERROR,
    )


def _model(key: tuple[str, bool]) -> tuple[str, dict[str, Any]]:
    family, tied = key
    return family, {"tie_word_embeddings": tied}


def _convert_wrongly(mutant: Mutant, healthy: Path, scratch: Path) -> StructuralResult:
    """Write `scratch/<name>`, the checkpoint that the mistake would give, and check its bits as its maker would."""
    source = scratch / f"{mutant.name}_source"
    shutil.copytree(healthy, source)
    config = read_hf_config(source)
    family = mutant.table(family_of_config(config))
    mutant.config(config)
    (source / CONFIG_FILE).write_text(json.dumps(config))
    tensors = load_file(source / SINGLE_FILE)
    mutant.tensors(tensors)
    save_file(tensors, source / SINGLE_FILE, metadata={"format": "pt"})
    convert(source, scratch / mutant.name, family=family)
    return _on_disk(healthy, scratch / mutant.name, family)


def _on_disk(hf: Path, checkpoint: Path, family: Family | None) -> StructuralResult:
    config = read_hf_config(checkpoint / HF_FOLDER)
    dims = dims_of(config)
    return compare_on_disk(hf, checkpoint / RELEASE, family=family or family_of_config(config), dims=dims)


def _verdict(
    name: str, family: str, what: str, where: str, structural: StructuralResult, numerical: NumericalResult
) -> Verdict:
    prompts = numerical.prompts
    peers = peer_verdicts(prompts)
    return Verdict(
        name=name,
        family=family,
        what=what,
        where=where,
        structural_passed=structural.passed,
        numerical_passed=numerical.passed,
        relative_error=numerical.relative_error if prompts else float("nan"),
        first_bad_point=numerical.first_bad_point,
        not_loaded=numerical.not_loaded,
        mean_abs=peers.mean_abs,
        mean_cosine=peers.mean_cosine,
        top1_agreement=min((prompt.top1_agreement for prompt in prompts), default=0.0),
    )
