"""Time is up, or nothing moves."""

import time
from pathlib import Path

import pytest

from mcore.supervise import limits
from mcore.supervise.limits import Limits


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LOOK_EVERY_S", 0.01)


def test_without_limits_none_is_exceeded(tmp_path: Path) -> None:
    watched = Limits(None, None, [tmp_path / "absent"])
    time.sleep(0.05)
    assert watched.exceeded() is None


def test_the_time_is_up() -> None:
    watched = Limits(0.1, None, [])
    assert watched.exceeded() is None
    time.sleep(0.11)
    assert watched.exceeded() == "timeout"


def test_a_file_that_appears_and_grows_and_a_folder_with_new_entries_are_progress(tmp_path: Path) -> None:
    file, folder = tmp_path / "metrics.jsonl", tmp_path / "output"
    watched = Limits(None, 0.3, [file, folder])
    steps = [file.touch, lambda: file.write_text("1"), folder.mkdir, (folder / "iter_1").mkdir]
    for step in steps:
        time.sleep(0.2)
        step()  # type: ignore[operator]
        assert watched.exceeded() is None
    time.sleep(0.31)
    assert watched.exceeded() == "stalled"
