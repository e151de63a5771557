"""Leases between real processes: one holder at a time, none that a kill leaves behind, no clock that matters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mcore import leases
from mcore.artifacts import Store
from mcore.errors import ArtifactError, FencedError
from mcore.leases import acquire, held, holder
from mcore.supervise import claims
from mcore.supervise.claims import Claim, Work, begin_work, link_claim, newest_claim, newest_token
from mcore.supervise.processes import ProcessId

HOLD = """
import sys, time
from pathlib import Path
from mcore.leases import held
with held(Path(sys.argv[1]), run="first"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store" / ".leases" / "train-k"


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def elsewhere(folder: Path, token: int = 1) -> Claim:
    """A claim of a process of another machine that has the number of this one."""
    claim = Claim(token, replace(ProcessId.of(os.getpid()), machine="another boot"), "node2", run="far")
    assert link_claim(folder, claim)
    return claim


def commit(store: Store, lease: leases.Lease) -> None:
    partial = store.partial("train", "k")
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "weights").write_text("weights")
    nothing: dict[str, dict[str, str]] = {
        name: {} for name in ("inputs", "input_content", "ingredients", "metrics", "versions")
    }
    store.commit("train", "k", **nothing, duration_s=0, lease=lease)


def test_tokens_rise_and_the_newest_says_who_has_it(folder: Path) -> None:
    assert holder(folder) is None
    for token in (1, 2, 3):
        with held(folder, run="a") as lease:
            assert lease.claim.token == token
            found = holder(folder)
            assert found is not None and (found.run, found.process.pid) == ("a", os.getpid())
        assert holder(folder) is None and newest_token(folder) == token
    assert sum(path.suffix in claims.CLAIMS for path in folder.iterdir()) == 1, "earlier ones are forgotten"


def test_kill_9_of_the_holder_frees_it_at_once(folder: Path) -> None:
    with process(HOLD, folder) as first:
        assert says(first) == "held"
        with pytest.raises(ArtifactError, match="held by another run"):
            acquire(folder, timeout_s=0.3)
        first.send_signal(signal.SIGKILL)
        first.wait()
        begin = time.monotonic()
        with held(folder, timeout_s=5) as lease:
            assert time.monotonic() - begin < 1 and lease.claim.token == 2
            assert lease.before is not None and lease.before.run == "first" and not lease.before.is_free


def test_kill_9_of_one_who_waits_is_forgotten(folder: Path) -> None:
    with process(HOLD, folder) as first:
        says(first)
        with process(HOLD, folder) as second:
            wait_until(lambda: claims.has_heir(folder))
            second.send_signal(signal.SIGKILL)
            second.wait()
            assert not claims.has_heir(folder)
        with pytest.raises(ArtifactError):
            acquire(folder, timeout_s=0.3)
        assert not list(folder.glob("waits-*")), "who comes next takes the rest away"
        first.kill()
    with held(folder, timeout_s=5):
        pass


def test_what_a_kill_left_unnamed_goes_when_nobody_can_want_it_any_more(folder: Path) -> None:
    with held(folder):
        pass
    old, new = folder / ".old", folder / ".new"
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (0, time.time() - 2 * claims.LEFT_AFTER_S))
    with held(folder):
        assert not old.exists() and new.exists(), "the new one may be about to be linked"


def test_what_failed_is_told_to_who_takes_it_next(folder: Path) -> None:
    with pytest.raises(ArtifactError), held(folder):
        raise ArtifactError("the disk is full", ["/store"])
    with held(folder) as lease:
        assert lease.before is not None and lease.before.told == "ArtifactError: the disk is full"


RACE = """
import sys, time
from pathlib import Path
from mcore.errors import ArtifactError
from mcore.leases import acquire
for line in sys.stdin:
    folder, begin = line.split()
    while time.monotonic() < float(begin):
        pass
    try:
        lease = acquire(Path(folder), timeout_s=0)
        print("won", lease.claim.token, flush=True)
    except ArtifactError:
        print("lost 0", flush=True)
"""


