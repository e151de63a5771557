from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import pytest

from mcore.bridge import open_files
from mcore.bridge.direct_reader import WINDOW_BYTES, is_cached, pages_of
from mcore.bridge.open_files import OpenFiles
from mcore.bridge.output_file import DIRECT_FROM_BYTES
from mcore.bridge.spans import BLOCK_BYTES, Span, SpanReader
from mcore.errors import ConversionError


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for number, path in enumerate(paths):
        path.write_bytes(os.urandom(3000) + bytes([number]) * BLOCK_BYTES)
    return paths


def read(spans, total_bytes=0):
    with SpanReader(total_bytes) as reader:
        return [bytes(block) for block in reader.blocks(spans)]


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_spans_come_one_behind_the_other_with_zeros_between(files):
    a, b, _ = (path.read_bytes() for path in files)
    blocks = read([Span(files[0], 10, 20), Span(None, 0, 5), Span(files[1], 0, 7), Span(files[0], 2990, 10)])
    assert blocks == [a[10:30] + bytes(5) + b[:7] + a[2990:3000]]


def test_no_block_is_larger_than_the_buffer_and_only_the_last_is_smaller(files):
    a, b, _ = (path.read_bytes() for path in files)
    spans = [Span(files[0], 1, len(a) - 1), Span(None, 0, 2 * BLOCK_BYTES), Span(files[1], 0, len(b))]
    blocks = read(spans)
    assert {len(block) for block in blocks[:-1]} == {BLOCK_BYTES} and len(blocks[-1]) < BLOCK_BYTES
    assert b"".join(blocks) == a[1:] + bytes(2 * BLOCK_BYTES) + b


def test_nothing_gives_no_block():
    assert read([Span(None, 0, 0)]) == []


def test_few_files_are_open_at_a_time(files, monkeypatch):
    monkeypatch.setattr(open_files, "MAX_OPEN_FILES", 2)
    before = num_open()
    with SpanReader() as reader:
        for path in [*files, *files]:
            assert bytes(next(reader.blocks([Span(path, 0, 5)]))) == path.read_bytes()[:5]
            assert num_open() <= before + 2
    assert num_open() == before


def test_what_was_used_last_stays_open(files, monkeypatch):
    monkeypatch.setattr(open_files, "MAX_OPEN_FILES", 2)
    a, b, c = files

    def is_open(path):
        return any(link.resolve() == path for link in Path("/proc/self/fd").iterdir())

    with OpenFiles() as opened:
        first = opened.get(a)
        opened.get(b)
        assert opened.get(a) == first  # so b is the one that was not used for longer
        opened.get(c)
        assert (is_open(a), is_open(b), is_open(c)) == (True, False, True)


@pytest.mark.parametrize("total_bytes", [0, DIRECT_FROM_BYTES])
def test_a_file_that_ends_too_early_is_an_error(files, total_bytes):
    with pytest.raises(ConversionError, match="became shorter"):
        read([Span(files[0], 3000, BLOCK_BYTES + 1)], total_bytes)


@pytest.mark.parametrize("way", ["from the page cache", "around it", "where there is no way around it"])
def test_long_spans_of_large_models_come_with_short_ones_between(tmp_path, monkeypatch, way):
    path = tmp_path / "long"
    content = os.urandom(2 * WINDOW_BYTES + 12345)
    path.write_bytes(content)
    if way != "from the page cache":
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    if way == "where there is no way around it":  # as where pages are larger than ours
        monkeypatch.setattr("mcore.bridge.direct_reader.mmap.PAGESIZE", 8)
    spans = [
        Span(path, 1, 2 * WINDOW_BYTES + 9), Span(path, 4096, BLOCK_BYTES), Span(None, 0, 7), Span(path, 77, 100),
        Span(path, 12344, len(content) - 12344), Span(None, 0, 2 * BLOCK_BYTES),
    ]  # fmt: skip
    blocks = read(spans, DIRECT_FROM_BYTES)
    wanted = [content[s.offset : s.offset + s.num_bytes] if s.file else bytes(s.num_bytes) for s in spans]
    assert b"".join(blocks) == b"".join(wanted)
    assert max(map(len, blocks)) == BLOCK_BYTES
    begins = list(itertools.accumulate(map(len, blocks), initial=0))
    ends = set(itertools.accumulate(map(len, wanted)))
    assert all(begin % 8 == 0 for begin in begins[: len(blocks)] if begin < 2 * WINDOW_BYTES) and ends & set(begins)


def test_the_page_cache_stays_as_it_was(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(os.urandom(3 * WINDOW_BYTES))
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    assert is_cached(file, 0, 3 * WINDOW_BYTES)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    assert not is_cached(file, WINDOW_BYTES, 4096)
    assert b"".join(read([Span(path, 0, 3 * WINDOW_BYTES)], DIRECT_FROM_BYTES)) == path.read_bytes()
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    read([Span(path, 0, 3 * WINDOW_BYTES)], DIRECT_FROM_BYTES)
    assert not is_cached(file, WINDOW_BYTES, 4096)
    os.close(file)


@pytest.mark.parametrize("first", [1, 4095])
def test_what_begins_and_ends_within_a_page_goes_around_the_page_cache_too(tmp_path, first):
    path = tmp_path / "long"
    content = os.urandom(2 * WINDOW_BYTES)
    path.write_bytes(content)
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    assert (
        b"".join(read([Span(path, first, WINDOW_BYTES + 9)], DIRECT_FROM_BYTES)) == content[first:][: WINDOW_BYTES + 9]
    )
    assert pages_of(file, 0, len(content)).cached == 0
    os.close(file)


def test_a_window_that_lies_in_the_page_cache_does_not_bring_the_next_one_there(tmp_path):
    path = tmp_path / "long"
    content = os.urandom(4 * WINDOW_BYTES)
    path.write_bytes(content)
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, WINDOW_BYTES, 0, os.POSIX_FADV_DONTNEED)
    cached = pages_of(file, 0, len(content)).cached
    # The first window ends within a page that is not there, and that the kernel reads for it.
    assert b"".join(read([Span(path, 1, 3 * WINDOW_BYTES)], DIRECT_FROM_BYTES)) == content[1 : 1 + 3 * WINDOW_BYTES]
    assert pages_of(file, 0, len(content)).cached <= cached + 1
    os.close(file)


def test_a_reader_that_is_left_early_leaves_nothing_open(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(os.urandom(3 * WINDOW_BYTES))
    before, threads = num_open(), threading.active_count()
    with SpanReader(DIRECT_FROM_BYTES) as reader:
        assert len(next(reader.blocks([Span(path, 0, 3 * WINDOW_BYTES)]))) == BLOCK_BYTES
    assert num_open() == before and threading.active_count() == threads
