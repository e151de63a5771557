"""The gates of an evaluation: by metric, by regression, by perplexity, by significance."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from mcore.evaluate.comparison import GateResult, GroupComparison, SetComparison, Side
from mcore.evaluate.statistics import holm, probability_of_no_loss


def pass_rate_gates(
    tuned: Side, groups: Iterable[GroupComparison], min_pass_rate: float | None, max_regression: float | None
) -> tuple[GateResult, ...]:
    """How many cases the tuned model passes, and how many fewer than the base in each group.

    Fractions, since 0.8 - 0.7 is more than 0.1 in floats; a limit is what was typed, not its nearest float.
    """
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


def perplexity_gates(sets: Iterable[SetComparison], max_ratio: float | None) -> tuple[GateResult, ...]:
    """The perplexity of the sets that must not be forgotten, in multiples of the base's; of all if none is marked."""
    if max_ratio is None:
        return ()
    sets = tuple(sets)
    judged = [one for one in sets if one.forgetting] or sets
    return tuple(
        GateResult(
            gate="max_perplexity_ratio",
            subject=one.name,
            limit=max_ratio,
            found=one.ratio,
            passed=one.ratio <= max_ratio,
        )
        for one in judged
    )


def significance_gates(groups: Iterable[GroupComparison], confidence: float | None) -> tuple[GateResult, ...]:
    """Whether the tuned model is worse in a group that must not be forgotten, and by more than chance.

    McNemar's exact test over the cases that the models differ in; of all groups if none is marked. With several groups
    the confidence is that of the whole gate (Holm), so that more groups do not mean more false alarms.
    """
    if confidence is None:
        return ()
    groups = tuple(groups)
    judged = [group for group in groups if group.forgetting] or groups
    p_values = holm({group.group: probability_of_no_loss(group.lost, group.gained) for group in judged})
    return tuple(
        GateResult(
            gate="worse_confidence", subject=name, limit=confidence, found=1 - p_value, passed=1 - p_value < confidence
        )
        for name, p_value in p_values.items()
    )
