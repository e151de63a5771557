"""Stage commands in the terminal: their status, their signals, their environment."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.children import run_in_terminal
from mcore.child import QUIET_ENVIRONMENT
from mcore.errors import ConfigError


def python(code: str) -> list[object]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("status", [0, 1, 2, 3, 75])
def test_the_exit_status_passes_through(status: int) -> None:
    assert run_in_terminal(python(f"raise SystemExit({status})")) == status


def test_a_signal_is_told_as_shells_do() -> None:
    assert run_in_terminal(python("import os; os.kill(os.getpid(), 9)")) == 128 + signal.SIGKILL


def test_the_environment_is_quiet_and_takes_more(tmp_path: Path) -> None:
    code = f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'env')!r}, 'w'))"
    assert run_in_terminal(python(code), {"MORE": "1"}) == 0
    found = json.loads((tmp_path / "env").read_text())
    assert found["MORE"] == "1" and QUIET_ENVIRONMENT.items() <= found.items()


def test_output_is_shown_unless_it_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('result'); print('progress', file=sys.stderr)"
    run_in_terminal(python(code))
    assert capfd.readouterr() == ("result\n", "progress\n")
    run_in_terminal(python(code), quiet=True)
    assert capfd.readouterr() == ("", "progress\n")


def test_a_program_that_is_missing_is_wrong_input() -> None:
    with pytest.raises(ConfigError, match="no/such/python"):
        run_in_terminal(["no/such/python", "-m", "x"])


CALLER = """
import sys
from flows.children import become, run_in_terminal
code = '''
import signal, sys, time
def stop(number, frame):
    print("child got", signal.Signals(number).name, flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
time.sleep(30)
'''
argv = [sys.executable, "-c", code]
{how}
"""


@pytest.mark.parametrize("how", ["sys.exit(run_in_terminal(argv))", "become(argv)"], ids=["waits", "becomes"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_are_the_childs_to_answer(how: str, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER.format(how=how)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends it to the whole group
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert output == f"child got {number.name}\n" and process.returncode == 75


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_in_terminal(python("pass"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


RUN = """
import signal, subprocess, sys, time
from flows.children import go_on_in_own_session
go_on_in_own_session()
server = subprocess.Popen(["sleep", "30"])
def stop(number, frame):
    time.sleep(0.3)  # the server would be gone by now, if the signal had reached it
    print(signal.Signals(number).name, "and the server", "lives" if server.poll() is None else "died", flush=True)
    server.kill()
    sys.exit(3)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_and_not_its_server(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)  # as a terminal does
    output, _ = process.communicate(timeout=20)
    assert output == f"{number.name} and the server lives\n" and process.returncode == 3


def test_a_run_does_not_outlive_its_terminal() -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.kill()
    output, _ = process.communicate(timeout=20)
    assert output == "SIGTERM and the server lives\n"


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137), ("pass", 0)])
def test_the_status_of_the_run_is_the_commands(ending: str, status: int) -> None:
    code = f"import os, sys\nfrom flows.children import go_on_in_own_session\ngo_on_in_own_session()\n{ending}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == status
