"""A command outlives the process that had it started only if another one takes it over. All with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mcore import launch
from mcore.attach import command_digest
from mcore.errors import InfrastructureError, LaunchError
from mcore.leases import Lease, acquire
from mcore.supervise import claims
from mcore.supervise.claims import Claim, link_claim, newest_claim
from mcore.supervise.processes import ProcessId
from mcore.supervise.record import read_record

RUN = """
import sys
from pathlib import Path
from mcore import launch
from mcore.leases import held
folder, name, reattach_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with held(folder / "lease", run=name, log_folder=folder / name) as lease:
    launch.run([*sys.argv[4:]], log_path=folder / name / "stage.log", error_file=folder / name / "error.json",
               lease=lease, reattach_s=reattach_s, grace_s=1)
"""
"""Holds the lease and runs the command, as a flow does."""

Start = Callable[..., subprocess.Popen[bytes]]

COMMAND = """
import os, sys, time
with open("starts", "a") as file:
    file.write(f"{os.getpid()} ")
print("at work", flush=True)
while not os.path.exists("go"):
    time.sleep(0.02)
print("done", flush=True)
sys.exit(int(open("go").read() or 0))
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(launch.__file__).parents[1]))
    return tmp_path


def command(log_folder: str) -> list[str]:
    return [sys.executable, "-S", "-c", COMMAND, f"{Path(log_folder).absolute()}/run.yaml"]


@pytest.fixture
def start() -> Iterator[Start]:
    started = []

    def run(name: str, reattach_s: float = 0.0) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", RUN, str(Path.cwd()), name, str(reattach_s), *command(name)]
        started.append(subprocess.Popen(words, stderr=subprocess.DEVNULL))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def starts() -> list[int]:
    file = Path("starts")
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def is_alive(pid: int) -> bool:
    try:
        return ProcessId.of(pid).is_alive()
    except ProcessLookupError:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def lease_of(run: str) -> Lease:
    return acquire(Path.cwd() / "lease", run=run, timeout_s=10)


def go_on(lease: Lease, **options: object) -> list[str]:
    """What the process that took the lease over is told by the command, run to its end."""
    told: list[str] = []
    folder = Path.cwd() / "second"
    launch.run(
        command("second"), log_path=folder / "stage.log", error_file=folder / "error.json", lease=lease,
        on_line=told.append, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    return told


def kill_while_it_works(process: subprocess.Popen[bytes]) -> None:
    wait_until(starts)
    process.kill()
    process.wait()


def test_who_waits_goes_on_with_the_command_of_who_was_killed(start: Start) -> None:
    first = start("first")
    wait_until(starts)
    second = start("second")
    wait_until(lambda: claims.has_heir(Path("lease").absolute()))
    kill_while_it_works(first)
    wait_until(lambda: (claim := newest_claim(Path("lease"))) and claim.run == "second")
    time.sleep(1.2)  # a look at the lease later
    (pid,) = starts()
    assert is_alive(pid)
    Path("go").touch()
    assert second.wait(15) == 0 and starts() == [pid]
    assert "its output is in" in Path("second/stage.log").read_text()
    assert Path("first/stage.log").read_text().endswith("done\n")


def test_the_same_run_started_again_finds_the_command_where_it_is(
    start: Start,
) -> None:
    kill_while_it_works(start("first", 30.0))
    time.sleep(0.5)
    lease = lease_of("second")
    assert lease.adopted is not None
    told = go_on(lease, on_tick=Path("go").touch)
    assert len(starts()) == 1 and told[0].startswith("going on with") and told[-1] == "done"


def test_how_the_command_ends_is_an_error_of_who_took_it_over(start: Start) -> None:
    kill_while_it_works(start("first", 30.0))
    with pytest.raises(LaunchError, match="exit status 7") as caught:
        go_on(lease_of("second"), on_tick=lambda: Path("go").write_text("7"))
    assert caught.value.tail.endswith("done") and len(starts()) == 1


def test_a_supervisor_that_is_lost_then_leaves_nothing(start: Start) -> None:
    kill_while_it_works(start("first", 30.0))
    lease = lease_of("second")
    assert lease.adopted is not None
    supervisor = lease.adopted.supervisor.pid
    with pytest.raises(InfrastructureError, match="lost its supervisor"):
        go_on(lease, on_tick=lambda: os.kill(supervisor, signal.SIGKILL))
    (pid,) = starts()
    wait_until(lambda: not is_alive(pid))


def test_the_duty_to_end_it_goes_over_too(start: Start) -> None:
    kill_while_it_works(start("first", 30.0))

    def cancelled() -> None:
        raise KeyError("cancelled")

    lease = lease_of("second")
    with pytest.raises(KeyError):
        go_on(lease, on_tick=cancelled)
    (pid,) = starts()
    assert not is_alive(pid) and not claims.works(lease.folder)


def test_without_leave_to_go_on_it_is_ended_and_started_again(start: Start) -> None:
    kill_while_it_works(start("first"))
    time.sleep(0.3)  # or the supervisor, which looks twenty times a second, works for the second without a break
    lease = lease_of("second")
    assert lease.adopted is None and not is_alive(starts()[0]) and not claims.works(lease.folder)
    told = go_on(lease, on_tick=Path("go").touch)
    assert len(starts()) == 2 and told[-1] == "done"


def test_it_ends_when_the_last_who_could_want_it_is_gone(start: Start) -> None:
    first = start("first")
    wait_until(starts)
    second = start("second")
    wait_until(lambda: claims.has_heir(Path("lease").absolute()))
    kill_while_it_works(first)
    wait_until(lambda: (claim := newest_claim(Path("lease"))) and claim.run == "second")
    time.sleep(1.2)
    (pid,) = starts()
    assert is_alive(pid)
    second.kill()
    second.wait()
    wait_until(lambda: not is_alive(pid))
    wait_until(lambda: not claims.works(Path("lease")))


def test_another_command_of_the_stage_is_not_mistaken_for_it(start: Start) -> None:
    kill_while_it_works(start("first", 30.0))
    lease, folder = lease_of("second"), Path.cwd() / "second"
    log = folder / "stage.log"
    launch.run(["echo", "other"], log_path=log, error_file=folder / "error.json", lease=lease)
    assert not is_alive(starts()[0]) and "other" in log.read_text()


def test_a_command_whose_lease_another_machine_took_is_killed_at_once(
    start: Start,
) -> None:
    start("first")
    wait_until(starts)
    (pid,) = starts()
    folder = Path.cwd() / "lease"
    far = Claim(2, replace(ProcessId.of(os.getpid()), machine="another boot"), "node2")
    assert link_claim(folder, far)
    wait_until(lambda: not is_alive(pid))
    wait_until(lambda: (record := read_record(Path("first/process.json"))) and record.status)
    record = read_record(Path("first/process.json"))
    assert record is not None and (record.cause, record.status) == ("fenced", 128 + signal.SIGKILL)


def test_a_supervisor_that_starts_behind_a_takeover_starts_nothing() -> None:
    lease = lease_of("slow")
    assert link_claim(lease.folder, replace(lease.claim, token=2))
    with pytest.raises(InfrastructureError, match="SIGTERM"):
        go_on(lease)
    assert not starts()


def test_where_the_log_goes_makes_no_other_command() -> None:
    assert command_digest(command("a"), Path("a").absolute()) == command_digest(command("b"), Path("b").absolute())
    assert command_digest(["x", "1"], Path("a")) != command_digest(["x", "2"], Path("a"))
