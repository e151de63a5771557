"""A dry run says what a conversion writes, and writes nothing."""

from __future__ import annotations

import math
import re
import resource
import subprocess
import sys

import pytest

from benchmarks.synthetic import SHAPES, write_model
from mcore.bridge.convert import convert
from mcore.bridge.dist_files import read_dist_tensors
from mcore.bridge.dry_run import dry_run
from mcore.errors import SourceError
from tests.hf_folders import write_hf_folder


def test_it_names_what_convert_writes(tmp_path):
    write_hf_folder(tmp_path / "hf", "mixtral")
    before = sorted(tmp_path.rglob("*"))
    lines = list(dry_run(tmp_path / "hf", tmp_path / "mcore", disk_gb_per_s=1e-5))
    assert sorted(tmp_path.rglob("*")) == before

    convert(tmp_path / "hf", tmp_path / "mcore")
    written = read_dist_tensors(tmp_path / "mcore" / "release")
    table = [re.split(r"  +", line) for line in lines[1 : lines.index("")]]
    assert {(key, shape, dtype) for key, shape, dtype, *_ in table} == {
        (key, str(list(tensor.shape)), tensor.dtype) for key, tensor in written.items()
    }
    num_bytes = sum(4 * math.prod(tensor.shape) for tensor in written.values())
    (minutes,) = re.findall(r"time +(\d+) min at 0.00 GB/s, as given", lines[-1])
    assert int(minutes) == math.ceil(num_bytes / 1e4 / 60)


def test_the_disk_is_measured_if_its_speed_is_not_given(tmp_path):
    write_hf_folder(tmp_path / "hf", "llama")
    before = sorted(tmp_path.rglob("*"))
    last = list(dry_run(tmp_path / "hf", tmp_path / "x"))[-1]
    assert re.fullmatch(r"time +0 s at \d+\.\d\d GB/s, measured .*", last)
    assert sorted(tmp_path.rglob("*")) == before


def test_it_refuses_what_convert_refuses(tmp_path):
    with pytest.raises(SourceError):
        list(dry_run(tmp_path, tmp_path / "mcore"))


COMMAND = r"""
import re, sys
from pathlib import Path
from mcore.bridge.dry_run import dry_run
print(*list(dry_run(Path(sys.argv[1]), Path(sys.argv[2]), disk_gb_per_s=1.0))[-3:], sep="\n")
print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.long
def test_deepseek_v3_is_planned_in_a_minute_and_two_gib(tmp_path):
    num_bytes = write_model(tmp_path / "hf", SHAPES["deepseek-v3"], sparse=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, tmp_path / "hf", tmp_path / "mcore"], check=True, capture_output=True, text=True
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    tensors, room, time, peak_kb = done.stdout.splitlines()
    assert "46181 tensors" in tensors and "682.636e9 parameters" in tensors
    assert f"{num_bytes / 1e9:.1f} GB to be written" in room
    assert "23 min at 1.00 GB/s" in time
    assert int(peak_kb) < 2 * 2**20
    # Seconds of its own: the clock on the wall depends on what else the machine does.
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 60
