"""What a verification found: `report.json` for programs, `report.md` for people. Written for a failed gate as well.

Numbers that are not finite are written as the words NaN and Infinity, since JSON has no other way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mcore.errors import ConfigError, PrecisionError, Problem
from mcore.verify.compare import passes

REPORT_JSON = "report.json"
SHOWN_IN_MESSAGE = 20
"""Findings named in the error's text; the report has all."""


class ReportModel(BaseModel):
    """Frozen, strict, and able to carry NaN through JSON."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="strings", protected_namespaces=()
    )


class TensorFinding(ReportModel):
    """One tensor that is not as it should be."""

    tensor: str
    """Its name, on the side where the finding is."""
    kind: Literal["missing", "unclaimed", "claimed twice", "shape", "incomplete", "differs", "not finite"]
    """What is wrong with it."""
    detail: str
    """What was expected and what was found."""


class CastCount(ReportModel):
    """Tensors that are compared after a cast from the checkpoint's dtype to the Hugging Face folder's."""

    mcore_dtype: str
    hf_dtype: str
    num_tensors: int


class StructuralResult(ReportModel):
    """T0: both sides, read from disk again, hold the same bits."""

    num_hf_tensors: int
    """Hugging Face tensors that were compared."""
    num_mcore_tensors: int
    """Tensors of the checkpoint that they were compared with, each layer counted."""
    num_bytes: int
    """Bytes of the compared Hugging Face tensors."""
    casts: tuple[CastCount, ...]
    """Casts under which tensors are compared; empty if all have the same dtype on both sides."""
    cast_to: str | None
    """The one dtype of all Hugging Face tensors, if there are casts: what an export rounded the weights to."""
    dequantised: tuple[str, ...] = ()
    """Hugging Face tensors that are quantised, and were dequantised by transformers' functions to be compared."""
    ignored_hf: tuple[str, ...]
    """Hugging Face tensors that the family's table leaves out by an explicit line."""
    findings: tuple[TensorFinding, ...]
    """Everything that is wrong; empty if the proof holds."""
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the proof holds."""
        return not self.findings and self.num_hf_tensors > 0

    @property
    def summary(self) -> str:
        """The result in a few words."""
        if self.passed:
            return "equal"
        if not self.findings:
            return "NOT equal: there is nothing to compare"
        first = self.findings[0]
        return f"NOT equal: {len(self.findings)} findings, the first about {first.tensor} ({first.kind})"

    @property
    def is_loadable(self) -> bool:
        """Whether names and shapes fit, so that a model can be built of both sides."""
        return all(finding.kind in ("differs", "not finite") for finding in self.findings)


class PromptResult(ReportModel):
    """Distance of the logits over one prompt."""

    prompt: str
    num_tokens: int
    relative_error: float
    """Largest absolute difference as a fraction of the Hugging Face logits' standard deviation: the gate's measure."""
    max_abs: float
    mean_abs: float
    hf_std: float
    mean_cosine: float
    min_cosine: float
    top1_agreement: float
    """Fraction of positions where both sides have the same most likely token."""
    worst_position: int


class PointResult(ReportModel):
    """Distance of one part's output, the worst over prompts and positions."""

    point: str
    """`embedding`, `layers.N.attention`, `layers.N.mlp`, `final_norm` or `head`."""
    relative_error: float
    """Norm of the difference over the norm of the Hugging Face vector; for `head`, the logits' relative error."""


class NumericalResult(ReportModel):
    """T1: fp32 logits of both models on the same tokens."""

    max_relative_error: float
    """The gate."""
    prompt_source: str
    """Whether the token ids came from the folder's tokenizer."""
    prompt_digest: str
    """SHA-256 of all token ids."""
    device: str
    rounded_to: str | None
    """Dtype that megatron's weights were rounded to before they were used, as an export had cast them."""
    not_loaded: tuple[str, ...] = ()
    """Why megatron-core could not load the weights into the model; empty if it could."""
    num_experts: int = 0
    """Experts of each mixture-of-experts layer; 0 if the model has none."""
    unreached_lengths: tuple[str, ...] = ()
    """What the model does only on sequences longer than the prompts."""
    unreached_experts: dict[int, tuple[int, ...]] = {}
    """Experts that no token of any prompt went to, by layer: nothing is proven of them but their bits."""
    prompts: tuple[PromptResult, ...]
    points: tuple[PointResult, ...]
    """In the order of computation."""
    seconds: float

    @property
    def relative_error(self) -> float:
        """The worst prompt's relative error; NaN if any is NaN."""
        return worst(prompt.relative_error for prompt in self.prompts)

    @property
    def passed(self) -> bool:
        """Whether the model was loaded and every prompt is within the gate. NaN is not."""
        return bool(self.prompts) and all(
            passes(prompt.relative_error, self.max_relative_error) for prompt in self.prompts
        )

    @property
    def summary(self) -> str:
        """The result in a few words."""
        if self.not_loaded:
            return f"megatron-core can't load the weights: {'; '.join(self.not_loaded[:3])}"
        text = f"relative error {self.relative_error:.3e} (gate {self.max_relative_error:.1e})"
        return text if self.passed else f"{text}; the first part that differs is {self.first_bad_point}"

    @property
    def first_bad_point(self) -> str | None:
        """The first part whose output is further off than the gate; None if none is."""
        return next(
            (point.point for point in self.points if not passes(point.relative_error, self.max_relative_error)), None
        )


