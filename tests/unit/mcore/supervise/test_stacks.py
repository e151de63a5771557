"""Stacks of real processes, by the real py-spy."""

import os
import subprocess
import sys
from pathlib import Path

from mcore.supervise.stacks import write_stacks

CODE = """
import sys, time
def stands_still():
    print("ready", flush=True)
    time.sleep(60)
stands_still()
"""


def test_a_file_for_each_process_named_by_its_rank(tmp_path: Path) -> None:
    ranked = subprocess.Popen(
        [sys.executable, "-S", "-c", CODE], stdout=subprocess.PIPE, env={**os.environ, "RANK": "3"}
    )
    other = subprocess.Popen(["sleep", "60"])
    try:
        assert ranked.stdout is not None and ranked.stdout.readline()
        files = write_stacks({ranked.pid, other.pid}, tmp_path / "stacks")
    finally:
        for process in (ranked, other):
            process.kill()
            process.wait()
    assert {file.name for file in files} == {"rank-3.txt", f"pid-{other.pid}.txt"}
    text = (tmp_path / "stacks" / "rank-3.txt").read_text()
    assert text.startswith(f"process {ranked.pid}: {sys.executable} -S -c") and "stands_still" in text
    assert "sleep 60" in (tmp_path / "stacks" / f"pid-{other.pid}.txt").read_text()


def test_two_processes_of_one_rank_do_not_share_a_file(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0"}
    processes = [subprocess.Popen(["sleep", "60"], env=environment) for _ in range(2)]
    files = write_stacks([process.pid for process in processes], tmp_path)
    for process in processes:
        process.kill()
        process.wait()
    assert len(files) == 2 and (tmp_path / "rank-0.txt") in files
