"""Who is alive, and who descends from whom, asked of real processes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from mcore.supervise.processes import ProcessId, descendants, environment_of, send, this_machine

FORKS = "import os, time\nif os.fork() == 0:\n    os.setsid()\nos.write(1, b'%d\\n' % os.getpid())\ntime.sleep(60)"


def test_a_process_is_alive_until_it_ends_even_before_it_is_collected() -> None:
    process = subprocess.Popen(["sleep", "60"])
    identity = ProcessId.of(process.pid)
    assert identity.is_here and identity.is_alive()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not identity.is_alive(), "a zombie works no more"
    process.wait()
    assert not identity.is_alive()
    with pytest.raises(ProcessLookupError):
        ProcessId.of(process.pid)


def test_a_later_process_with_the_same_number_is_another() -> None:
    mine = ProcessId.of(os.getpid())
    assert mine.is_alive() and not replace(mine, start_ticks=mine.start_ticks - 1).is_alive()
    assert mine.machine == this_machine() and not replace(mine, machine="another boot").is_here


def test_descendants_are_found_in_other_sessions_and_signalled() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", FORKS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = {int(process.stdout.readline()) for _ in range(2)}
    assert told <= descendants(os.getpid()) and told - {process.pid} == descendants(process.pid)
    send(signal.SIGKILL, [*told, 2**22 + 1])  # the last one is nobody
    process.wait()


def test_the_environment_of_a_process_is_what_it_was_started_with() -> None:
    process = subprocess.Popen(["sleep", "60"], env={"MARK": "a=b"})
    deadline = time.monotonic() + 5
    while not (found := environment_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)  # the kernel shows it a moment after the start
    assert found[b"MARK"] == b"a=b"
    process.kill()
    process.wait()
    assert environment_of(process.pid) == {}
