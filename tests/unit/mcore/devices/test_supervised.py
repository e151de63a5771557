"""Commands that need devices: one after the other where there are not enough, and told so. Real supervisors."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mcore import launch
from mcore.devices import Request
from mcore.errors import InfrastructureError
from mcore.supervise.record import read_record
from tests.unit.mcore.test_launch import wait_until

# Two processes a command, as a training of two ranks is; each writes when it begins and when it ends.
RANKS = """
import os, sys, time
ranks = []
for _ in range(2):
    if (pid := os.fork()) == 0:
        begin = time.monotonic()
        time.sleep(float(sys.argv[2]))
        with open(sys.argv[1], "a") as file:
            file.write(f"{sys.argv[3]} {begin} {time.monotonic()}\\n")
        os._exit(0)
    ranks.append(pid)
for pid in ranks:
    os.waitpid(pid, 0)
"""


@pytest.fixture
def request_of(tmp_path: Path):
    return lambda count, holder, slots=2: Request(count, tmp_path / "locks", holder, None, slots)


class Cancelled(Exception):
    pass


@contextmanager
def under_way(
    folder: Path, request: Request, argv: list[str], **options
) -> Iterator[tuple[list[str], threading.Event]]:
    """A command that runs in a thread; its lines, and what cancels it. It is at its end behind the block."""
    lines: list[str] = []
    cancel = threading.Event()

    def check() -> None:
        if cancel.is_set():
            raise Cancelled

    def work() -> None:
        try:
            launch.run(
                argv, log_path=folder / "stage.log", error_file=folder / "error.json", devices=request,
                on_line=lines.append, on_tick=check, **options,
            )  # fmt: skip
            lines.append("done")
        except (Cancelled, InfrastructureError) as error:
            lines.append(type(error).__name__)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lines, cancel
        thread.join(30)
        assert not thread.is_alive()
    finally:
        cancel.set()
        thread.join(30)


def ranks(output: Path, seconds: float, name: str) -> list[str]:
    return [sys.executable, "-S", "-c", RANKS, str(output), str(seconds), name]


def test_two_of_two_processes_each_on_two_slots_run_one_after_the_other(tmp_path: Path, request_of) -> None:
    output = tmp_path / "times"
    with (
        under_way(tmp_path / "a", request_of(2, "run a, train"), ranks(output, 1.0, "a")) as (lines_a, _),
        under_way(tmp_path / "b", request_of(2, "run b, train"), ranks(output, 1.0, "b"), timeout_s=1.8) as (
            lines_b,
            _,
        ),
    ):
        pass
    assert lines_a[-1] == lines_b[-1] == "done", "time that is spent in waiting counts for no limit"
    times = sorted((float(begin), float(end), name) for name, begin, end in map(str.split, output.open()))
    assert len(times) == 4 and times[0][2] == times[1][2] != times[2][2] == times[3][2]
    assert max(end for _, end, _ in times[:2]) <= min(begin for begin, _, _ in times[2:])
    first, second = (lines_a, lines_b) if times[0][2] == "a" else (lines_b, lines_a)
    assert first == ["[supervisor] on slot 0, slot 1", "done"]
    holder = times[0][2]
    assert second[0] == (
        f"[supervisor] waiting for 2 devices: slot 0 is held by run {holder}, train; "
        f"slot 1 is held by run {holder}, train"
    )


def test_those_that_fit_beside_each_other_run_at_once(tmp_path: Path, request_of) -> None:
    output = tmp_path / "times"
    with (
        under_way(tmp_path / "a", request_of(2, "a", 4), ranks(output, 1.5, "a")),
        under_way(tmp_path / "b", request_of(2, "b", 4), ranks(output, 1.5, "b")),
    ):
        pass
    spans = [(float(begin), float(end)) for _, begin, end in map(str.split, output.open())]
    assert max(begin for begin, _ in spans) < min(end for _, end in spans)


def test_a_kill_of_the_holder_frees_its_devices(tmp_path: Path, request_of) -> None:
    output = tmp_path / "times"
    with under_way(tmp_path / "a", request_of(2, "a"), ranks(output, 600, "a")) as (lines_a, _):
        wait_until(lambda: lines_a == ["[supervisor] on slot 0, slot 1"])
        with under_way(tmp_path / "b", request_of(2, "b"), ranks(output, 0.1, "b")) as (lines_b, _):
            wait_until(lambda: bool(lines_b))
            assert "waiting for 2 devices" in lines_b[0]
            record = read_record(tmp_path / "b" / launch.RECORD)
            assert record is not None and record.is_alive(), "who waits is alive"
            os.kill(read_record(tmp_path / "a" / launch.RECORD).supervisor.pid, signal.SIGKILL)
        assert lines_b[-1] == "done"
    assert lines_a[-1] == "InfrastructureError"


def test_a_cancel_is_heard_while_waiting(tmp_path: Path, request_of) -> None:
    output = tmp_path / "times"
    with under_way(tmp_path / "a", request_of(1, "a"), ranks(output, 600, "a")) as (lines_a, cancel_a):
        wait_until(lambda: bool(lines_a))
        with under_way(tmp_path / "b", request_of(2, "b"), ranks(output, 0.1, "b")) as (lines_b, cancel_b):
            wait_until(lambda: bool(lines_b))
            begin = time.monotonic()
            cancel_b.set()
        assert lines_b[-1] == "Cancelled" and time.monotonic() - begin < 5
        assert not read_record(tmp_path / "b" / launch.RECORD).is_alive()
        cancel_a.set()
    assert not output.exists(), "neither came to its end"


def test_gpus_are_named_to_the_command_and_to_nobody_else(
    tmp_path: Path, request_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    rows = "".join(
        f"echo '{number}, GPU-{number:08d}, 81559, {used}, 570.1, H100'\n" for number, used in enumerate((9, 70000, 3))
    )
    program.write_text(f"#!/bin/sh\n{rows}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = tmp_path / "seen"
    show = [
        sys.executable,
        "-S",
        "-c",
        "import os, sys; open(sys.argv[1], 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])",
    ]
    with under_way(tmp_path / "a", request_of(2, "a", None), [*show, str(seen)]) as (lines, _):
        pass
    assert lines == ["[supervisor] on GPU 0, GPU 2", "done"] and seen.read_text() == "0,2"
