"""Rows that can't be used: none is lost unseen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from configs.schema.data import DataConfig
from configs.schema.placeholders import FIELD_OF
from mcore.data.load import over_budget
from mcore.data.rows import MAX_LISTED
from mcore.data.sources.source import NO_VALUE
from mcore.errors import Problem

EXAMPLES = 5
"""Dropped rows of one reason that the report tells of in words."""


@dataclass(slots=True)
class DroppedRows:
    """Rows that can't be used: all are counted, some are told of in words.

    Attributes:
        counts: How many, by reason.
        without_value: Of rows that the run has no value for, by reason and source: how many, and where the first is.
        told: Reason and finding of the first `MAX_LISTED`, and of the first `EXAMPLES` of each reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    told: list[tuple[str, Problem]] = field(default_factory=list)
    without_value: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, problem: Problem) -> None:
        """Count a row."""
        self.counts[reason] += 1
        self._tell(reason, problem, self.counts[reason])
        if reason in NO_VALUE.values():
            source, _, line = problem.subject.rpartition(": ")[0].replace("#", ":").rpartition(":")
            self._count_without((reason, source), 1, line)

    def merge(self, later: DroppedRows) -> None:
        """Count the rows of a part behind this one."""
        before = Counter(self.counts)
        for key, (count, line) in later.without_value.items():
            self._count_without(key, count, line)
        self.counts.update(later.counts)
        for reason, problem in later.told:
            before[reason] += 1
            self._tell(reason, problem, before[reason])

    def _tell(self, reason: str, problem: Problem, number: int) -> None:
        if number <= EXAMPLES or len(self.told) < MAX_LISTED:
            self.told.append((reason, problem))

    def _count_without(self, key: tuple[str, str], count: int, line: str) -> None:
        before, first = self.without_value.get(key, (0, line))
        self.without_value[key] = (before + count, first)

    def as_report(self) -> dict[str, Any]:
        """Count and examples of each reason, the most frequent first."""
        return {
            reason: {
                "count": count,
                "examples": [str(problem) for of, problem in self.told if of == reason][:EXAMPLES],
            }
            for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        }

    def problems(self, config: DataConfig) -> list[Problem]:
        """What the run does not allow for: more rows than its budget, and any that it has no value for."""
        wanting = [
            Problem(
                f"{source}: {count} rows hold {{{{{name}}}}} (first: line {line})",
                f"{FIELD_OF[name]} to be set",
                "nothing",
            )
            for name, reason in sorted(NO_VALUE.items())
            for (of, source), (count, line) in self.without_value.items()
            if of == reason
        ]
        told = [problem for reason, problem in self.told if reason not in NO_VALUE.values()]
        num_broken = sum(count for reason, count in self.counts.items() if reason not in NO_VALUE.values())
        if num_broken <= config.max_dropped_rows:
            return wanting
        first = [over_budget(num_broken, config)] if config.max_dropped_rows else []
        more = [Problem(f"and {num_broken - len(told)} more rows")] if num_broken > len(told) else []
        return [*wanting, *first, *told, *more]
