"""Runs beside each other: what they came to, and what is other in their settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.run_state import read_manifest
from mcore.artifacts import Store
from mcore.runs import RunRecord

FIGURES = {
    "iterations": ("train", "iterations"),
    "tokens": ("train", "tokens"),
    "final loss": ("train", "final_loss"),
    "best validation loss": ("train", "best_validation_loss"),
    "last validation loss": ("train", "last_validation_loss"),
    "tokens/s": ("train", "tokens_per_s"),
    "chosen iteration": ("select", "iteration"),
    "error of logits": ("verify_export", "relative_error"),
    "pass rate of base": ("compare", "base_pass_rate"),
    "pass rate of tuned": ("compare", "tuned_pass_rate"),
    "perplexity ratio": ("compare", "perplexity_ratio"),
    "regressions": ("compare", "num_regressions"),
    "failed gates": ("compare", "num_failed_gates"),
}
"""What is shown of a run: the stage, and the figure in its manifest."""


def figures(store: Store, record: RunRecord) -> dict[str, Any]:
    """What a run came to, as far as it came; what is not there is left out."""
    told = record.state not in {"running", "lost"}  # the others could not say how far they came
    by_name = {stage.name: stage for stage in record.stages if stage.name in record.outcomes or not told}
    found: dict[str, Any] = {}
    for name, (stage, figure) in FIGURES.items():
        manifest = read_manifest(store, by_name[stage]) if stage in by_name else None
        if manifest is not None and manifest.metrics.get(figure) is not None:
            found[name] = manifest.metrics[figure]
    return found


def config_differences(records: list[RunRecord]) -> dict[str, list[Any]]:
    """Settings in which runs differ, by their dotted names: the value of each run, None where it has none."""
    flat = [_flat(record.config) for record in records]
    names = sorted({name for one in flat for name in one} - {"name"})
    values = {name: [one.get(name) for one in flat] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def shown(value: Any) -> str:
    """A figure with four digits that count; nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
