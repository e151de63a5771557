from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mcore.bridge.hf_files import SafetensorsWriter, StoredRows, TensorSpec, divide_into_shards
from mcore.bridge.hf_headers import read_headers
from tests.hf_folders import assert_same_weights, weights_of

WEIGHTS = {
    "odd": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "wide": torch.randn(7, 2, generator=torch.Generator().manual_seed(1)),
    "norm": torch.randn(9, generator=torch.Generator().manual_seed(2)).half(),
}
SPECS = tuple(TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in WEIGHTS.items())


def test_rows_are_read_where_they_are_sliced(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    for name, stored in read_headers(tmp_path).items():
        rows, tensor = StoredRows(stored), WEIGHTS[name]
        for window in (slice(None), slice(1, 2), slice(2, None), slice(0, 0), slice(1, 100)):
            assert torch.equal(rows[window], tensor[window])
            assert rows[window].dtype == tensor.dtype


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    StoredRows(read_headers(tmp_path)["wide"])[0:7].zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_shards_fill_up_in_order():
    specs = [TensorSpec(name, "float32", (size,)) for name, size in (("a", 10), ("b", 15), ("c", 100), ("d", 1))]
    shards = divide_into_shards(specs, 100)
    assert {file: [spec.name for spec in shard] for file, shard in shards.items()} == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
    assert list(divide_into_shards(specs, 10**6)) == ["model.safetensors"]


@pytest.mark.parametrize("max_shard_bytes", [1, 60, 10**6])
def test_what_is_written_is_what_the_library_reads(tmp_path, max_shard_bytes):
    shards = divide_into_shards(SPECS, max_shard_bytes)
    with SafetensorsWriter(tmp_path, shards) as writer:
        for name, tensor in WEIGHTS.items():  # the second half of the rows first
            half = tensor.shape[0] // 2
            writer.write_rows(name, half, tensor[half:])
            writer.write_rows(name, 0, tensor[:half])
    assert writer.num_bytes == sum(tensor.nbytes for tensor in WEIGHTS.values())
    assert_same_weights(weights_of(tmp_path), WEIGHTS)
    assert read_headers(tmp_path).keys() == WEIGHTS.keys()
    for file in shards:
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(shards) > 1)
    if len(shards) > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == writer.num_bytes
        assert content["weight_map"] == {spec.name: file for file, shard in shards.items() for spec in shard}


def test_every_tensor_begins_at_a_multiple_of_its_item(tmp_path):
    with SafetensorsWriter(tmp_path, divide_into_shards(SPECS, 10**6)) as writer:
        for name, tensor in WEIGHTS.items():
            writer.write_rows(name, 0, tensor)
    for stored in read_headers(tmp_path).values():
        assert stored.offset % WEIGHTS[stored.name].itemsize == 0


def test_a_row_that_was_not_written_does_not_go_unseen(tmp_path):
    with (
        pytest.raises(AssertionError, match="wide"),
        SafetensorsWriter(tmp_path, {"model.safetensors": SPECS}) as writer,
    ):
        for name, tensor in WEIGHTS.items():
            writer.write_rows(name, 0, tensor if name != "wide" else tensor[1:])


def test_another_dtype_is_not_written(tmp_path):
    with pytest.raises(AssertionError), SafetensorsWriter(tmp_path, {"model.safetensors": SPECS}) as writer:
        writer.write_rows("wide", 0, WEIGHTS["wide"].double())
