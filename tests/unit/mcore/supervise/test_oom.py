"""The kernel's count of kills for want of memory, as far as a test may go: it is there and does not shrink."""

from pathlib import Path

import pytest

from mcore.supervise import oom


def test_the_count_is_the_kernels_own() -> None:
    assert "oom_kill " in Path("/proc/vmstat").read_text()
    before = oom.oom_kills()
    assert 0 <= before <= oom.oom_kills()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
)
def test_the_control_groups_count_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str
) -> None:
    (tmp_path / file).write_text(text)
    monkeypatch.setattr(oom, "_of_control_group", lambda: [tmp_path / "absent", tmp_path / file])
    assert oom.oom_kills() == 2
