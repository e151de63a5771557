"""Base against tuned model, case by case, and the gates that the tuned model must pass.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mcore.errors import ConfigError, EvaluationGateError, Problem

ANSWERS = "answers.jsonl"
SUMMARY = "summary.json"
COMPARISON = "comparison.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class Side(_Model):
    """One model's figures: what the comparison reads of `summary.json`."""

    suite: str
    """Name of the suite."""
    num_cases: int
    """Cases that were asked."""
    num_passed: int
    """Cases that passed."""
    perplexity: float | None
    """Perplexity on the held-out rows, if it was measured."""
    num_perplexity_tokens: int
    """Tokens that the perplexity is over."""
    max_tokens: int
    """Tokens: the longest answer."""
    max_model_len: int
    """Tokens: the longest prompt and answer together."""
    system: str | None
    """System message where a case brought none."""
    dtype: str
    """Dtype that vLLM computed in."""
    device: str
    """Kind of device."""
    vllm_version: str
    """Version of vLLM."""

    @property
    def pass_rate(self) -> float:
        """Fraction of all cases that passed."""
        return self.num_passed / self.num_cases


class CaseAnswer(_Model):
    """One model's answer to one case: what the comparison reads of a line of `answers.jsonl`."""

    group: str
    """Group of the suite."""
    case: int
    """Number in the group, from 1."""
    prompt: str
    """The user's last turn."""
    messages: tuple[dict[str, str], ...]
    """The whole conversation that was asked."""
    expectation: str
    """What the answer must look like, in words."""
    answer: str
    """What the model said."""
    passed: bool
    """Whether it fits the expectation."""
    failures: tuple[str, ...]
    """What is wrong with it."""


class CaseComparison(_Model):
    """One case, answered by both."""

    group: str
    """Group of the suite."""
    case: int
    """Number in the group, from 1."""
    prompt: str
    """The user's last turn."""
    expectation: str
    """What the answer must look like, in words."""
    base_answer: str
    """What the base model said."""
    base_passed: bool
    """Whether that passed."""
    tuned_answer: str
    """What the tuned model said."""
    tuned_passed: bool
    """Whether that passed."""
    tuned_failures: tuple[str, ...]
    """What is wrong with the tuned model's answer."""


class GroupComparison(_Model):
    """Cases of one group that each model passed."""

    group: str
    """Name of the group."""
    num_cases: int
    """Cases in it."""
    base_passed: int
    """Cases that the base model passed."""
    tuned_passed: int
    """Cases that the tuned model passed."""

    @property
    def regression(self) -> Fraction:
        """Pass rate that the tuned model lost; negative if it gained."""
        return Fraction(self.base_passed - self.tuned_passed, self.num_cases)


class GateResult(_Model):
    """One gate, held against one figure."""

    gate: Literal["min_pass_rate", "max_regression"]
    """Its name."""
    subject: str
    """What it judged: `all cases`, or a group."""
    limit: float
    """Where it draws the line."""
    found: float
    """The figure."""
    passed: bool
    """Whether the figure is on the right side; the limit itself is."""


