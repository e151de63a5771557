"""Runs cancelled by Prefect's API in every stage, through a worker and through `serve`; workers killed and replaced."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from tests.faults import serve_pipeline
from tests.faults.conftest import Undisturbed
from tests.faults.disturbed import FLOW_RUN, Disturbed, ended_at, nothing_left, told, wait_for_stage, wait_until, whole
from tests.faults.server_runs import RUN, absolute, state_once_ended
from tests.flows.prefect_server import PREFECT, Server, background, running_server
from tests.flows.workspace import CHECKOUT, raw_run

pytestmark = [pytest.mark.faults, pytest.mark.endurance, pytest.mark.server, pytest.mark.timeout(3600)]

STAGES = ("convert", "verify_convert", "train", "export", "verify_export")
"""Those with a process of their own; `select` is over in milliseconds."""
EVALUATED = (*STAGES, "evaluate_base", "evaluate_tuned", "compare")


class Workers:
    """A server, its worker, those that come after it, and a process that serves the pipeline."""

    def __init__(self, server: Server, folder: Path, stack: ExitStack) -> None:
        self.server = server
        self._folder = folder
        self._stack = stack

    def kill_worker(self) -> None:
        """kill -9 of the worker, and of nothing else."""
        for process in psutil.process_iter(["cmdline"]):
            is_worker = {"worker", "start"} <= set(process.info["cmdline"] or [])
            with suppress(psutil.Error):
                if is_worker and process.environ().get("PREFECT_HOME") == str(self._folder):
                    process.kill()

    def start_worker(self) -> None:
        command = [PREFECT, "worker", "start", "--pool", "mcore-flows"]
        log = self._folder / "worker-again.log"
        self._stack.enter_context(background(command, log, self.server.environment, self._folder))

    def serve(self, name: str) -> None:
        command = [sys.executable, serve_pipeline.__file__, name]
        environment = self.server.environment | {"PYTHONPATH": str(CHECKOUT)}
        self._stack.enter_context(background(command, self._folder / "serve.log", environment, self._folder))

        def is_known() -> bool:
            return any(found["name"] == name for found in self.server.filter("deployments"))

        wait_until(is_known, "the pipeline is not served")


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    folder = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        yield Workers(stack.enter_context(running_server(folder)), folder, stack)


@pytest.mark.parametrize("by", ["worker", "serve"])
def test_cancelled_in_every_stage(workers: Workers, workspace: Path, undisturbed: Undisturbed, by: str) -> None:
    whole_line = raw_run(**{group: RUN[group] for group in ("train", "launch")})
    expected = undisturbed(whole_line).exported()
    server, name = workers.server, f"cancelled-{by}"
    run = Disturbed(workspace, name, absolute(workspace, whole_line, name), api_url=server.url)
    deployment = "pipeline/pipeline"
    if by == "serve":
        workers.serve("served")
        deployment = "pipeline/served"
    for stage in EVALUATED:
        flow_run = server.start_run(run.run, deployment)
        wait_for_stage(run.store, name, stage)
        server.prefect("flow-run", "cancel", flow_run)
        assert state_once_ended(server, flow_run) == "Cancelled"
        nothing_left(flow_run, run.store, FLOW_RUN)
        assert ended_at(told(run.store, name)) == ("cancelled", stage)
    flow_run = server.start_run(run.run, deployment)
    assert state_once_ended(server, flow_run) == "Completed"
    assert run.exported() == expected
    nothing_left(flow_run, run.store, FLOW_RUN)
    assert ended_at(told(run.store, name)) == ("done", "")


def test_cancelled_behind_a_worker_that_was_killed_and_replaced(
    workers: Workers, workspace: Path, undisturbed: Undisturbed
) -> None:
    expected = undisturbed(RUN).exported()
    server, name = workers.server, "worker-replaced"
    run = Disturbed(workspace, name, absolute(workspace, RUN, name), api_url=server.url)
    flow_run = server.start_run(run.run)
    wait_for_stage(run.store, name, "convert")
    workers.kill_worker()
    workers.start_worker()
    wait_for_stage(run.store, name, "train")
    server.prefect("flow-run", "cancel", flow_run)
    assert state_once_ended(server, flow_run) == "Cancelled"
    nothing_left(flow_run, run.store, FLOW_RUN)
    assert ended_at(told(run.store, name)) == ("cancelled", "train")
    run.finish(expected)


def test_workers_killed_in_every_stage(workers: Workers, workspace: Path, undisturbed: Undisturbed) -> None:
    expected, draw = undisturbed(RUN).exported(), random.Random(os.environ.get("MCORE_FLOWS_KILL_SEED", "0"))
    server, name = workers.server, "workers-killed"
    run = Disturbed(workspace, name, absolute(workspace, RUN, name), api_url=server.url)
    flow_run = server.start_run(run.run)
    for stage in STAGES:
        wait_for_stage(run.store, name, stage)
        with_flow = draw.random() < 0.5
        pid = told(run.store, name)["pid"]
        workers.kill_worker()
        if with_flow:
            os.kill(pid, signal.SIGKILL)
            nothing_left(flow_run, run.store, FLOW_RUN)
            assert ended_at(told(run.store, name)) == ("lost", stage)
        whole(run.store)
        workers.start_worker()
        if with_flow:
            flow_run = server.start_run(run.run)
    wait_until(lambda: told(run.store, name)["state"] != "running", "the run does not end", 300)
    nothing_left(flow_run, run.store, FLOW_RUN)
    assert run.exported() == expected
    run.finish(expected)
