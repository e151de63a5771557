"""torch reads what we frame, and we find the bytes in what torch framed."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from mcore.bridge.chunk_frames import frame_of, framed_tensor
from mcore.bridge.dist_writer import bytes_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1,), (7,), (3, 5), (1, 1, 130, 9))


def saved(obj) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_loads_what_stands_in_a_frame(dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    frame = frame_of(str(dtype).removeprefix("torch."), shape)
    loaded = torch.load(io.BytesIO(frame.head + bytes_of(tensor) + frame.tail), weights_only=True)
    assert loaded.dtype == dtype and torch.equal(loaded, tensor)


def test_a_frame_of_many_bytes_takes_no_memory_and_is_the_same_each_time():
    shape = (2**20, 2**11)
    frame = frame_of("bfloat16", shape)
    assert len(frame.head) + len(frame.tail) < 4096
    frame_of.cache_clear()
    assert frame_of("bfloat16", shape) == frame


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_found_in_what_torch_saved(tmp_path, dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    blob = saved(tensor)
    (tmp_path / "file").write_bytes(b"before" + blob + b"behind")
    found = framed_tensor(tmp_path / "file", 6, len(blob))
    assert (found.dtype, found.shape) == (str(dtype).removeprefix("torch."), shape)
    data = (tmp_path / "file").read_bytes()[found.data_offset :][: tensor.nbytes]
    assert data == bytes(bytes_of(tensor))


def test_a_view_into_a_storage_begins_where_its_first_number_is(tmp_path):
    tensor = torch.arange(12.0).view(4, 3)
    blob = saved(tensor[2:])
    (tmp_path / "file").write_bytes(blob)
    found = framed_tensor(tmp_path / "file", 0, len(blob))
    assert found.shape == (2, 3)
    assert blob[found.data_offset :][: 6 * 4] == bytes(bytes_of(tensor[2:]))


@pytest.mark.parametrize("obj", [torch.arange(12.0).view(4, 3).T, [torch.zeros(3)], None])
def test_what_does_not_lie_row_by_row_is_none(tmp_path, obj):
    blob = saved(obj)
    (tmp_path / "file").write_bytes(blob)
    assert framed_tensor(tmp_path / "file", 0, len(blob)) is None


class Evil:
    def __reduce__(self):
        return print, ("evil was here",)


def test_nothing_but_tensors_is_unpickled(tmp_path, capsys):
    blob = saved(Evil())
    (tmp_path / "file").write_bytes(blob)
    with pytest.raises(pickle.UnpicklingError):
        framed_tensor(tmp_path / "file", 0, len(blob))
    assert capsys.readouterr().out == ""
