"""Progress in a log file: lines at intervals with an ETA, and a last one."""

import io
import re
import subprocess
import sys

import pytest

from mcore import progress as module
from mcore.progress import progress, say


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_line_is_there_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    say("converting …")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "converting …\n")


def test_a_reader_that_is_gone_fails_no_work() -> None:
    code = "import sys; from mcore.progress import say\nfor n in range(9999): say(str(n)); say('x' * 99, sys.stdout)"
    line = f'{sys.executable} -c "{code}" 2>&1 | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["0", "0"] and done.stderr == ""


def test_lines_come_at_intervals_with_the_time_that_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("convert", total=100, unit="tensors") as advance:
        for _ in range(100):
            clock.now += 0.5
            advance(note="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "convert: 20/100 tensors, 10 s, ETA 40 s, loss 1.5",
        "convert: 40/100 tensors, 20 s, ETA 30 s, loss 1.5",
        "convert: 60/100 tensors, 30 s, ETA 20 s, loss 1.5",
        "convert: 80/100 tensors, 40 s, ETA 10 s, loss 1.5",
        "convert: 100/100 tensors in 50.0 s",
    ]


def test_bytes_are_shown_in_the_unit_that_suits_them(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("export", total=4_000_000_000, unit="bytes") as advance:
        clock.now += 10
        advance(1_500_000_000)
        clock.now += 10
        advance(2_500_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "export: 1.5 GB/4.0 GB, 10 s, ETA 17 s",
        "export: 4.0 GB/4.0 GB in 20.0 s",
    ]


def test_what_a_resumed_run_had_done_does_not_count_for_its_speed(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("train", total=100, unit="steps", done=90) as advance:
        clock.now += 10
        advance()
    assert capsys.readouterr().err.splitlines()[0] == "train: 91/100 steps, 10 s, ETA 90 s"


def test_a_failed_block_does_not_claim_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), progress("convert", total=2):
        raise ValueError
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("convert", total=3, unit="tensors") as advance:
        advance(3, "last.weight")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "convert" in text and "3/3" in text and "last.weight" in text
