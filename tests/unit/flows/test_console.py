"""What a run shows in a terminal: its own lines, no noise, no error twice."""

import logging
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from flows.console import CHECKOUT, StageLines, check_server
from tests.flows.workspace import VLLM_PYTHON
from tests.unit.flows.command_line import mcore_flows
from tests.unit.tasks.model_folders import write_workspace


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Give the handler a line from a file of a package; what it shows."""
    handler = StageLines()

    def line(package: str, text: str, *arguments: object) -> str:
        path = CHECKOUT / package / "module.py"
        handler.emit(logging.LogRecord("prefect.task_runs", logging.INFO, str(path), 1, text, arguments, None))
        return capsys.readouterr().err

    return line


def test_stages_stand_at_the_margin_and_their_commands_below(log) -> None:  # type: ignore[no-untyped-def]
    assert log("tasks", "%s: done in %.1f s", "convert", 1.25) == "convert: done in 1.2 s\n"
    assert log("mcore", "train: 34/60 steps") == "    train: 34/60 steps\n"


def test_prefects_own_lines_are_left_out(log) -> None:  # type: ignore[no-untyped-def]
    assert log(".venv/lib/python3.11/site-packages/prefect", "Finished in state Completed()") == ""
    handler = StageLines()
    outside = str(Path("/usr/lib/prefect/engine.py"))
    handler.emit(logging.LogRecord("prefect.flow_runs", logging.INFO, outside, 1, "Beginning flow run", (), None))


def test_results_are_shown_in_the_end_only(log) -> None:  # type: ignore[no-untyped-def]
    assert log("mcore", '{"num_tensors": 20}') == log("mcore", "│ question │") == log("mcore", "╭───╮") == ""


def test_an_error_of_a_command_is_left_to_the_end(log) -> None:  # type: ignore[no-untyped-def]
    assert log("mcore", "PrecisionError: not the same model") == log("mcore", "  - logits: found 1.0") == ""
    assert log("tasks", "verify_convert: started again, attempt 2") != ""
    assert log("mcore", "verify: bits on disk are equal") != ""


def test_a_server_that_is_down_is_named_before_anything_starts(tmp_path: Path) -> None:
    write_workspace(tmp_path)
    with socket.socket() as free:  # bound, so nobody else takes it, and not listening
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
        python = ["--set", f"evaluate.python={VLLM_PYTHON}"]
        done = mcore_flows("run", "run.yaml", *python, cwd=tmp_path, home=tmp_path / "home", PREFECT_API_URL=url)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert f"ConfigError: no Prefect server\n  - {url}: expected a server that answers, found" in done.stderr
    assert "Start it (prefect server start), or unset PREFECT_API_URL" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_server_that_answers_no_is_a_server() -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        Thread(target=server.handle_request, daemon=True).start()
        check_server(f"http://127.0.0.1:{server.server_port}/api")
