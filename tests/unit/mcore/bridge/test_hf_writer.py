from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from safetensors import safe_open

from mcore.bridge.hf_headers import read_headers
from mcore.bridge.hf_writer import SafetensorsWriter, TensorSpec, create_shards, divide_into_shards, refuse_gaps
from tests.hf_folders import assert_same_weights, weights_of

WEIGHTS = {
    "odd": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "wide": torch.randn(7, 2, generator=torch.Generator().manual_seed(1)),
    "norm": torch.randn(9, generator=torch.Generator().manual_seed(2)).half(),
}
SPECS = tuple(TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in WEIGHTS.items())


def write(folder, shards, weights=WEIGHTS):
    """Two writers, each with one half of the rows, the second half first."""
    places = create_shards(folder, shards)
    writers = [SafetensorsWriter(places), SafetensorsWriter(places)]
    for name, tensor in weights.items():
        half = tensor.shape[0] // 2
        writers[0].write_rows(name, half, tensor[half:])
        writers[1].write_rows(name, 0, tensor[:half])
    refuse_gaps(places, [writer.close() for writer in writers])


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
    write(tmp_path, shards)
    assert_same_weights(weights_of(tmp_path), WEIGHTS)
    assert read_headers(tmp_path).keys() == WEIGHTS.keys()
    for file in shards:
        with safe_open(tmp_path / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(shards) > 1)
    if len(shards) > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in WEIGHTS.values())
        assert content["weight_map"] == {spec.name: file for file, shard in shards.items() for spec in shard}


def test_every_tensor_begins_at_a_multiple_of_its_item(tmp_path):
    write(tmp_path, divide_into_shards(SPECS, 10**6))
    for stored in read_headers(tmp_path).values():
        assert stored.offset % WEIGHTS[stored.name].itemsize == 0


def test_a_row_that_was_not_written_does_not_go_unseen(tmp_path):
    with pytest.raises(AssertionError, match="wide"):
        write(tmp_path, {"model.safetensors": SPECS}, WEIGHTS | {"wide": WEIGHTS["wide"][:-1]})


def test_another_dtype_and_rows_too_many_are_not_written(tmp_path):
    writer = SafetensorsWriter(create_shards(tmp_path, {"model.safetensors": SPECS}))
    with pytest.raises(AssertionError):
        writer.write_rows("wide", 0, WEIGHTS["wide"].double())
    with pytest.raises(AssertionError):
        writer.write_rows("wide", 1, WEIGHTS["wide"])
    assert writer.close() == Counter()


def test_a_file_that_is_there_is_not_replaced(tmp_path):
    create_shards(tmp_path, {"model.safetensors": SPECS})
    with pytest.raises(FileExistsError):
        create_shards(tmp_path, {"model.safetensors": SPECS})