class NoiseResult(ReportModel):
    """T2: distance of both models in a dtype from the fp32 logits of transformers."""

    dtype: str
    hf_noise: float
    """Of transformers: root mean square of the difference at a position, over the standard deviation of the fp32
    logits; the lower quartile over positions."""
    mcore_noise: float
    """Of megatron-core, measured alike."""
    max_noise_ratio: float
    """The gate: megatron-core's noise may be this many times that of transformers."""
    seconds: float

    @property
    def ratio(self) -> float:
        """megatron-core's noise over that of transformers."""
        return self.mcore_noise / self.hf_noise if self.hf_noise > 0 else float("nan")

    @property
    def passed(self) -> bool:
        """Whether megatron-core is as near to the fp32 logits as transformers. NaN is not."""
        return passes(self.ratio, self.max_noise_ratio)

    @property
    def summary(self) -> str:
        """The result in a few words."""
        return (
            f"in {self.dtype} megatron-core is {self.mcore_noise:.3e} from the fp32 logits, transformers "
            f"{self.hf_noise:.3e} (ratio {self.ratio:.3f}, gate {self.max_noise_ratio:g})"
        )


class VerifyReport(ReportModel):
    """The whole verification of one Hugging Face folder against one megatron-core checkpoint."""

    format: Literal[1] = 1
    hf: str
    """The Hugging Face folder."""
    mcore: str
    """The checkpoint's iteration folder."""
    family: str
    versions: dict[str, str]
    structural: StructuralResult
    numerical: NumericalResult | None
    """None if names or shapes do not fit, so that no model can be built; or for the reasons in `not_compared`."""
    noise: NoiseResult | None = None
    """None if the logits were not equal in fp32, or no other dtype was asked for; or as `numerical`."""
    not_compared: tuple[str, ...] = ()
    """Why logits could not be computed although names and shapes fit, such as a tokenizer that does not load."""
    passed: bool
    """The gate's verdict: all proofs were made and hold."""

    @property
    def has_differences(self) -> bool:
        """Whether a proof says that the two sides differ, as opposed to one that could not be made."""
        proofs = (self.structural, self.numerical, self.noise)
        return any(proof is not None and not proof.passed for proof in proofs)

    def problems(self) -> tuple[Problem, ...]:
        """What the gate's error names: the first tensors that differ, and the first part of the model that does."""
        findings = self.structural.findings
        problems = [
            Problem(f"{finding.tensor} ({finding.kind})", found=finding.detail)
            for finding in findings[:SHOWN_IN_MESSAGE]
        ]
        if len(findings) > SHOWN_IN_MESSAGE:
            problems.append(Problem(f"and {len(findings) - SHOWN_IN_MESSAGE} more tensors, all in {REPORT_JSON}"))
        if self.structural.num_hf_tensors == 0 and not findings:
            problems.append(Problem("structural proof", "tensors to compare", "none"))
        problems += [Problem("logits were not compared", found=why) for why in self.not_compared]
        if self.numerical is None and not self.not_compared:
            problems.append(Problem("logits were not compared", found="names or shapes that do not fit"))
        if self.numerical is not None and not self.numerical.passed:
            problems.append(Problem("logits", found=self.numerical.summary))
        if self.noise is not None and not self.noise.passed:
            problems.append(Problem(f"logits in {self.noise.dtype}", found=self.noise.summary))
        return tuple(problems)

    def raise_if_failed(self) -> None:
        """Turn a verdict of no into the gate's error.

        Raises:
            PrecisionError: A proof failed. Names the tensors and the first part that differ.
            ConfigError: Nothing differs so far, but logits could not be computed. Says why.
        """
        if self.not_compared and not self.has_differences:
            raise ConfigError(f"{self.hf} and {self.mcore} can't be compared by their logits", self.problems())
        if not self.passed:
            raise PrecisionError(f"{self.hf} and {self.mcore} are not the same model", self.problems())

    def metrics(self) -> dict[str, float | int | bool | None]:
        """Flat figures for the stage's `metrics.json`; an error that is no number is null."""
        flat: dict[str, float | int | bool | None] = {
            "passed": self.passed,
            "num_tensors": self.structural.num_hf_tensors,
            "bytes": self.structural.num_bytes,
            "num_differing_tensors": len(self.structural.findings),
            "seconds": round(self.structural.seconds + (self.numerical.seconds if self.numerical else 0.0), 3),
        }
        if self.numerical and self.numerical.prompts:
            flat |= {
                "relative_error": error if math.isfinite(error := self.numerical.relative_error) else None,
                "max_relative_error": self.numerical.max_relative_error,
                "top1_agreement": min(prompt.top1_agreement for prompt in self.numerical.prompts),
            }
        if self.noise:
            flat |= {"noise_ratio": ratio if math.isfinite(ratio := self.noise.ratio) else None}
        return flat


def worst(errors: Iterator[float]) -> float:
    """The largest error; NaN if any is NaN (`max` alone may lose it)."""
    largest = 0.0
    for error in errors:
        if error != error:
            return error
        largest = max(largest, error)
    return largest


def package_versions() -> dict[str, str]:
    """Versions of what computes the proof."""
    return {name: version(name) for name in ("mcore-flows", "megatron-core", "torch", "transformers", "safetensors")}


def read_report(folder: Path) -> VerifyReport:
    """The report in a folder."""
    return VerifyReport.model_validate_json((folder / REPORT_JSON).read_text())
