"""Base against tuned model, case by case, and the gates that the tuned model must pass.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mcore.errors import ConfigError, Problem
from mcore.evaluate.comparison import CaseAnswer, CaseComparison, Comparison, GroupComparison, SetComparison, Side
from mcore.evaluate.gates import pass_rate_gates, perplexity_gates, significance_gates
from mcore.evaluate.statistics import paired_difference, perplexity_ratio_interval

ANSWERS = "answers.jsonl"
SUMMARY = "summary.json"


def compare_folders(
    base: Path,
    tuned: Path,
    *,
    min_pass_rate: float | None = None,
    max_regression: float | None = None,
    max_perplexity_ratio: float | None = None,
    worse_confidence: float | None = None,
) -> Comparison:
    """Compare what `mcore.evaluate run` wrote for two models.

    Args:
        base: Folder of the base model.
        tuned: Folder of the tuned model.
        min_pass_rate: Gate: smallest fraction of all cases that the tuned model must pass.
        max_regression: Gate: largest loss of pass rate, against the base, in any group.
        max_perplexity_ratio: Gate: largest perplexity, in multiples of the base's, on the sets that are marked as
            forgetting sets; on all if none is.
        worse_confidence: Gate: fails if the tuned model is worse than the base with this confidence in a group that is
            marked as a forgetting set; in any if none is.

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
    groups = _by_group(cases, {answer.group for answer in base_answers if answer.forgetting})
    sets = _by_set(base_side, tuned_side)
    ratio = None
    if base_side.perplexity is not None and tuned_side.perplexity is not None:
        ratio = tuned_side.perplexity / base_side.perplexity
    return Comparison(
        base=base_side,
        tuned=tuned_side,
        groups=groups,
        cases=cases,
        perplexity_ratio=ratio,
        perplexity_sets=sets,
        gates=(
            *pass_rate_gates(tuned_side, groups, min_pass_rate, max_regression),
            *perplexity_gates(sets, max_perplexity_ratio),
            *significance_gates(groups, worse_confidence),
        ),
    )


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
    sets = [
        {name: (one.row_tokens, one.forgetting) for name, one in side.perplexity_sets.items()} for side in (base, tuned)
    ]
    if sets[0] != sets[1]:
        sizes = [{name: sum(tokens) for name, (tokens, _) in found.items()} for found in sets]
        yield Problem("perplexity sets and their tokens", f"{sizes[0]} as of the base", str(sizes[1]), fix)
    asked = [
        [(a.group, a.case, a.messages, a.expectation) for a in answers] for answers in (base_answers, tuned_answers)
    ]
    for before, after in zip(*asked, strict=False):
        if before != after:
            yield Problem(f"case {after[0]} {after[1]}", f"{before} as for the base", str(after), fix)
    if len(asked[0]) != len(asked[1]):
        yield Problem("cases of the tuned model", f"{len(asked[0])} as of the base", str(len(asked[1])), fix)


def _by_group(cases: Iterable[CaseComparison], forgetting: set[str]) -> tuple[GroupComparison, ...]:
    members: dict[str, list[tuple[bool, bool]]] = {}
    for case in cases:
        members.setdefault(case.group, []).append((case.base_passed, case.tuned_passed))
    groups = []
    for group, found in members.items():
        counts = Counter(found)
        both, gained, lost = counts[True, True], counts[False, True], counts[True, False]
        groups.append(
            GroupComparison(
                group=group,
                num_cases=len(found),
                base_passed=both + lost,
                tuned_passed=both + gained,
                lost=lost,
                gained=gained,
                forgetting=group in forgetting,
                change_interval=paired_difference(both, gained, lost, counts[False, False]),
            )
        )
    return tuple(groups)


def _by_set(base: Side, tuned: Side) -> tuple[SetComparison, ...]:
    return tuple(
        SetComparison(
            name=name,
            num_tokens=before.num_tokens,
            num_rows=len(before.row_tokens),
            base=before.perplexity,
            tuned=(after := tuned.perplexity_sets[name]).perplexity,
            ratio=after.perplexity / before.perplexity,
            ratio_interval=perplexity_ratio_interval(before.row_losses, after.row_losses, before.row_tokens),
            forgetting=before.forgetting,
        )
        for name, before in base.perplexity_sets.items()
    )


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
        **{f"perplexity_ratio_{one.name}": one.ratio for one in comparison.perplexity_sets},
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
