"""The data part of the page: digests of the run's files, and the data report if a stage wrote one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tasks.run_page.charts import bars
from tasks.run_page.facts import RunFacts

EXAMPLES = 3
"""Examples of a reason that are shown; the data report has more."""
FIGURES = {
    "rows": "rows",
    "samples": "training samples",
    "validation_samples": "validation samples",
    "tokens": "tokens",
    "trained_tokens": "trained tokens",
    "trained_share": "share of trained tokens",
    "longest": "tokens of the longest sample",
    "duplicates": "copies of other rows",
    "overlap_with_validation": "rows for training and validation",
    "overlap_with_evaluation": "rows for training and evaluation",
}
"""Figures of the data report, and what they are called here."""


def data_parts(facts: RunFacts) -> dict[str, Any]:
    """Variables of the template for the data part."""
    files = [
        (name, *_digest_and_rows(str(entry)))
        for stage in facts.reached
        if stage.record.kind in ("prepare", "train") and stage.manifest
        for name, value in stage.manifest.ingredients.get("config", {}).items()
        if name.endswith("dataset") and isinstance(value, list)
        for entry in value
    ]
    report = facts.data_report
    lengths = bars("Samples by length", _lengths(report.get("lengths")), "tokens")
    figures = [(words, _shown(report[name])) for name, words in FIGURES.items() if report.get(name) is not None]
    over_length = report.get("over_length")
    if isinstance(over_length, Mapping):
        figures += [(f"too long, {name.replace('_', ' ')}", _shown(number)) for name, number in over_length.items()]
    return {
        "data_files": files,
        "data_figures": figures,
        "sources": _sources(report.get("sources")),
        "dropped": _dropped(report.get("dropped")),
        "lengths": lengths,
        "fill": _fill(report.get("packed_fill")),
        "has_data": bool(files or report),
    }


def _digest_and_rows(entry: str) -> tuple[str, str]:
    digest, _, rows = entry.partition("#")
    return digest, rows or "all"


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _sources(sources: Any) -> tuple[list[str], list[list[str]]] | None:
    """Heads and rows of a table of sources: a mapping by name, or a list of mappings or names."""
    if isinstance(sources, Mapping):
        sources = [
            {"source": name, **(of if isinstance(of, Mapping) else {"rows": of})} for name, of in sources.items()
        ]
    if not isinstance(sources, list) or not sources:
        return None
    rows = [of if isinstance(of, Mapping) else {"source": of} for of in sources]
    heads = list(dict.fromkeys(str(name) for row in rows for name in row))
    return heads, [[_shown(row[name]) if name in row else "" for name in heads] for row in rows]


def _dropped(dropped: Any) -> list[tuple[str, str, str]]:
    if not isinstance(dropped, Mapping):
        return []
    rows = []
    for reason, of in dropped.items():
        found = of if isinstance(of, Mapping) else {"count": of}
        examples = found.get("examples") or []
        told = "\n".join(_shown(example) for example in examples[:EXAMPLES]) if isinstance(examples, list) else ""
        rows.append((str(reason), _shown(found.get("count", "")), told))
    return rows


def _fill(fill: Any) -> list[tuple[str, str]]:
    """Share of places in packed rows that hold a token, by the samples of a step."""
    if not isinstance(fill, Mapping):
        return []
    return [(str(step), f"{share:.2%}") for step, share in fill.items() if isinstance(share, int | float)]


def _lengths(lengths: Any) -> list[tuple[str, float]]:
    """Counts by length: a mapping of label to count, or pairs."""
    pairs = lengths.items() if isinstance(lengths, Mapping) else lengths if isinstance(lengths, list) else []
    return [
        (str(pair[0]), float(pair[1]))
        for pair in pairs
        if isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], int | float)
    ]
