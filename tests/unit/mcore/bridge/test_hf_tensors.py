"""Where the tensors that tables name lie in what files store."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mcore.bridge.hf_headers import StoredTensor
from mcore.bridge.hf_quantised import Quantisation
from mcore.bridge.hf_tensors import activation_scales, find_hf_tensors, is_whole, part_name, scale_problems

BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1, "uint8": 1}
EXPERTS = "model.layers.0.mlp.experts"
FP8 = Quantisation("fp8", (128, 128))


def files(**tensors):
    """Stored tensors one behind the other, by dtype and shape."""
    stored, offset = {}, 100
    for name, (dtype, *shape) in tensors.items():
        num_bytes = math.prod(shape) * BYTES[dtype]
        stored[name] = StoredTensor(name, dtype, tuple(shape), Path("model.safetensors"), offset, num_bytes)
        offset += num_bytes
    return stored


def find(name, stored, quantisation=None):
    return find_hf_tensors([name], stored, quantisation).get(name)


def test_names_of_parts_are_taken_apart():
    assert part_name("a.b[3].T") == type(part_name("a"))("a.b", 3, True)
    assert part_name("a.b[12]") == type(part_name("a"))("a.b", 12, False)
    assert part_name("a.b.weight").index is None


def test_an_expert_of_stacked_matrices():
    stored = files(**{f"{EXPERTS}.gate_up_proj": ("bfloat16", 4, 12, 8), f"{EXPERTS}.down_proj": ("bfloat16", 4, 8, 6)})
    gate, up, down = (find(f"{EXPERTS}.2.{kind}_proj.weight", stored) for kind in ("gate", "up", "down"))
    start = 100 + 2 * 12 * 8 * 2
    assert (gate.shape, gate.stored.offset, gate.num_bytes, gate.first_row) == ((6, 8), start, 96, 0)
    assert (up.shape, up.stored.offset, up.num_bytes, up.first_row) == ((6, 8), start + 96, 96, 6)
    assert (down.shape, down.source, down.index) == ((8, 6), f"{EXPERTS}.down_proj", 2)
    assert down.stored.offset == 100 + 4 * 12 * 8 * 2 + 2 * 96
    assert find(f"{EXPERTS}.4.up_proj.weight", stored) is None
    names = [f"{EXPERTS}.{expert}.{kind}_proj.weight" for expert in range(4) for kind in ("gate", "up", "down")]
    claimed = [claim for tensor in find_hf_tensors(names, stored).values() for claim in tensor.claims]
    for name, tensor in stored.items():
        assert sum(num_bytes for of, num_bytes in claimed if of == name) == tensor.num_bytes


def test_an_expert_with_a_name_of_its_own_comes_first():
    name = f"{EXPERTS}.0.down_proj.weight"
    stored = files(**{name: ("float32", 8, 6), f"{EXPERTS}.down_proj": ("bfloat16", 4, 8, 6)})
    assert find(name, stored).source == name


def test_a_transposed_part():
    tensor = find("x.down_proj[1].T", files(**{"x.down_proj": ("float32", 2, 6, 8)}))
    assert (tensor.shape, tensor.stored.shape, tensor.reading) == ((8, 6), (6, 8), "transposed")
    assert find("x.down_proj[2].T", files(**{"x.down_proj": ("float32", 2, 6, 8)})) is None
    assert find("x.down_proj[0]", files(**{"x.down_proj": ("float32", 6)})) is None


def test_an_fp8_weight_has_its_scales_and_is_read_as_bfloat16():
    stored = files(**{"a.weight": ("float8_e4m3fn", 576, 7168), "a.weight_scale_inv": ("float32", 5, 56)})
    tensor = find("a.weight", stored, FP8)
    assert (tensor.dtype, tensor.reading, tensor.block) == ("bfloat16", "fp8", (128, 128))
    assert tensor.claims == (("a.weight", 576 * 7168), ("a.weight_scale_inv", 4 * 5 * 56))
    assert is_whole(tensor) and scale_problems({"a.weight": tensor}, FP8) == []


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_scale_may_have_any_number_of_axes(shape):
    stored = files(**{"a.weight": ("float8_e4m3fn", 6, 8), "a.weight_scale_inv": ("bfloat16", *shape)})
    assert is_whole(find("a.weight", stored, Quantisation("fp8")))
    assert is_whole(find("a.weight", stored, FP8))  # one block
    assert not is_whole(find("a.weight", stored, Quantisation("fp8", (4, 8))))


def test_scales_that_do_not_fit_are_named():
    weights = {"a.weight": ("float8_e4m3fn", 256, 256)}
    for scales, found in (
        ({}, "none"),
        ({"a.weight_scale_inv": ("float32", 2, 3)}, "float32 [2, 3]"),
        ({"a.weight_scale_inv": ("uint8", 2, 2)}, "uint8 [2, 2]"),
        ({"a.weight_scale": ("float32", 2, 2)}, "none"),
    ):
        tensors = find_hf_tensors(["a.weight"], files(**weights, **scales), FP8)
        (problem,) = scale_problems(tensors, FP8)
        assert (problem.subject, problem.found) == ("hf a.weight_scale_inv", found)


def test_fp8_without_a_word_in_the_config_stays_what_it_is():
    stored = files(**{"a.weight": ("float8_e4m3fn", 6, 8), "b": ("float8_e4m3fn", 6)})
    for quantisation in (None, Quantisation("mxfp4")):
        assert find("a.weight", stored, quantisation).dtype == "float8_e4m3fn"
    assert find("b", stored, FP8).dtype == "float8_e4m3fn"  # no matrix


def test_names_of_scales_follow_the_method():
    compressed = Quantisation("compressed-tensors", (1, None))
    stored = files(
        **{
            "a.weight": ("float8_e4m3fn", 6, 8),
            "a.weight_scale": ("bfloat16", 6, 1),
            "a.input_scale": ("float32", 1),
            "a.activation_scale": ("float32", 1),
        }
    )
    found = find_hf_tensors(["a.weight"], stored, compressed)
    assert is_whole(found["a.weight"]) and found["a.weight"].block == (1, 8)
    assert activation_scales(found, stored, compressed) == {"a.input_scale"}
    assert activation_scales(found, stored, FP8) == {"a.activation_scale"}
    assert activation_scales(found, stored, None) == set()


def test_an_expert_of_mxfp4_blocks_lies_as_the_table_wants_it():
    stored = files(**{"x.up_blocks": ("uint8", 4, 12, 2, 16), "x.up_scales": ("uint8", 4, 12, 2)})
    tensor = find("x.up[3].T", stored)
    assert (tensor.shape, tensor.dtype, tensor.reading) == ((12, 64), "bfloat16", "mxfp4")
    assert tensor.claims == (("x.up_blocks", 12 * 2 * 16), ("x.up_scales", 12 * 2))
    assert tensor.stored.offset == 100 + 3 * 12 * 2 * 16
    assert is_whole(tensor)
    assert find("x.up[4].T", stored) is None
    assert find("x.up[3]", stored) is None


@pytest.mark.parametrize(
    "scales", [None, ("uint8", 4, 12), ("uint8", 4, 12, 3), ("float32", 4, 12, 2), ("uint8", 2, 12, 2)]
)
def test_mxfp4_scales_that_do_not_fit(scales):
    tensors = {"x.up_blocks": ("uint8", 4, 12, 2, 16)} | ({"x.up_scales": scales} if scales else {})
    found = find_hf_tensors(["x.up[3].T"], files(**tensors))
    (problem,) = scale_problems(found, None)
    assert problem.subject == "hf x.up_scales" and "uint8 [12, 2]" in problem.expected


@pytest.mark.parametrize("blocks", [("uint8", 4, 12, 32), ("uint8", 4, 12, 2, 8), ("float32", 4, 12, 2, 16)])
def test_blocks_of_another_format_are_not_dequantised(blocks):
    tensor = find("x.up[3].T", files(**{"x.up_blocks": blocks, "x.up_scales": ("uint8", 4, 12, 2)}))
    assert tensor is None or tensor.dtype == blocks[0]
