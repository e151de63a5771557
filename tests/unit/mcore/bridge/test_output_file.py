from __future__ import annotations

import mmap
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from mcore.bridge import output_file as module
from mcore.bridge.direct_reader import pages_of
from mcore.bridge.output_file import DIRECT_FROM_BYTES, DIRECT_RUN_BYTES, STAGE_BYTES, OutputFile, Stage, stage_for
from mcore.errors import ConversionError


@pytest.fixture(params=["through the page cache", "around it", "around it, on a file system that has no such way"])
def folder_and_stage(request, tmp_path, monkeypatch):
    if request.param == "through the page cache":
        yield tmp_path, None
    elif request.param == "around it":
        probe = os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        os.close(probe)
        yield tmp_path, Stage()
    else:
        # Pages of another size than the kernel's: it refuses what is not aligned, as file systems with larger ones do.
        monkeypatch.setattr(module, "_page_of", lambda offset: offset - offset % 8)
        yield tmp_path, Stage()


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_is_written_is_where_it_should_be_whatever_the_order(folder_and_stage, monkeypatch):
    folder, stage = folder_and_stage
    monkeypatch.setattr(module, "WRITEBACK_BYTES", 4)
    before = num_open()
    file = OutputFile(folder / "out", stage)
    assert file.write(b"world", 6) == 11
    assert file.write(memoryview(b"hello "), 0) == 6
    file.close()
    assert (folder / "out").read_bytes() == b"hello world"
    assert num_open() == before


def test_runs_of_all_lengths_in_two_files_by_turns(folder_and_stage):
    folder, stage = folder_and_stage
    chance = random.Random(7)
    pages = [mmap.PAGESIZE, DIRECT_RUN_BYTES, STAGE_BYTES]
    sizes = [max(1, size + shift) for size in (*pages, 2 * STAGE_BYTES) for shift in (-4097, -1, 0, 1, 513)]
    chance.shuffle(sizes)
    expected = {name: bytearray(1000 + sum(sizes)) for name in "ab"}
    files = {name: OutputFile(folder / name, stage) for name in "ab"}
    runs = []
    start = 1000  # what stands before stays as it is
    for size in sizes:
        runs.append((start, size))
        start += size
    chance.shuffle(runs)
    for start, size in runs:
        data = chance.randbytes(size)
        for name, file in files.items():
            expected[name][start : start + size] = data
            end = start
            for first in range(0, size, 2**20):  # as blocks, one behind the other
                end = file.write(data[first : first + 2**20], end)
            assert end == start + size
    for name, file in files.items():
        file.close()
        assert (folder / name).read_bytes() == expected[name]


def test_large_runs_go_around_the_page_cache(tmp_path):
    """Seen by the kernel's own count of what is in it."""
    for stage, is_cached in ((None, True), (Stage(), False)):
        path = tmp_path / f"out{is_cached}"
        file = OutputFile(path, stage)
        file.write(b"x" * (2 * STAGE_BYTES), 0)
        file.close()
        assert path.stat().st_size == 2 * STAGE_BYTES
        assert (cached_bytes(path) > STAGE_BYTES) == is_cached


def cached_bytes(path: Path) -> int:
    import ctypes

    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        length = len(mapped)
        states = (ctypes.c_ubyte * (length // mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), states) == 0
        return sum(state & 1 for state in states) * mmap.PAGESIZE


@pytest.mark.parametrize("stage", [None, Stage()], ids=["through the page cache", "around it"])
def test_a_file_that_is_closed_is_on_the_disk(tmp_path, stage):
    """No page of it is left to be written, by the kernel's own count."""
    file = OutputFile(tmp_path / "out", stage)
    file.write(b"x" * (3 * STAGE_BYTES + 5), 0)
    file.close()
    with (tmp_path / "out").open("rb") as closed:
        found = pages_of(closed.fileno(), 0, 4 * STAGE_BYTES)
    assert found is not None and (found.dirty, found.writeback) == (0, 0)


def test_memory_file_systems_work():
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        file = OutputFile(folder / "out", Stage())
        file.write(b"y" * (STAGE_BYTES + 5), 3)
        file.close()
        assert (folder / "out").read_bytes() == bytes(3) + b"y" * (STAGE_BYTES + 5)
    finally:
        shutil.rmtree(folder)


def test_a_stage_is_for_what_is_large():
    assert stage_for(DIRECT_FROM_BYTES - 1) is None and isinstance(stage_for(DIRECT_FROM_BYTES), Stage)


@pytest.mark.parametrize("size", [1, STAGE_BYTES])
def test_a_full_disk_is_named_with_the_file(size):
    for stage in (None, Stage()):
        file = OutputFile(Path("/dev/full"), stage)
        with pytest.raises(ConversionError, match=r"can't be written(.|\n)*/dev/full(.|\n)*No space left"):
            file.write(b"x" * size, 0)
            file.close()
