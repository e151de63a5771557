from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from mcore.bridge.hf_headers import read_headers
from mcore.errors import SourceError
from tests.hf_folders import write_hf_folder

WEIGHTS = {"a": torch.ones(4, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(5, dtype=torch.float16)}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "hf"
    write_hf_folder(folder, "llama", max_shard_size="100KB")
    return folder


@pytest.fixture
def damaged(sharded, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(sharded, tmp_path / "hf")


def problems_of(folder):
    with pytest.raises(SourceError) as caught:
        read_headers(folder)
    return [str(problem) for problem in caught.value.problems]


def write_raw(folder, header, data=b""):
    folder.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def test_a_single_file_is_read_as_the_library_wrote_it(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tensors = read_headers(tmp_path)
    assert {name: (tensor.dtype, tensor.shape, tensor.num_bytes) for name, tensor in tensors.items()} == {
        "a": ("float32", (4, 3), 48),
        "b": ("bfloat16", (2,), 4),
        "c": ("float16", (5,), 10),
    }
    data = (tmp_path / "model.safetensors").read_bytes()
    for name, tensor in tensors.items():
        stored = data[tensor.offset : tensor.offset + tensor.num_bytes]
        assert stored == WEIGHTS[name].view(torch.uint8).numpy().tobytes()


def test_an_indexed_folder_is_read_whole(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = read_headers(sharded)
    assert len(set(index.values())) > 2
    assert {name: tensor.file.name for name, tensor in tensors.items()} == index


def test_no_safetensors_says_what_is_there(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    (problem,) = problems_of(tmp_path)
    assert "pytorch_model.bin" in problem and "pickle" in problem


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path), lambda path: path.symlink_to("gone"), os.mkdir])
def test_a_name_without_a_file_behind_it_is_named(tmp_path, name, make):
    make(tmp_path / name)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{name}: expected a file, found a folder, a link to nothing")


def test_everything_wrong_with_an_indexed_folder_is_listed_at_once(damaged):
    first, second, third, *_ = sorted(damaged.glob("*.safetensors"))
    with first.open("r+b") as file:
        file.truncate(first.stat().st_size - 10)
    second.unlink()
    path = damaged / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = next(name for name, file in index["weight_map"].items() if file == third.name)
    del index["weight_map"][moved]
    index["weight_map"] |= {"ghost": third.name, "outside": "../secret.safetensors", "number": 3}
    path.write_text(json.dumps(index))
    problems = "\n".join(problems_of(damaged))
    assert f"{first.name}: expected {first.stat().st_size + 10} bytes" in problems and "cut short" in problems
    assert f"{second.name}: expected a file" in problems
    assert f"{moved}: expected {third.name} in the index, which holds it, found none" in problems
    assert "ghost: expected in" in problems
    assert "'../secret.safetensors'" in problems
    assert "number: expected a file name" in problems
    assert len(problems.splitlines()) == 6


def test_a_tensor_in_two_files_is_found(damaged):
    first, second, *_ = sorted(damaged.glob("*.safetensors"))
    shutil.copyfile(first, second)
    text = f": expected {second.name} in the index, which holds it, found {first.name}"
    assert any(problem.endswith(text) for problem in problems_of(damaged))


@pytest.mark.parametrize("content", ["", "no json", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_broken_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    (problem,) = problems_of(tmp_path)
    assert "weight_map" in problem


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        (b"", b"", "without a whole header"),
        (b"{", b"", "JSONDecodeError"),
        ([], b"", "expected a JSON object as header, found list"),
        (b'{"a": {}, "a": {}}', b"", "named twice: a"),
        ({"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 1]}}, b"1", "Unknown dtype 'F7'"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", "takes 8 bytes, not 4"),
        ({"a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, -4]}}, b"", "must be integers from 0 on"),
        ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234", "dtype"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"123", "data from byte"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"123", "bytes"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"123", "cut short"),
    ],
)
def test_a_broken_file(tmp_path, header, data, expected):
    problems = problems_of(write_raw(tmp_path, header, data))
    assert any(expected in problem for problem in problems), problems


def test_overlapping_tensors(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
    }
    (problem,) = problems_of(write_raw(tmp_path, header, b"1234"))
    assert "b: expected data from byte" in problem


def test_a_file_shorter_than_a_length(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"123")
    (problem,) = problems_of(tmp_path)
    assert "3 bytes without a whole header" in problem
