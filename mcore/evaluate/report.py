"""Base against tuned model for people: a Markdown page, and a table for a terminal. Imports neither torch nor vLLM."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mcore.evaluate.compare import flat_metrics, to_json
from mcore.evaluate.comparison import (
    COMPARISON,
    CaseComparison,
    Comparison,
    GateResult,
    GroupComparison,
    SetComparison,
    Side,
    shortened,
)
from mcore.folders import whole_folder

PAGE = "comparison.md"
METRICS = "metrics.json"
MARKDOWN_CHARACTERS = 200
"""Longest answer on the page; `comparison.json` has all of it."""
TERMINAL_CHARACTERS = 90
"""Longest answer in the terminal."""

_FORGETTING = " (forgetting)"
_ESCAPES = str.maketrans({"<": "&lt;", ">": "&gt;"} | {character: f"\\{character}" for character in "\\`*_[]|#~"})


def write_comparison(comparison: Comparison, output: Path, *, overwrite: bool = False) -> None:
    """Write `comparison.json`, `comparison.md` and `metrics.json` into a new folder, whatever the gates say.

    Raises:
        ConfigError: The folder exists and may not be overwritten.
    """
    with whole_folder(output, overwrite=overwrite) as folder:
        (folder / COMPARISON).write_text(to_json(comparison))
        (folder / PAGE).write_text(markdown(comparison))
        (folder / METRICS).write_text(json.dumps(flat_metrics(comparison), indent=2))


def markdown(comparison: Comparison) -> str:
    """The page: figures by group, gates, regressions, and both answers to every case."""
    lines = [
        f"# Base against tuned: {comparison.base.suite}",
        "",
        "| group | cases | base | tuned | change | 95 % interval | lost | gained |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
        *(_group_row(group) for group in comparison.groups),
        _total_row(comparison),
        "",
        *(f"{line}\n" for line in (_perplexity_line(comparison), _engine_line(comparison)) if line),
    ]
    if comparison.perplexity_sets:
        lines += [
            "| perplexity set | rows | tokens | base | tuned | ratio | 95 % interval |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
            *(_set_row(one) for one in comparison.perplexity_sets),
            "",
        ]
    if comparison.gates:
        lines += ["## Gates", "", "| gate | judged | limit | found | |", "| --- | --- | ---: | ---: | --- |"]
        lines += [
            f"| `{gate.gate}` | {gate.subject} | {gate.limit:g} | {gate.found:.4g} | {_verdict(gate)} |"
            for gate in comparison.gates
        ]
        lines.append("")
    if comparison.regressions:
        lines += ["## Regressions", "", "The base model passes these and the tuned model does not.", ""]
        lines += [
            f"- {case.group} {case.case}, {_cell(case.prompt)}: the answer {'; '.join(map(_cell, case.tuned_failures))}"
            for case in comparison.regressions
        ]
        lines.append("")
    for group in comparison.groups:
        lines += [f"## {group.group}", "", "| question | base | tuned |", "| --- | --- | --- |"]
        lines += [
            f"| {_cell(case.prompt)} | {_mark(case.base_passed)} {_cell(case.base_answer)} "
            f"| {_mark(case.tuned_passed)} {_cell(case.tuned_answer)} |"
            for case in _cases_of(comparison, group)
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def side_by_side(comparison: Comparison, *, cases_per_group: int | None = None) -> RenderableType:
    """The same for a terminal, to print with a rich console.

    Args:
        comparison: What to show.
        cases_per_group: Cases to show of each group, regressions first; all if not given.
    """
    table = Table(box=box.ROUNDED, expand=True)
    table.add_column("question", ratio=3)
    table.add_column("base", ratio=5)
    table.add_column("tuned", ratio=5)
    for group in comparison.groups:
        table.add_section()
        table.add_row(
            Text(group.group, style="bold"),
            Text(f"{group.base_passed} of {group.num_cases} passed", style="bold"),
            Text(f"{group.tuned_passed} of {group.num_cases} passed", style="bold"),
            end_section=True,
        )
        cases = _cases_of(comparison, group)
        shown = cases
        if cases_per_group is not None:
            shown = sorted(cases, key=lambda case: case not in comparison.regressions)[:cases_per_group]
        for case in shown:
            table.add_row(
                Text(shortened(case.prompt, TERMINAL_CHARACTERS)),
                _answer(case.base_passed, case.base_answer),
                _answer(case.tuned_passed, case.tuned_answer),
            )
        if len(shown) < len(cases):
            table.add_row(Text(f"… and {len(cases) - len(shown)} more", style="dim"), "", "")
    parts: list[RenderableType] = [table]
    perplexity = _perplexity_line(comparison)
    if perplexity:
        parts.append(Text(perplexity))
    parts += [
        Text(
            f"{gate.gate} of {gate.subject}: {gate.found:.4g}, limit {gate.limit:g}, {_verdict(gate)}",
            style="green" if gate.passed else "bold red",
        )
        for gate in comparison.gates
    ]
    return Group(*parts)


def _cases_of(comparison: Comparison, group: GroupComparison) -> list[CaseComparison]:
    return [case for case in comparison.cases if case.group == group.group]


def _group_row(group: GroupComparison) -> str:
    interval = ""
    if group.change_interval is not None:
        low, high = (round(100 * end, 1) for end in group.change_interval)
        interval = f"{low:+.1f} to {high:+.1f}"
    return (
        f"| {group.group}{_FORGETTING if group.forgetting else ''} | {group.num_cases} "
        f"| {_share(group.base_passed, group.num_cases)} "
        f"| {_share(group.tuned_passed, group.num_cases)} | {_points(-group.regression)} | {interval} "
        f"| {group.lost} | {group.gained} |"
    )


def _set_row(one: SetComparison) -> str:
    low, high = one.ratio_interval
    return (
        f"| {one.name}{_FORGETTING if one.forgetting else ''} | {one.num_rows} | {one.num_tokens} | {one.base:.3f} "
        f"| {one.tuned:.3f} | {one.ratio:.3f} | {low:.3f} to {high:.3f} |"
    )


def _total_row(comparison: Comparison) -> str:
    base, tuned = comparison.base, comparison.tuned
    change = Fraction(tuned.num_passed, tuned.num_cases) - Fraction(base.num_passed, base.num_cases)
    return (
        f"| **all** | **{tuned.num_cases}** | **{_share(base.num_passed, base.num_cases)}** "
        f"| **{_share(tuned.num_passed, tuned.num_cases)}** | **{_points(change)}** | "
        f"| {sum(group.lost for group in comparison.groups)} | {sum(group.gained for group in comparison.groups)} |"
    )


def _points(change: Fraction) -> str:
    """A change of a pass rate in percentage points; without a sign where it rounds to none."""
    points = round(float(100 * change), 1)
    return f"{points:+.1f} points" if points else "0.0 points"


def _share(num_passed: int, num_cases: int) -> str:
    return f"{num_passed} ({100 * num_passed / num_cases:.0f} %)"


def _perplexity_line(comparison: Comparison) -> str:
    if comparison.perplexity_ratio is None:
        return ""
    return (
        f"Perplexity over {comparison.base.num_perplexity_tokens} held-out tokens: base "
        f"{comparison.base.perplexity:.3f}, tuned {comparison.tuned.perplexity:.3f} "
        f"({comparison.perplexity_ratio:.3f} of the base's)."
    )


def _engine_line(comparison: Comparison) -> str:
    engines = [
        f"vLLM {side.vllm_version} on {side.device} in {side.dtype}" for side in (comparison.base, comparison.tuned)
    ]
    asked = f"Greedy answers, at most {comparison.base.max_tokens} tokens: " + (
        f"{engines[0]}." if engines[0] == engines[1] else f"base with {engines[0]}, tuned with {engines[1]}."
    )
    speeds = [f"{name} {speed}" for name in ("base", "tuned") if (speed := _speed(getattr(comparison, name)))]
    return f"{asked} All questions at once: {'; '.join(speeds)}." if speeds else asked


def _speed(side: Side) -> str:
    if side.answer_tokens_per_s is None:
        return ""
    first = "" if side.first_token_s is None else f", first token after {side.first_token_s:g} s (median)"
    return f"{side.answer_tokens_per_s:.0f} tokens/s{first}"


def _verdict(gate: GateResult) -> str:
    return "passed" if gate.passed else "FAILED"


def _mark(passed: bool) -> str:
    return "✓" if passed else "✗"


def _answer(passed: bool, answer: str) -> Text:
    return Text.assemble((f"{_mark(passed)} ", "green" if passed else "red"), shortened(answer, TERMINAL_CHARACTERS))


def _cell(text: str) -> str:
    """Text that can't break out of a Markdown table cell or list item."""
    return shortened(text, MARKDOWN_CHARACTERS).translate(_ESCAPES)
