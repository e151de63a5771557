"""Figures as people read them."""

import pytest

from mcore.wording import counted, duration, moment, seconds_between, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.97, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3.2e9, "3.2 GB"), (4.5e15, "4500.0 TB")]
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_moments() -> None:
    assert moment("2026-11-24T07:22:59.123456+00:00") == "2026-11-24 07:22"
    assert seconds_between("2026-11-24T07:22:00+00:00", "2026-11-24T07:23:30.5+00:00") == 90.5
    assert seconds_between("2026-11-24T07:22:00+00:00") > 0


def test_plurals() -> None:
    assert [counted(number, "run") for number in range(3)] == ["0 runs", "1 run", "2 runs"]
