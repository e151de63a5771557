"""`metrics.jsonl`: one JSON object a line, appended while training runs and read by everything else.

A training line has `iteration`, `loss`, `grad_norm`, `lr`, `step_time_s`, `tokens_per_s`, `mfu` (null on CPU),
`memory_gib`, `consumed_samples`, `consumed_tokens`, `time`. A validation line has `iteration`, `validation_loss`.

A step whose update was left out has `skipped`, which says why, in place of its `loss`. Where the run went back to a
checkpoint, what it undid is dropped, and a line of the next `iteration` has `skipped`, the `bad_iteration` and
`passed_over_samples`. A line with `changed` says what became different while the run was not running.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mcore.folders import write_durably

FILE_NAME = "metrics.jsonl"


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """Append one record. The line is written in one call, so that a reader never sees half of one it can't skip."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of the file, in order; an empty list if there is no file yet.

    A line that a crash cut short is left out.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            records.append(record)
    return records


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop what was logged after `iteration`: a run that resumes there will log it again."""
    kept = [record for record in read_metrics(path) if record["iteration"] <= iteration]
    write_durably(path, "".join(json.dumps(record) + "\n" for record in kept))
