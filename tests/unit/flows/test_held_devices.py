"""Commands in the terminal hold their devices as stages do: waited for, and held as long as the child lives."""

import subprocess
import sys
from pathlib import Path

from mcore.devices import DeviceLease, Request


def test_a_command_in_the_terminal_holds_its_devices_while_its_child_lives(tmp_path: Path) -> None:
    held = DeviceLease(Request(1, tmp_path / "locks", "run other, train", None, 1))
    assert held.try_take()
    code = """
import sys
from mcore.devices import Request
from flows.children import run_in_terminal
from flows.held_devices import held_devices
with held_devices(Request.from_json(sys.argv[1])) as lease:
    print("got it", flush=True)
    run_in_terminal(["sleep", "600"], pass_fds=lease.descriptors)
"""
    mine = Request(1, tmp_path / "locks", "mcore-flows train, mine", None, 1)
    process = subprocess.Popen(
        [sys.executable, "-c", code, mine.to_json()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None and process.stdout is not None
    assert process.stderr.readline() == "waiting for 1 device: slot 0 is held by run other, train\n"
    held.release()
    assert process.stderr.readline() == "on slot 0\n" and process.stdout.readline() == "got it\n"
    assert not held.try_take() and "mcore-flows train, mine" in held.obstacle
    process.terminate()  # handed on to the child, which ends
    assert process.wait(timeout=60) == 0 and held.try_take()
