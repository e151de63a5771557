from __future__ import annotations

import os
import pickle

import pytest
import torch

from mcore.bridge.dist_files import read_dist_tensors
from mcore.bridge.dist_writer import DistWriter
from mcore.bridge.spans import SpanReader
from mcore.errors import CheckpointError
from mcore.select import completeness_problems

STACKED = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
PLAIN = torch.randn(5, generator=torch.Generator().manual_seed(1)).bfloat16()


def write(folder):
    """A stacked tensor whose second layer is divided by rows, and one that is not stacked."""
    folder.mkdir()
    writer = DistWriter(folder)
    writer.write_chunk("stacked", (2, 6, 4), (0, 0, 0), STACKED[:1].clone())
    writer.write_chunk("stacked", (2, 6, 4), (1, 0, 0), STACKED[1:, :4].clone())
    writer.write_chunk("stacked", (2, 6, 4), (1, 4, 0), STACKED[1:, 4:].clone())
    writer.write_chunk("plain", (5,), (0,), PLAIN)
    writer.write_empty_object("layer._extra_state/shard_0_1")
    writer.finish({"iteration": 0})
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "release")


def test_what_is_written_is_complete_and_read_back(checkpoint):
    assert completeness_problems(checkpoint) == []
    tensors = read_dist_tensors(checkpoint)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()} == {
        "stacked": ((2, 6, 4), "float32"),
        "plain": ((5,), "bfloat16"),
    }
    assert torch.equal(tensors["plain"].read_rows((), slice(0, 5)), PLAIN)
    assert torch.equal(tensors["stacked"].read_rows((0,), slice(0, 6)), STACKED[0])
    assert torch.equal(tensors["stacked"].read_rows((1,), slice(3, 5)), STACKED[1, 3:5])


def test_windows_follow_the_chunks(checkpoint):
    stacked = read_dist_tensors(checkpoint)["stacked"]
    assert stacked.row_windows((0,)) == [slice(0, 6)]
    assert stacked.row_windows((1,)) == [slice(0, 4), slice(4, 6)]


def test_chunks_side_by_side_make_one_window(tmp_path):
    """As tensor parallelism divides `linear_proj` and `linear_fc2`: by columns."""
    writer = DistWriter(tmp_path)
    writer.write_chunk("w", (6, 4), (0, 0), STACKED[0, :, :2].clone())
    writer.write_chunk("w", (6, 4), (0, 2), STACKED[0, :, 2:].clone())
    writer.finish({})
    tensor = read_dist_tensors(tmp_path)["w"]
    assert tensor.row_windows() == [slice(0, 6)]
    assert torch.equal(tensor.read_rows((), slice(0, 6)), STACKED[0])


def test_spans_are_the_rows_bytes(checkpoint):
    tensors = read_dist_tensors(checkpoint)

    def read(key, index, rows):
        with SpanReader() as reader:
            return b"".join(bytes(block) for block in reader.blocks(tensors[key].spans(index, rows)))

    assert read("stacked", (0,), slice(1, 6)) == STACKED[0, 1:6].numpy().tobytes()
    assert read("stacked", (1,), slice(3, 6)) == STACKED[1, 3:6].numpy().tobytes()  # of two chunks
    assert read("stacked", (), slice(0, 1)) == STACKED[:1].numpy().tobytes()
    assert read("plain", (), slice(2, 5)) == PLAIN[2:].view(torch.int16).numpy().tobytes()


def test_there_are_no_spans_where_rows_do_not_lie_whole(tmp_path, checkpoint):
    folder = tmp_path / "by_columns"
    folder.mkdir()
    writer = DistWriter(folder)
    writer.write_chunk("columns", (6, 4), (0, 0), STACKED[0, :, :2].clone())
    writer.write_chunk("columns", (6, 4), (0, 2), STACKED[0, :, 2:].clone())
    writer.write_chunk("missing", (6, 4), (0, 0), STACKED[0, :3])
    writer.finish({})
    tensors = read_dist_tensors(folder)
    assert tensors["columns"].spans((), slice(0, 6)) is None
    assert tensors["missing"].spans((), slice(0, 6)) is None
    assert tensors["missing"].spans((), slice(0, 3)) is not None
    # All layers at once, of which one is in two chunks of some rows each.
    assert read_dist_tensors(checkpoint)["stacked"].spans((), slice(0, 2)) is None


def test_the_same_calls_give_the_same_bytes(tmp_path):
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    names = sorted(path.name for path in one.iterdir())
    assert names == [".metadata", "__0_0.distcp", "common.pt", "metadata.json"]
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_rows_that_no_chunk_holds_are_not_made_up(tmp_path):
    writer = DistWriter(tmp_path)
    writer.write_chunk("w", (6, 4), (0, 0), STACKED[0, :3].clone())
    writer.finish({})
    with pytest.raises(CheckpointError, match="not whole"):
        read_dist_tensors(tmp_path)["w"].read_rows((), slice(0, 6))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "common.pt", "metadata.json"])
def test_a_checkpoint_without_one_of_its_files_is_not_read(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_dist_tensors(checkpoint)


def test_a_shard_cut_short_is_not_read(checkpoint):
    os.truncate(checkpoint / "__0_0.distcp", 1000)
    with pytest.raises(CheckpointError, match="1000 bytes"):
        read_dist_tensors(checkpoint)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def replace_metadata(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_metadata_that_would_run_something_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replace_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", Evil()))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir has no place"):
        read_dist_tensors(checkpoint)
    assert not (tmp_path / "evil-was-here").exists()


def test_a_chunk_that_would_run_something_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (place,) = [
        info
        for index, info in pickle.loads((checkpoint / ".metadata").read_bytes()).storage_data.items()
        if index.fqn == "plain"
    ]
    torch.save(Evil(), tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    with (checkpoint / "__0_0.distcp").open("ab") as file:
        place.offset, place.length = file.tell(), len(evil)
        file.write(evil)
    replace_metadata(
        checkpoint,
        lambda metadata: metadata.storage_data.update(
            {index: place for index in metadata.storage_data if index.fqn == "plain"}
        ),
    )
    with pytest.raises(CheckpointError, match="can't be read"):
        read_dist_tensors(checkpoint)["plain"].read_rows((), slice(0, 5))
    assert not (tmp_path / "evil-was-here").exists()


def test_a_shard_outside_the_folder_is_refused(checkpoint):
    (checkpoint.parent / "secret").write_bytes((checkpoint / "__0_0.distcp").read_bytes())

    def point_outside(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = "../secret"

    replace_metadata(checkpoint, point_outside)
    with pytest.raises(CheckpointError, match=r"\.\./secret"):
        read_dist_tensors(checkpoint)


def test_a_chunk_of_another_shape_than_its_metadata_is_damage(checkpoint):
    def swap(metadata):
        places = metadata.storage_data
        first, second = [index for index in places if index.fqn == "stacked"][:2]
        places[first], places[second] = places[second], places[first]

    replace_metadata(checkpoint, swap)
    with pytest.raises(CheckpointError, match="damaged"):
        read_dist_tensors(checkpoint)["stacked"].read_rows((0,), slice(0, 6))