def test_of_two_who_race_for_the_lease_of_a_dead_holder_exactly_one_wins_fifty_times(folder: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    dead = subprocess.Popen(["true"])
    gone = ProcessId.of(dead.pid)
    dead.wait()
    winners = []
    try:
        for number in range(50):
            place = folder.with_name(f"train-{number}")
            assert link_claim(place, Claim(7, gone, "here"))
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(f"{place} {time.monotonic() + 0.01}\n")
                racer.stdin.flush()
            answers = [says(racer) for racer in racers]
            assert sorted(answers) == ["lost 0", "won 8"], (number, answers)
            winners.append(answers.index("won 8"))
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    print(f"the first won {winners.count(0)} times")


def test_who_was_taken_over_from_may_not_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LOST_AFTER_S", 0.5)
    monkeypatch.setattr(leases, "HEARTBEAT_S", 600.0)
    store = Store(tmp_path / "store")
    folder = store.lease_folder("train", "k")
    slow = acquire(folder)
    # Seen from another machine, which hears nothing from it.
    claim = json.loads((folder / "00000001.held").read_text())
    claim["process"]["machine"] = "another boot"
    (folder / "00000001.held").write_text(json.dumps(claim))
    quick = acquire(folder, timeout_s=5)
    assert quick.claim.token == 2
    with pytest.raises(FencedError, match="taken over"):
        commit(store, slow)
    assert store.find("train", "k") is None and not store.path("train", "k").exists()
    slow.let_go("late")
    found = holder(folder)
    assert found is not None and found.token == 2, "what it lets go of is not the other's"
    commit(store, quick)
    assert store.find("train", "k") is not None
    quick.let_go()
    assert holder(folder) is None


def test_who_comes_late_with_a_token_that_was_given_and_forgotten_draws_back(folder: Path) -> None:
    for _ in range(3):
        acquire(folder).let_go()
    late = Claim(2, ProcessId.of(os.getpid()), "here")
    assert not link_claim(folder, late) and newest_token(folder) == 3
    assert not link_claim(folder, replace(late, token=3))
    found = newest_claim(folder)
    assert found is not None and found.is_free


@pytest.mark.parametrize("skew_s", [-7200.0, 7200.0])
def test_a_clock_that_is_hours_off_costs_nobody_the_lease(
    folder: Path, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    monkeypatch.setattr(leases, "LOST_AFTER_S", 0.4)
    claim = elsewhere(folder)
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.05):
            with (folder / "00000001.beat").open("r+") as file:
                file.write(f"{time.time() + skew_s:020.6f}")

    alive = threading.Thread(target=live)
    alive.start()
    try:
        with pytest.raises(ArtifactError):
            acquire(folder, timeout_s=0.9)
        assert holder(folder) == claim
    finally:
        over.set()
        alive.join()
    begin = time.monotonic()
    with held(folder, timeout_s=5) as lease:
        assert lease.claim.token == 2 and 0.3 < time.monotonic() - begin < 2


def test_a_holder_of_another_machine_counts_for_a_day_if_nobody_can_wait(folder: Path) -> None:
    elsewhere(folder)
    assert holder(folder) is not None
    (folder / "00000001.beat").write_text(f"{time.time() - leases.FORGOTTEN_AFTER_S - 1:020.6f}")
    assert holder(folder) is None


def test_a_supervisor_at_work_is_adopted_and_one_that_is_ending_waited_for(folder: Path) -> None:
    with process(HOLD, folder) as first:
        says(first)
        supervisor = subprocess.Popen(["sleep", "60"])
        work = Work(1, ProcessId.of(supervisor.pid), "command", "record", "error")
        begin_work(folder, work)
        first.kill()
        first.wait()
        assert holder(folder) is not None, "its command still writes"
        with held(folder, timeout_s=5) as lease:
            assert lease.adopted == work
        claims.begin_to_end(folder, 1)
        with pytest.raises(ArtifactError, match="still worked at"):
            acquire(folder, timeout_s=0.3)
        supervisor.kill()
        supervisor.wait()
        with held(folder, timeout_s=5) as lease:
            assert lease.adopted is None
    assert not (folder / "00000001.ending").exists()


def test_a_full_disk_lets_go_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = acquire(folder)

    def full(*arguments: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    lease.let_go("SavingError: the disk is full")
    assert holder(folder) is None


def test_of_a_claim_that_cannot_be_read_only_signs_of_life_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LOST_AFTER_S", 0.3)
    folder.mkdir(parents=True)
    for token, text in enumerate(("", "nothing", "[]", '{"process": 3}'), start=4):
        (folder / f"{token:08d}.held").write_text(text)
        (folder / f"{token:08d}.free").unlink(missing_ok=True)
        assert holder(folder) is not None
        with pytest.raises(ArtifactError):
            acquire(folder, timeout_s=0.0)
        with held(folder, timeout_s=5) as lease:
            assert lease.claim.token == token + 1
        (folder / f"{token + 1:08d}.free").unlink()