class Comparison(_Model):
    """Base against tuned: what `comparison.json` holds."""

    base: Side
    """The base model's figures."""
    tuned: Side
    """The tuned model's figures."""
    groups: tuple[GroupComparison, ...]
    """Pass rates by group, in the order of the suite."""
    cases: tuple[CaseComparison, ...]
    """All cases, in the order of the suite."""
    perplexity_ratio: float | None
    """Perplexity of the tuned model divided by that of the base, if both were measured."""
    gates: tuple[GateResult, ...]
    """All gates that were asked for."""

    @property
    def regressions(self) -> tuple[CaseComparison, ...]:
        """Cases that the base model passed and the tuned model fails."""
        return tuple(case for case in self.cases if case.base_passed and not case.tuned_passed)

    @property
    def failed_gates(self) -> tuple[GateResult, ...]:
        """Gates that said no."""
        return tuple(gate for gate in self.gates if not gate.passed)

    def raise_failed_gates(self) -> None:
        """Do nothing if every gate was passed.

        Raises:
            EvaluationGateError: All gates that said no, each with the cases that count against it.
        """
        if not self.failed_gates:
            return
        problems = []
        for gate in self.failed_gates:
            bound = "at least" if gate.gate == "min_pass_rate" else "at most"
            problems.append(Problem(f"{gate.gate} of {gate.subject}", f"{bound} {gate.limit:g}", f"{gate.found:.4g}"))
        problems += [
            Problem(
                f"{case.group} {case.case} {case.prompt!r}", case.expectation, repr(shortened(case.tuned_answer, 80))
            )
            for case in self._cases_against()
        ]
        raise EvaluationGateError("the tuned model is not good enough", problems)

    def _cases_against(self) -> list[CaseComparison]:
        failed = {gate.gate for gate in self.failed_gates}
        groups = {gate.subject for gate in self.failed_gates if gate.gate == "max_regression"}
        return [
            case
            for case in self.cases
            if not case.tuned_passed and ("min_pass_rate" in failed or (case.group in groups and case.base_passed))
        ]


def compare_folders(
    base: Path, tuned: Path, *, min_pass_rate: float | None = None, max_regression: float | None = None
) -> Comparison:
    """Compare what `mcore.evaluate run` wrote for two models.

    Args:
        base: Folder of the base model.
        tuned: Folder of the tuned model.
        min_pass_rate: Gate: smallest fraction of all cases that the tuned model must pass.
        max_regression: Gate: largest loss of pass rate, against the base, in any group.

    Raises:
        ConfigError: A folder can't be read, or the models were not asked the same in the same way.
    """
    problems: list[Problem] = []
    base_side, base_answers = _read(base, problems)
    tuned_side, tuned_answers = _read(tuned, problems)
    if base_side and tuned_side:
        problems += _unlike(base_side, tuned_side, base_answers, tuned_answers)
    if problems or not base_side or not tuned_side:
        raise ConfigError("the evaluations can't be compared", problems)
    cases = tuple(
        CaseComparison(
            group=before.group,
            case=before.case,
            prompt=before.prompt,
            expectation=before.expectation,
            base_answer=before.answer,
            base_passed=before.passed,
            tuned_answer=after.answer,
            tuned_passed=after.passed,
            tuned_failures=after.failures,
        )
        for before, after in zip(base_answers, tuned_answers, strict=True)
    )
    groups = _by_group(cases)
    ratio = None
    if base_side.perplexity is not None and tuned_side.perplexity is not None:
        ratio = tuned_side.perplexity / base_side.perplexity
    return Comparison(
        base=base_side,
        tuned=tuned_side,
        groups=groups,
        cases=cases,
        perplexity_ratio=ratio,
        gates=_gates(tuned_side, groups, min_pass_rate, max_regression),
    )


def read_comparison(folder: Path) -> Comparison:
    """The comparison that `mcore.evaluate compare` wrote into a folder.

    Raises:
        ConfigError: There is none that can be read.
    """
    path = folder / COMPARISON
    try:
        return Comparison.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError, ValidationError) as exc:
        raise ConfigError("the comparison can't be read", [Problem(str(path), found=str(exc))]) from exc


