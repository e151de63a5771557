from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore.bridge.dims import ModelDims
from mcore.bridge.rules import Copy, FusedQkv, GateUp, InterleavedGateUp, Qkv, Rule, VocabRows, alternatives

# Two groups of two query heads, head_dim 1: small enough to write the order of rows down by hand.
GOLDEN = ModelDims(num_layers=1, hidden=3, ffn=2, vocab=5, padded_vocab=8, heads=4, groups=2, head_dim=1)

QKV = Qkv("linear_qkv.weight", "qkv_rows hidden", "{q,k,v}_proj.weight")
QKV_BIAS = Qkv("linear_qkv.bias", "qkv_rows", "{q,k,v}_proj.bias")
GATE_UP = GateUp("linear_fc1.weight", "gate_up_rows hidden", "{gate,up}_proj.weight")
GATE_UP_BIAS = GateUp("linear_fc1.bias", "gate_up_rows", "{gate,up}_proj.bias")
VOCAB = VocabRows("embedding.weight", "padded_vocab hidden", "embed_tokens.weight")
COPY = Copy("linear_fc2.weight", "hidden ffn", "down_proj.weight")
COPY_NORM = Copy("norm.weight", "hidden", "norm.weight")
FUSED_QKV = FusedQkv("fused.linear_qkv.weight", "qkv_rows hidden", "qkv_proj.weight")
INTERLEAVED = InterleavedGateUp("interleaved.linear_fc1.weight", "2*ffn hidden", "gate_up_proj.weight")
ALL = (QKV, QKV_BIAS, GATE_UP, GATE_UP_BIAS, VOCAB, COPY, COPY_NORM, FUSED_QKV, INTERLEAVED)


def numbered(rule: Rule, dims: ModelDims) -> list[torch.Tensor]:
    """Hugging Face tensors in which every number is different."""
    parts, start = [], 1
    for shape in rule.hf_shapes(dims):
        parts.append(torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(shape))
        start += math.prod(shape)
    return parts


def test_qkv_rows_stand_in_megatrons_order():
    q, k, v = torch.tensor([[0], [1], [2], [3]]), torch.tensor([[10], [11]]), torch.tensor([[20], [21]])
    dims = ModelDims(num_layers=1, hidden=1, ffn=2, vocab=5, padded_vocab=8, heads=4, groups=2, head_dim=1)
    assert QKV.to_mcore([q, k, v], dims).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_qkv_bias_stands_in_the_same_order():
    parts = [torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])]
    assert QKV_BIAS.to_mcore(parts, GOLDEN).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_head_rows_stay_together():
    dims = ModelDims(num_layers=1, hidden=1, ffn=2, vocab=5, padded_vocab=8, heads=2, groups=1, head_dim=2)
    parts = [torch.tensor([[0], [1], [2], [3]]), torch.tensor([[10], [11]]), torch.tensor([[20], [21]])]
    assert QKV.to_mcore(parts, dims).flatten().tolist() == [0, 1, 2, 3, 10, 11, 20, 21]


def test_gate_stands_before_up():
    parts = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    assert GATE_UP_BIAS.to_mcore(parts, GOLDEN).tolist() == [1, 2, 3, 4]


def test_vocabulary_ends_with_rows_of_zeros():
    tensor = VOCAB.to_mcore([torch.ones(5, 3)], GOLDEN)
    assert tensor.shape == (8, 3)
    assert tensor[:5].eq(1).all() and tensor[5:].eq(0).all()


def test_padding_is_left_out_on_the_way_back():
    (back,) = VOCAB.to_hf(torch.ones(8, 3), GOLDEN)
    assert back.shape == (5, 3)


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.mcore)
def test_shapes_of_both_sides(rule):
    expected = {
        "linear_qkv.weight": ((8, 3), ((4, 3), (2, 3), (2, 3))),
        "linear_qkv.bias": ((8,), ((4,), (2,), (2,))),
        "linear_fc1.weight": ((4, 3), ((2, 3), (2, 3))),
        "linear_fc1.bias": ((4,), ((2,), (2,))),
        "embedding.weight": ((8, 3), ((5, 3),)),
        "linear_fc2.weight": ((3, 2), ((3, 2),)),
        "norm.weight": ((3,), ((3,),)),
        "fused.linear_qkv.weight": ((8, 3), ((8, 3),)),
        "interleaved.linear_fc1.weight": ((4, 3), ((4, 3),)),
    }
    assert (rule.mcore_shape(GOLDEN), rule.hf_shapes(GOLDEN)) == expected[rule.mcore]


