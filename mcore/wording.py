"""Figures as people read them: times, sizes, moments."""

from __future__ import annotations

from datetime import UTC, datetime


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """`512 B`, `1.5 kB`, `3.2 GB`, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def moment(iso: str) -> str:
    """`2026-11-24 07:22` of a time in UTC as manifests and records have it."""
    return iso[:16].replace("T", " ")


def seconds_between(start: str, end: str | None = None) -> float:
    """Seconds from one time in UTC, ISO 8601, to another, or until now."""
    until = datetime.now(UTC) if end is None else datetime.fromisoformat(end)
    return (until - datetime.fromisoformat(start)).total_seconds()


def counted(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}{'s' * (number != 1)}"
