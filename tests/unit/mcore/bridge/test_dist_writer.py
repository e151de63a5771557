from __future__ import annotations

import pickle

import pytest
import torch
from torch.distributed import checkpoint as dcp

from mcore.bridge.dist_files import read_dist_tensors
from mcore.bridge.dist_writer import DistWriter, Part, bytes_of, write_metadata
from mcore.select import completeness_problems

STACKED = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
PLAIN = torch.randn(5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checkpoint(tmp_path):
    """Two shards: a layer in each, the second layer in two chunks."""
    first, second = DistWriter(tmp_path, 0), DistWriter(tmp_path, 1)
    first.write_chunk("stacked", (2, 6, 4), (0, 0, 0), STACKED[:1])
    first.write_empty_object("layer._extra_state/shard_0_1")
    second.write_chunk("stacked", (2, 6, 4), (1, 0, 0), STACKED[1:, :2])
    second.write_chunk("stacked", (2, 6, 4), (1, 2, 0), STACKED[1:, 2:])
    second.write_chunk("plain", (5,), (0,), PLAIN)
    num_bytes = write_metadata(tmp_path, [*first.close(), *second.close()], {"iteration": 0})
    assert num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.distcp"))
    return tmp_path


def test_shards_of_several_writers_make_one_checkpoint(checkpoint):
    assert completeness_problems(checkpoint) == []
    assert {path.name for path in checkpoint.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    tensors = read_dist_tensors(checkpoint)
    assert torch.equal(tensors["stacked"].read_rows((0,), slice(0, 6)), STACKED[0])
    assert torch.equal(tensors["stacked"].read_rows((1,), slice(1, 5)), STACKED[1, 1:5])
    assert torch.equal(tensors["plain"].read_rows((), slice(0, 5)), PLAIN)


def test_torchs_own_reader_reads_it(checkpoint):
    state = {"stacked": torch.zeros_like(STACKED), "plain": torch.zeros_like(PLAIN)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    assert torch.equal(state["stacked"], STACKED) and torch.equal(state["plain"], PLAIN)


def test_chunks_are_numbered_over_all_shards(checkpoint):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    of_stacked = [index for index in metadata.storage_data if index.fqn == "stacked"]
    chunks = metadata.state_dict_metadata["stacked"].chunks
    assert [index.index for index in of_stacked] == [0, 1, 2]
    assert [index.offset for index in of_stacked] == [chunk.offsets for chunk in chunks]


def test_blocks_make_the_bytes_of_the_whole_chunk(tmp_path):
    folders = [tmp_path / "blocks", tmp_path / "chunk"]
    for folder in folders:
        folder.mkdir()
    data = bytes_of(STACKED)
    by_blocks, whole = map(DistWriter, folders)
    by_blocks.write_blocks(Part("w", (2, 6, 4), "bfloat16", (0, 0, 0), (2, 6, 4)), [data[:10], data[10:11], data[11:]])
    whole.write_chunk("w", (2, 6, 4), (0, 0, 0), STACKED)
    for writer in (by_blocks, whole):
        writer.finish({})
    assert (folders[0] / "__0_0.distcp").read_bytes() == (folders[1] / "__0_0.distcp").read_bytes()


def test_a_tensor_has_one_shape_and_dtype(tmp_path):
    writer = DistWriter(tmp_path)
    writer.write_chunk("w", (4, 4), (0, 0), torch.zeros(2, 4))
    writer.write_chunk("w", (4, 4), (2, 0), torch.zeros(2, 4).half())
    with pytest.raises(AssertionError, match="w"):
        writer.finish({})
