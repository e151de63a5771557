"""How far a training run is, by the files that it writes while it works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mcore.launch import tail_of


def latest_step(metrics_file: Path) -> dict[str, Any] | None:
    """The last training record of `metrics.jsonl`; only the end of the file is read."""
    if not metrics_file.exists():
        return None
    for line in reversed(tail_of(metrics_file).splitlines()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut at either end
        if isinstance(record, dict) and "loss" in record:
            return record
    return None


def planned_iterations(output: Path) -> int | None:
    """How many steps the run makes, as training wrote it into its fingerprint; None before it did."""
    try:
        num_iters: int = json.loads((output / "fingerprint.json").read_text())["train"]["train_iters"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return num_iters
