"""What tests that disturb the pipeline ask of a flow in a process of its own, and of what a disturbance leaves.

After each of them no process of the flow is left, every artifact that can be seen is whole, and `status` tells what
happened; in the end the exported model is the one of a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from mcore.artifacts import Store
from mcore.launch import tail_of
from mcore.retention import artifact_folders
from mcore.runs import current
from mcore.supervise.claims import works
from mcore.supervise.processes import all_pids, environment_of
from tests.flows import run_pipeline

MARK = "MCORE_FLOWS_TEST_MARK"
"""Environment variable by which all that comes of a flow is found, wherever it went."""
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""The one that a worker and `serve` give to each flow run."""
COMMAND = Path(sys.executable).with_name("mcore-flows")
BASE = frozenset({"prepare", "convert", "verify_convert"})
"""The stages in front of training."""


def result_of(process: subprocess.Popen) -> dict:
    """What `tests.flows.run_pipeline` printed; it has to end well."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-8000:]
    return json.loads(out)


def exported_weights(folder: Path, store: str) -> bytes:
    """The only exported model of a store."""
    (weights,) = (folder / store).glob("export/*/model.safetensors")
    return weights.read_bytes()


def is_at(store: Path, iteration: int) -> bool:
    """Whether training has logged an iteration."""
    files = list(store.glob(".partial/train-*/metrics.jsonl"))
    return any(f'"iteration": {iteration}, "loss"' in tail_of(file) for file in files)


def wait_for_iteration(store: Path, iteration: int) -> None:
    """Wait until training has logged an iteration."""
    wait_until(lambda: is_at(store, iteration), f"training did not come to iteration {iteration}", 550)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 600) -> None:
    """Wait for something, looking often: what the tests do then has to be in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def processes_with(mark: str, variable: str = MARK) -> list[int]:
    """All processes with a mark in an environment variable that are alive."""
    found = []
    for pid in all_pids():
        if environment_of(pid).get(variable.encode()) == mark.encode():
            with suppress(psutil.Error):
                if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
    return found


def nothing_left(mark: str, store: Store, variable: str = MARK) -> None:
    """No process with a mark is alive, and no half artifact to be seen."""
    wait_until(lambda: not processes_with(mark, variable), f"{mark}: processes are left", 60)
    whole(store)


def whole(store: Store) -> None:
    """Every artifact that can be seen is whole."""
    for folder in artifact_folders(store):
        status = store.status(folder.parent.name, folder.name)
        assert status.state == "valid", (folder, status.why)


def told(store: Store, name: str) -> dict[str, Any]:
    """What `mcore-flows status` tells of a run."""
    done = subprocess.run(
        [COMMAND, "status", name, "--store", str(store.root), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def is_at_work(store: Store, name: str, stage: str) -> bool:
    """Whether a stage of a run has a command at work."""
    record = current(store, name)
    found = [] if record is None else [one for one in record.stages if one.name == stage]
    return any(works(store.lease_folder(one.kind, one.key)) for one in found)


def wait_for_stage(store: Store, name: str, stage: str) -> None:
    """Wait until a stage of a run has a command at work."""
    wait_until(lambda: is_at_work(store, name, stage), f"{stage} was not reached", 300)


def ended_at(status: Mapping[str, Any]) -> tuple[str, str]:
    """How a run ended by its status, and at which stage; no stage if it went well."""
    words = {"failed", "killed", "cancelled", "stopped", "gate said no"}
    (stage,) = [stage["name"] for stage in status["stages"] if stage["state"] in words] or [""]
    return status["state"], stage


class Disturbed:
    """One command, started as often as it is disturbed: the pipeline in a store of its own.

    Args:
        workspace: Folder of `make_workspace`.
        name: Name of the store, and the mark of the flow's processes.
        run: The run.
        store: Where the store is, if not in the workspace.
        api_url: A Prefect server; each flow brings its own if there is none.
    """

    def __init__(
        self, workspace: Path, name: str, run: dict[str, Any], *, store: Path | None = None, api_url: str | None = None
    ) -> None:
        self.store = Store(store or workspace / name)
        self.mark = f"{name}-{os.getpid()}"
        self.run = run | {"launch": run["launch"] | {"store": str(self.store.root)}}
        self.run_name = run["name"]
        self.workspace = workspace
        self._file = workspace / f"{name}.json"
        self._file.write_text(json.dumps(self.run))
        self._environment = {**os.environ, "PREFECT_HOME": str(workspace / "prefect"), MARK: self.mark}
        self._environment.pop("PREFECT_API_URL", None)
        if api_url is not None:
            self._environment["PREFECT_API_URL"] = api_url

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command, and give back the flow's process."""
        with self._file.with_suffix(".log").open("a") as log:
            self.flow = subprocess.Popen(
                [sys.executable, run_pipeline.__file__, self._file.name],
                cwd=self.workspace, stdout=log, stderr=log, env=self._environment,
            )  # fmt: skip
        return self.flow

    def finish(self, undisturbed: bytes) -> None:
        """Start the same command again, undisturbed now: it ends as if nothing had happened."""
        self.start()
        self.ends_as(undisturbed)

    def ends_as(self, undisturbed: bytes) -> None:
        """Wait for the flow's end: it is the one of a run that nobody disturbed."""
        assert self.flow.wait(500) == 0, self.log()
        assert self.exported() == undisturbed
        nothing_left(self.mark, self.store)
        assert ended_at(told(self.store, self.run_name)) == ("done", "")

    def reached(self, kind: str) -> bool:
        """Whether a stage of the kind is being made, or was."""
        return any(self.store.root.glob(f".leases/{kind}-*/*.held")) or any(self.store.root.glob(f"{kind}/*"))

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that comes before the flow's end."""
        wait_until(lambda: condition() or self.flow.poll() is not None, what, 300)
        assert condition(), f"{what}: the flow has ended\n{self.log()}"

    def fails(self) -> str:
        """Wait for the flow's end, which must be a bad one that leaves nothing. Returns the log."""
        assert self.flow.wait(300) != 0, self.log()
        nothing_left(self.mark, self.store)
        return self.log()

    def kill_all(self) -> None:
        """kill -9 of everything that came of it."""
        while pids := processes_with(self.mark):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.flow.wait()

    def exported(self) -> bytes:
        """The only exported model of the store."""
        (weights,) = self.store.root.glob("export/*/model.safetensors")
        return weights.read_bytes()

    def log(self) -> str:
        """The end of what the flow printed."""
        return self._file.with_suffix(".log").read_text()[-8000:]
