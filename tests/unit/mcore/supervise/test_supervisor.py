"""A supervisor that can write nowhere does its work all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcore import supervise


@pytest.mark.parametrize("status", [0, 7])
def test_a_full_disk_changes_nothing_about_how_the_command_ends(tmp_path: Path, status: int) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-I", Path(supervise.__file__).with_name("__main__.py"), f"--parent={os.getpid()}",
             "--grace-s=1", f"--record={tmp_path}/absent/process.json", "--", sys.executable, "-S", "-c",
             f"raise SystemExit({status})"],
            stderr=full, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    assert done.returncode == status
