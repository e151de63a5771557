"""Served against trained: what differs, and how much of it is noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum, sqrt
from typing import Any

from mcore.errors import PrecisionError, Problem

MAX_ERROR = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}
"""Root mean square of the difference to transformers' float32 (nats) that passes, by dtype of what is served. Coarse in
16 bits, where the ratio below is the finer one."""
MAX_NOISE_RATIO = 1.5
"""Of a 16-bit dtype: the same, in multiples of the noise that transformers has in that dtype itself. Measured: see
docs/decisions/0177-*.md."""
CONTEXT = 8
"""Tokens shown at each side of the first that differs."""


@dataclass(frozen=True, slots=True)
class ServedPromptResult:
    """One prompt: whether its tokens are those of training, and how its probabilities differ (nats)."""

    place: str
    num_prompt_tokens: int
    num_tokens: int
    same_prompt: bool
    first_difference: str
    rms_error: float
    max_error: float
    rms_noise: float


@dataclass(frozen=True, slots=True)
class ServedReport:
    """All prompts, and the verdict: what `report.json` holds."""

    dtype: str
    prompts: tuple[ServedPromptResult, ...]
    rms_error: float
    max_error: float
    rms_noise: float
    max_rms_error: float
    max_noise_ratio: float

    @property
    def noise_ratio(self) -> float | None:
        """Error of what is served in multiples of transformers' own noise; None in float32, where that is none."""
        return self.rms_error / self.rms_noise if self.rms_noise else None

    @property
    def problems(self) -> list[Problem]:
        """Everything that speaks against it."""
        found = [
            Problem(
                f"prompt of {one.place}",
                "the tokens that training has",
                one.first_difference,
                "The exported chat template is not the one that was trained with, or a system message is missing.",
            )
            for one in self.prompts
            if not one.same_prompt
        ]
        if self.rms_error > self.max_rms_error:
            found.append(
                Problem(
                    "log-probabilities of the served model",
                    f"at most {self.max_rms_error:g} nats (root mean square) from transformers' in float32",
                    f"{self.rms_error:.3g}",
                )
            )
        if self.noise_ratio is not None and self.noise_ratio > self.max_noise_ratio:
            found.append(
                Problem(
                    f"noise of the served model in {self.dtype}",
                    f"at most {self.max_noise_ratio:g} times that of transformers",
                    f"{self.noise_ratio:.3g} times",
                )
            )
        return found

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.problems

    def raise_if_failed(self) -> None:
        """Do nothing if it passed.

        Raises:
            PrecisionError: What is served is not what was trained.
        """
        if not self.passed:
            raise PrecisionError("what is served is not what was trained", self.problems)

    def to_json(self) -> str:
        """The report, with what follows from it."""
        return json.dumps(
            asdict(self) | {"passed": self.passed, "noise_ratio": self.noise_ratio}, indent=2, ensure_ascii=False
        )

    def metrics(self) -> dict[str, Any]:
        """The figures worth showing."""
        return {
            "passed": self.passed,
            "num_prompts": len(self.prompts),
            "num_same_prompts": sum(one.same_prompt for one in self.prompts),
            "rms_error": self.rms_error,
            "max_error": self.max_error,
            "noise_ratio": self.noise_ratio,
        }

    def markdown(self) -> str:
        """The page."""
        ratio = "" if self.noise_ratio is None else f", {self.noise_ratio:.3f} times transformers' own noise"
        return "\n".join(
            [
                f"# Served as trained: {'yes' if self.passed else 'NO'}",
                "",
                f"{sum(one.same_prompt for one in self.prompts)} of {len(self.prompts)} prompts have the tokens that "
                "training has.",
                f"Log-probabilities in {self.dtype} are {self.rms_error:.3g} nats (root mean square) from "
                f"transformers' in float32, at most {self.max_error:.3g}{ratio}.",
                "",
                "| prompt | tokens | same prompt | error (rms) | error (max) |",
                "| --- | ---: | --- | ---: | ---: |",
                *(
                    f"| {one.place} | {one.num_prompt_tokens} of {one.num_tokens} "
                    f"| {'yes' if one.same_prompt else 'NO: ' + one.first_difference} "
                    f"| {one.rms_error:.3g} | {one.max_error:.3g} |"
                    for one in self.prompts
                ),
                "",
                *(f"- {problem}" for problem in self.problems),
            ]
        )


def judge(
    prompts: Sequence[dict[str, Any]],
    served_ids: Sequence[list[int] | None],
    served_logprobs: Sequence[Sequence[float]],
    dtype: str,
) -> ServedReport:
    """Hold what vLLM makes of the prompts against what training and transformers make of them.

    Args:
        prompts: Lines of `prompts.jsonl`.
        served_ids: For each what vLLM's chat rendering gives; None for a text without turns.
        served_logprobs: For each vLLM's log-probability (nats) of the sample's tokens from the second on.
        dtype: What vLLM computed in.
    """
    results = []
    errors: list[float] = []
    noise: list[float] = []
    for prompt, ids, logprobs in zip(prompts, served_ids, served_logprobs, strict=True):
        difference = "" if ids is None else _first_difference(prompt["prompt_token_ids"], ids)
        off = [one - other for one, other in zip(logprobs, prompt["exact"], strict=True)]
        own = [one - other for one, other in zip(prompt["reference"], prompt["exact"], strict=True)]
        errors += off
        noise += own
        results.append(
            ServedPromptResult(
                prompt["place"],
                len(prompt["prompt_token_ids"]),
                len(prompt["token_ids"]),
                not difference,
                difference,
                _rms(off),
                max(map(abs, off)),
                _rms(own),
            )
        )
    return ServedReport(
        dtype, tuple(results), _rms(errors), max(map(abs, errors)), _rms(noise), MAX_ERROR[dtype], MAX_NOISE_RATIO
    )


def _first_difference(trained: list[int], served: list[int]) -> str:
    if trained == served:
        return ""
    pairs = enumerate(zip(trained, served, strict=False))
    at = next((place for place, (a, b) in pairs if a != b), min(len(trained), len(served)))
    start = max(0, at - CONTEXT)
    return (
        f"{served[start : at + CONTEXT]} instead of {trained[start : at + CONTEXT]} from token {start} on, "
        f"{len(served)} tokens instead of {len(trained)}"
    )


def _rms(values: Sequence[float]) -> float:
    return sqrt(fsum(value * value for value in values) / len(values))