@st.composite
def any_dims(draw) -> ModelDims:
    groups = draw(st.integers(1, 4))
    vocab = draw(st.integers(1, 9))
    return ModelDims(
        num_layers=1,
        hidden=draw(st.integers(1, 4)),
        ffn=draw(st.integers(1, 5)),
        vocab=vocab,
        padded_vocab=vocab + draw(st.integers(0, 5)),
        heads=groups * draw(st.integers(1, 4)),
        groups=groups,
        head_dim=draw(st.integers(1, 4)),
    )


@settings(max_examples=60, deadline=None)
@given(any_dims(), st.sampled_from(ALL), st.integers(1, 7))
def test_both_directions_are_exact_inverses_whole_and_in_windows(dims, rule, window):
    parts = numbered(rule, dims)
    whole = rule.to_mcore(parts, dims)
    assert tuple(whole.shape) == rule.mcore_shape(dims)
    # Every number arrives exactly once; the rest is padding.
    assert sorted(whole[whole != 0].tolist()) == sorted(number for part in parts for number in part.flatten().tolist())

    back = rule.to_hf(whole, dims)
    assert len(back) == len(parts)
    assert all(torch.equal(one, other) for one, other in zip(back, parts, strict=True))

    in_windows = torch.zeros_like(whole)
    pieces = [torch.zeros_like(part) for part in parts]
    for first in range(0, whole.shape[0], window):
        rule.fill_mcore(in_windows[first : first + window], parts, dims, first)
        for part, places, rows in rule.hf_pieces(whole[first : first + window], dims, first):
            pieces[part][places] += rows  # adds up wrongly if a row comes twice
    assert torch.equal(in_windows, whole)
    assert all(torch.equal(one, other) for one, other in zip(pieces, parts, strict=True))


def test_alternatives():
    assert alternatives("a.{q,k,v}_proj") == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert alternatives("layers.{L}.norm") == ("layers.{L}.norm",)


def test_layer_goes_into_hf_names():
    rule = Qkv("decoder.layers.{L}.self_attention.linear_qkv.weight", "qkv_rows hidden", "model.layers.{L}.{q,k,v}")
    assert rule.per_layer
    assert rule.hf_names(7) == ("model.layers.7.q", "model.layers.7.k", "model.layers.7.v")


def test_fused_tensors_have_their_rows_in_the_files_order():
    fused = torch.tensor([[0], [1], [2], [3], [10], [11], [20], [21]])
    dims = ModelDims(num_layers=1, hidden=1, ffn=2, vocab=5, padded_vocab=8, heads=4, groups=2, head_dim=1)
    assert FUSED_QKV.to_mcore([fused], dims).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert INTERLEAVED.to_mcore([fused[:4]], dims).flatten().tolist() == [0, 2, 1, 3]


def test_a_row_holds_for_layers_and_switches():
    dims = ModelDims(
        num_layers=3, hidden=1, ffn=2, vocab=5, padded_vocab=8, heads=4, groups=2, head_dim=1,
        moe_layers=(False, True, True), num_mtp_layers=1, more={"experts": 2, "gated": 1},
    )  # fmt: skip
    where = {
        when: [layer for layer in range(4) if Copy("a.{L}", "hidden", "b.{L}", when).applies(dims, layer)]
        for when in ("dense", "moe", "!dense gated", "moe !gated", "moe untied", "tied")
    }
    assert where == {
        "dense": [0],
        "moe": [1, 2, 3],
        "!dense gated": [1, 2, 3],
        "moe !gated": [],
        "moe untied": [1, 2, 3],
        "tied": [],
    }  # fmt: skip
    assert dims.shape("experts 2*hidden experts*ffn") == (2, 2, 4)
    with pytest.raises(AttributeError):
        dims.shape("no_such_size")
