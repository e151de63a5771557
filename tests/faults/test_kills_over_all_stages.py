"""kill -9 at seeded random moments over all stages: of the flow, the supervisor, the launcher, a rank, or all of them.

`make test-endurance` draws sixty moments (`MCORE_FLOWS_KILLS`), `MCORE_FLOWS_KILL_SEED` others. After each kill of the
flow no process of it is left; whatever was killed, every artifact that can be seen is whole. In the end the exported
model is the one of a run that nobody disturbed, byte for byte.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

import psutil
import pytest

from mcore.artifacts import Store
from mcore.retention import artifact_folders
from mcore.runs import current
from mcore.supervise.claims import works
from mcore.supervise.processes import all_pids, environment_of
from tests.flows import run_pipeline
from tests.flows.workspace import make_workspace, raw_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(7200)]

NUM_KILLS = int(os.environ.get("MCORE_FLOWS_KILLS", "6"))
SEED = os.environ.get("MCORE_FLOWS_KILL_SEED", "0")
KINDS = ("prepare", "convert", "verify", "train", "select", "export")
TARGETS = ("flow", "supervisor", "launcher", "rank", "all")
MARK = "MCORE_FLOWS_TEST_MARK"
RUN = raw_run(
    evaluate=None,
    train={"train_iters": 120, "save_steps": 20, "eval_steps": 120},
    launch={"retries": 3, "grace_s": 5.0},
)


class Run:
    """The pipeline in one store, started as often as it is killed."""

    def __init__(self, workspace: Path, name: str) -> None:
        self.store = Store(workspace / name)
        self._workspace = workspace
        self._file = workspace / f"{name}.json"
        self._file.write_text(json.dumps(RUN | {"launch": RUN["launch"] | {"store": name}}))
        self._mark = f"{name}-{os.getpid()}"
        self.flow = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self._file.with_suffix(".log").open("a") as log:
            self.flow = subprocess.Popen(
                [sys.executable, run_pipeline.__file__, self._file.name],
                cwd=self._workspace, stdout=log, stderr=log,
                env={**os.environ, "PREFECT_HOME": str(self._workspace / "prefect"), MARK: self._mark},
            )  # fmt: skip
        return self.flow

    def processes(self) -> list[int]:
        """All that came of it and is still alive."""
        found = []
        for pid in all_pids():
            if environment_of(pid).get(MARK.encode()) == self._mark.encode():
                with suppress(psutil.Error):
                    if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                        found.append(pid)
        return found

    def reached(self, kind: str) -> bool:
        """Whether a stage of the kind is being made, or was."""
        return any(self.store.root.glob(f".leases/{kind}-*/*.held")) or any(self.store.root.glob(f"{kind}/*"))

    def victims(self, target: str, draw: random.Random) -> list[int]:
        """Process ids to kill; the flow's if the stage has no such process just now."""
        supervisors = [work.supervisor.pid for folder in self.store.root.glob(".leases/*") for work in works(folder)]
        with suppress(psutil.Error):
            launchers = [child for pid in supervisors for child in psutil.Process(pid).children()]
            ranks = [child for launcher in launchers for child in launcher.children(recursive=True)] or launchers
            if target == "supervisor" and supervisors:
                return supervisors[:1]
            if target == "launcher" and launchers:
                return [launchers[0].pid]
            if target == "rank" and ranks:
                return [draw.choice(ranks).pid]
            if target == "all":
                return [self.flow.pid, *supervisors, *(process.pid for process in (*launchers, *ranks))]
        return [self.flow.pid]

    def exported(self) -> bytes:
        (weights,) = self.store.root.glob("export/*/model.safetensors")
        return weights.read_bytes()

    def log(self) -> str:
        return self._file.with_suffix(".log").read_text()[-5000:]


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("kills")
    make_workspace(folder)
    yield folder


@pytest.fixture(scope="module")
def undisturbed(workspace: Path) -> bytes:
    run = Run(workspace, "undisturbed")
    assert run.flow.wait(500) == 0, run.log()
    return run.exported()


def test_kills_over_all_stages_leave_no_trace(workspace: Path, undisturbed: bytes) -> None:
    draw = random.Random(SEED)
    run = Run(workspace, "killed")
    for number, kind in enumerate(islice(cycle(KINDS), NUM_KILLS)):
        if number and number % len(KINDS) == 0:  # once through: again from the start
            assert run.flow.wait(500) == 0, run.log()
            assert run.exported() == undisturbed
            run = Run(workspace, f"killed{number}")
        target, delay_s = draw.choice(TARGETS), draw.uniform(0, 3)
        wait_until(lambda: run.reached(kind) or run.flow.poll() is not None, f"{kind} was not reached")  # noqa: B023
        time.sleep(delay_s)
        victims = run.victims(target, draw)
        print(f"{number}: {target} {delay_s:.2f} s into {kind}: {victims}")
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if run.flow.pid in victims:
            was_done = run.flow.wait(10) == 0
            wait_until(lambda: not run.processes(), f"{run.processes()} of it are left", 30)  # noqa: B023
            record = current(run.store, "tiny")
            assert record is None or record.state == ("done" if was_done else "lost")
            whole(run.store)
            run.start()
        else:
            whole(run.store)
    assert run.flow.wait(500) == 0, run.log()
    assert run.exported() == undisturbed
    wait_until(lambda: not run.processes(), f"{run.processes()} of it are left", 30)
    whole(run.store)


def whole(store: Store) -> None:
    """Every artifact that can be seen is whole."""
    for folder in artifact_folders(store):
        status = store.status(folder.parent.name, folder.name)
        assert status.state == "valid", (folder, status.why)