def shortened(text: str, num_characters: int) -> str:
    """The text on one line, cut where it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= num_characters else f"{line[: num_characters - 1].rstrip()}…"


def _read(folder: Path, problems: list[Problem]) -> tuple[Side | None, list[CaseAnswer]]:
    path = folder / SUMMARY
    try:
        side = Side.model_validate_json(path.read_text())
        path = folder / ANSWERS
        answers = [CaseAnswer.model_validate_json(line) for line in path.read_text().split("\n") if line]
    except (OSError, UnicodeDecodeError, ValidationError) as exc:
        problems.append(Problem(str(path), "what `mcore.evaluate run` writes", str(exc)))
        return None, []
    num_passed = sum(answer.passed for answer in answers)
    if (len(answers), num_passed) != (side.num_cases, side.num_passed) or not answers:
        problems.append(
            Problem(
                str(path),
                f"{side.num_cases} cases, {side.num_passed} of them passed ({SUMMARY})",
                f"{len(answers)} cases, {num_passed} of them passed",
            )
        )
    return side, answers


def _unlike(
    base: Side, tuned: Side, base_answers: list[CaseAnswer], tuned_answers: list[CaseAnswer]
) -> Iterable[Problem]:
    fix = "Evaluate both models with the same suite and options."
    for name in ("suite", "max_tokens", "max_model_len", "system", "num_perplexity_tokens"):
        values: tuple[Any, Any] = getattr(base, name), getattr(tuned, name)
        if values[0] != values[1]:
            yield Problem(f"{name} of the tuned model", f"{values[0]!r} as of the base", repr(values[1]), fix)
    if (base.perplexity is None) != (tuned.perplexity is None):
        yield Problem("perplexity", "both models' or none", f"{base.perplexity} and {tuned.perplexity}", fix)
    asked = [
        [(a.group, a.case, a.messages, a.expectation) for a in answers] for answers in (base_answers, tuned_answers)
    ]
    for before, after in zip(*asked, strict=False):
        if before != after:
            yield Problem(f"case {after[0]} {after[1]}", f"{before} as for the base", str(after), fix)
    if len(asked[0]) != len(asked[1]):
        yield Problem("cases of the tuned model", f"{len(asked[0])} as of the base", str(len(asked[1])), fix)


def _by_group(cases: Iterable[CaseComparison]) -> tuple[GroupComparison, ...]:
    members: dict[str, list[CaseComparison]] = {}
    for case in cases:
        members.setdefault(case.group, []).append(case)
    return tuple(
        GroupComparison(
            group=group,
            num_cases=len(found),
            base_passed=sum(case.base_passed for case in found),
            tuned_passed=sum(case.tuned_passed for case in found),
        )
        for group, found in members.items()
    )


def _gates(
    tuned: Side, groups: Iterable[GroupComparison], min_pass_rate: float | None, max_regression: float | None
) -> tuple[GateResult, ...]:
    # Fractions, since 0.8 - 0.7 is more than 0.1 in floats; a limit is what was typed, not its nearest float.
    results = []
    if min_pass_rate is not None:
        rate = Fraction(tuned.num_passed, tuned.num_cases)
        results.append(
            GateResult(
                gate="min_pass_rate",
                subject="all cases",
                limit=min_pass_rate,
                found=float(rate),
                passed=rate >= Fraction(str(min_pass_rate)),
            )
        )
    if max_regression is not None:
        results += [
            GateResult(
                gate="max_regression",
                subject=group.group,
                limit=max_regression,
                found=float(group.regression),
                passed=group.regression <= Fraction(str(max_regression)),
            )
            for group in groups
        ]
    return tuple(results)


def flat_metrics(comparison: Comparison) -> dict[str, Any]:
    """The figures worth showing: what `metrics.json` holds."""
    return {
        "base_pass_rate": comparison.base.pass_rate,
        "tuned_pass_rate": comparison.tuned.pass_rate,
        "base_perplexity": comparison.base.perplexity,
        "tuned_perplexity": comparison.tuned.perplexity,
        "perplexity_ratio": comparison.perplexity_ratio,
        "num_cases": comparison.tuned.num_cases,
        "num_regressions": len(comparison.regressions),
        "num_failed_gates": len(comparison.failed_gates),
        **{
            f"{side}_pass_rate_{group.group}": passed / group.num_cases
            for group in comparison.groups
            for side, passed in (("base", group.base_passed), ("tuned", group.tuned_passed))
        },
    }


def to_json(comparison: Comparison) -> str:
    """The comparison as `comparison.json` holds it, with what follows from it."""
    data = comparison.model_dump(mode="json")
    data["regressions"] = [{"group": case.group, "case": case.case} for case in comparison.regressions]
    data["passed"] = not comparison.failed_gates
    return json.dumps(data, indent=2, ensure_ascii=False)
