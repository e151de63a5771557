"""What a stage process leaves behind when it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcore.child import ERROR_FILE_VARIABLE, QUIET_ENVIRONMENT, run_as_child
from mcore.errors import GateError, LaunchError, PipelineError, Problem, SourceError, error_from_json

CHILD = """
import sys
from mcore.child import run_as_child
from mcore.errors import *
def main():
    {body}
run_as_child(main)
"""


def run_child(body: str, error_file: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in QUIET_ENVIRONMENT} | variables
    if error_file:
        environment[ERROR_FILE_VARIABLE] = str(error_file)
    return subprocess.run(
        [sys.executable, "-c", CHILD.format(body=body)], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("raise PipelineError('no', ['a'])", 1, PipelineError("no", ["a"])),
        ("raise SourceError('no', [Problem('a', 'b', 'c', 'd')])", 2, SourceError("no", [Problem("a", "b", "c", "d")])),
        ("raise GateError('no')", 3, GateError("no")),
        ("raise LaunchError('no', returncode=4, tail='x')", 1, LaunchError("no", returncode=4, tail="x")),
    ],
)
def test_a_typed_error_crosses_the_border(tmp_path: Path, body: str, status: int, error: PipelineError) -> None:
    result = run_child(body, tmp_path / "error.json")
    assert result.returncode == status
    assert type(error).__name__ in result.stderr and "Traceback" not in result.stderr
    copy = error_from_json((tmp_path / "error.json").read_text())
    assert (type(copy), copy.to_json()) == (type(error), error.to_json())
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_any_other_exception_leaves_a_traceback_and_a_document(tmp_path: Path) -> None:
    result = run_child("{}['key']", tmp_path / "error.json")
    assert result.returncode == 1 and "Traceback" in result.stderr
    assert "unexpected KeyError: 'key'" in error_from_json((tmp_path / "error.json").read_text()).summary


def test_without_a_parent_nothing_is_written_but_the_message(tmp_path: Path) -> None:
    result = run_child("raise GateError('not good enough', ['loss'])")
    assert (result.returncode, result.stderr) == (3, "\nGateError: not good enough\n  - loss\n")


def test_the_first_error_stays(tmp_path: Path) -> None:
    error_file = tmp_path / "error.json"
    run_child("raise SourceError('first')", error_file)
    assert run_child("raise GateError('second')", error_file).returncode == 3
    assert error_from_json(error_file.read_text()).summary == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_what_one_rank_said_the_others_need_not_say_again(tmp_path: Path) -> None:
    body, error_file = "raise SourceError('no', ['a'])", tmp_path / "error.json"
    first, second = run_child(body, error_file), run_child(body, error_file)
    assert first.returncode == second.returncode == 2
    assert first.stderr.count("SourceError: no") == 1 and second.stderr == ""
    assert "GateError: other" in run_child("raise GateError('other')", error_file).stderr


def test_an_error_file_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    result = run_child("raise GateError('no')", tmp_path / "no such folder" / "error.json")
    assert result.returncode == 3 and "GateError: no" in result.stderr and "can't be written" in result.stderr


def test_success_and_an_exit_status_of_its_own_pass_through(tmp_path: Path) -> None:
    assert run_child("pass", tmp_path / "error.json").returncode == 0
    assert run_child("sys.exit(75)", tmp_path / "error.json").returncode == 75
    assert not list(tmp_path.iterdir())


def test_telemetry_is_off_before_the_stage_imports_anything() -> None:
    body = "import os; print(sorted(name for name in os.environ if name in " + repr(set(QUIET_ENVIRONMENT)) + "))"
    assert run_child(body, VLLM_NO_USAGE_STATS="0").stdout.strip() == str(sorted(QUIET_ENVIRONMENT))
    assert run_child("import os; print(os.environ['DO_NOT_TRACK'])", DO_NOT_TRACK="0").stdout == "1\n"


WARN = (
    "import warnings, subprocess; warnings.warn('Apex is not installed. Falling back'); "
    "warnings.warn('soon gone', FutureWarning); warnings.warn('Apex is on fire')"
)


@pytest.mark.parametrize("body", [WARN, f"import subprocess; subprocess.run([sys.executable, '-c', {WARN!r}])"])
def test_warnings_of_every_start_are_left_out_and_others_are_not(body: str) -> None:
    """Here and in a process of its own; all are there if they are asked for."""
    said = run_child(body, PYTHONWARNINGS="").stderr
    assert "UserWarning: Apex is on fire" in said and said.count("Warning: ") == 1
    assert run_child(body, PYTHONWARNINGS="default").stderr.count("Warning: ") == 3


def test_in_process_it_raises_system_exit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(tmp_path / "error.json"))
    for name in (*QUIET_ENVIRONMENT, "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "")

    def stage() -> None:
        raise GateError("no")

    with pytest.raises(SystemExit) as ending:
        run_as_child(stage)
    assert ending.value.code == 3


def test_ctrl_c_that_typer_caught_is_no_success() -> None:
    body = "import typer; app = typer.Typer(); app.command()(stop); return app([], standalone_mode=False)"
    result = run_child(f"stop = lambda: signal.raise_signal(signal.SIGINT); import signal; {body}")
    assert (result.returncode, result.stdout) == (130, "") and "Traceback" not in result.stderr
