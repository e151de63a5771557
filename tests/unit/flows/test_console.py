"""What a run shows in a terminal: its own lines, no noise, no error twice."""

import logging
from pathlib import Path

import pytest

from flows.console import CHECKOUT, StageLines


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
