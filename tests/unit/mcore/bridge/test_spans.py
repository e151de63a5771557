from __future__ import annotations

import os
from pathlib import Path

import pytest

from mcore.bridge import spans as module
from mcore.bridge.spans import BLOCK_BYTES, Span, SpanReader
from mcore.errors import ConversionError


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for number, path in enumerate(paths):
        path.write_bytes(os.urandom(3000) + bytes([number]) * BLOCK_BYTES)
    return paths


def read(spans):
    with SpanReader() as reader:
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
    monkeypatch.setattr(module, "MAX_OPEN_FILES", 2)
    before = num_open()
    with SpanReader() as reader:
        for path in [*files, *files]:
            assert bytes(next(reader.blocks([Span(path, 0, 5)]))) == path.read_bytes()[:5]
            assert num_open() <= before + 2
    assert num_open() == before


def test_a_file_that_ends_too_early_is_an_error(files):
    with pytest.raises(ConversionError, match="became shorter"):
        read([Span(files[0], 3000, BLOCK_BYTES + 1)])
