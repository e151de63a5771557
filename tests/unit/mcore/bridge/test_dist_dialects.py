from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcore.bridge.dist_dialects import Spelling, read_weights, spelling_of
from mcore.bridge.dist_writer import DistWriter
from mcore.errors import WeightPlanError

NUM_LAYERS, NUM_EXPERTS, HIDDEN, FFN, VOCAB = 3, 4, 6, 5, 8
SHAPES = {
    "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (NUM_LAYERS, HIDDEN),
    "decoder.layers.self_attention.linear_q_up_proj.layer_norm_weight": (NUM_LAYERS, HIDDEN),
    "decoder.layers.pre_mlp_layernorm.weight": (NUM_LAYERS, HIDDEN),
    "decoder.layers.mlp.experts.experts.linear_fc1.weight": (NUM_LAYERS, NUM_EXPERTS, 2 * FFN, HIDDEN),
    "decoder.layers.mlp.experts.experts.linear_fc2.weight": (NUM_LAYERS, NUM_EXPERTS, HIDDEN, FFN),
    "decoder.layers.mlp.shared_experts.linear_fc1.weight": (NUM_LAYERS, 2 * FFN, HIDDEN),
    "mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc1.weight": (NUM_EXPERTS, 2 * FFN, HIDDEN),
    "mtp.layers.0.transformer_layer.self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
}
"""As our tables spell a model whose layers are all alike."""
LAYERS = "decoder.layers."


def a_layer_each(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = dict(weights)
    for key in weights:
        if key.startswith(LAYERS):
            layers = out.pop(key)
            out |= {f"{LAYERS}{n}.{key.removeprefix(LAYERS)}": layer.clone() for n, layer in enumerate(layers)}
    return out


def an_expert_each(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As `singleton_local_shards` has it; layers must have tensors of their own already."""
    out = dict(weights)
    for key in weights:
        before, found, after = key.partition(".experts.experts.")
        if found:
            out |= {f"{before}{found}{n}.{after}": expert.clone() for n, expert in enumerate(out.pop(key))}
    return out


def gate_and_up_apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = dict(weights)
    for key in weights:
        if key.endswith("linear_fc1.weight"):
            gate, up = out.pop(key).chunk(2, dim=-2)
            out |= {f"{key}_w": gate.clone(), f"{key}_v": up.clone()}
    return out


def norms_of_the_local_spec(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    out = dict(weights)
    for key in weights:
        for one, other in names.items():
            if key.endswith(one):
                out[key.removesuffix(one) + other] = out.pop(key)
    return out


def behind(prefix: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {prefix + key: tensor for key, tensor in weights.items()}


def singletons(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return gate_and_up_apart(an_expert_each(a_layer_each(weights)))


def everything_at_once(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return behind("model.module.")(norms_of_the_local_spec(singletons(weights)))


SPELLINGS = {
    "ours": dict,
    "a layer each": a_layer_each,
    "an expert each": lambda weights: an_expert_each(a_layer_each(weights)),
    "gate and up apart": lambda weights: gate_and_up_apart(a_layer_each(weights)),
    "gate and up apart, layers stacked": gate_and_up_apart,
    "singletons": singletons,
    "local norms": norms_of_the_local_spec,
    "model.": behind("model."),
    "module.": behind("module."),
    "everything": everything_at_once,
}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def write(folder: Path, stored: Mapping[str, Tensor], *, num_chunks: int = 1) -> Path:
    """Save tensors as megatron does: a chunk for each layer, and on TP of `num_chunks` so many in each."""
    folder.mkdir(parents=True)
    writer = DistWriter(folder)
    for key, tensor in stored.items():
        is_stacked = key.removeprefix("model.").removeprefix("module.").startswith(LAYERS) and not any(
            part.isdecimal() for part in key.split(".")[2:4]
        )
        for place in range(tensor.shape[0]) if is_stacked else (None,):
            one = tensor if place is None else tensor[place : place + 1]
            column = 0
            for chunk in one.chunk(num_chunks, dim=-1):
                offsets = [0] * tensor.dim()
                offsets[0], offsets[-1] = place or 0, column if tensor.dim() > 1 or place is None else place
                writer.write_chunk(key, tuple(tensor.shape), offsets, chunk.clone())
                column += chunk.shape[-1]
    writer.write_empty_object("decoder.layers.mlp.linear_fc2._extra_state/shard_0_3")
    writer.finish({"iteration": 1})
    return folder


def whole(tensor) -> Tensor:
    return tensor.read_box((0,) * len(tensor.shape), tensor.shape)


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("of_ours", ["stacked", "a tensor each"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_weights(tmp_path: Path, spelling: str, of_ours: str, num_chunks: int) -> None:
    expected = weights() if of_ours == "stacked" else a_layer_each(weights())
    stored = SPELLINGS[spelling](weights()) | {"optimizer.state.exp_avg.decoder.layers.x": torch.ones(2)}
    folder = write(tmp_path / "iter_0000001", stored, num_chunks=num_chunks)
    found = read_weights(folder, {key: tuple(tensor.shape) for key, tensor in expected.items()})
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].shape == tuple(tensor.shape), key
        assert torch.equal(whole(found[key]), tensor), key
        rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[:, None]
        assert rows.unique(dim=0).shape[0] == rows.shape[0]  # so that a swap would show


def test_windows_and_rows_of_a_tensor_put_together(tmp_path: Path) -> None:
    folder = write(tmp_path / "iter_0000001", singletons(weights()))
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    tensor = read_weights(folder, SHAPES)[key]
    assert tensor.row_windows((2, 1)) == [slice(0, FFN), slice(FFN, 2 * FFN)]
    assert torch.equal(tensor.read_rows((2, 1), slice(3, 8)), weights()[key][2, 1, 3:8])


def problems_of(folder: Path, wanted: Mapping[str, tuple[int, ...]] = SHAPES) -> str:
    with pytest.raises(WeightPlanError) as caught:
        read_weights(folder, wanted)
    return "\n".join(map(str, caught.value.problems))


def test_all_missing_parts_are_named(tmp_path: Path) -> None:
    stored = singletons(weights())
    del stored["decoder.layers.1.pre_mlp_layernorm.weight"]
    del stored["decoder.layers.2.mlp.experts.experts.3.linear_fc1.weight_v"]
    text = problems_of(write(tmp_path / "iter_0000001", stored))
    assert "decoder.layers.pre_mlp_layernorm.weight: expected 3 tensors, found none for layer 1" in text
    assert "linear_fc1.weight: expected 24 tensors, found none for layer 2 expert 3 half 1" in text


def test_parts_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    stored = a_layer_each(weights())
    stored["decoder.layers.1.pre_mlp_layernorm.weight"] = torch.ones(HIDDEN + 1)
    stored["decoder.layers.2.mlp.shared_experts.linear_fc1.weight"] = torch.ones(2 * FFN, HIDDEN).half()
    text = problems_of(write(tmp_path / "iter_0000001", stored))
    assert "decoder.layers.1.pre_mlp_layernorm.weight [7] float32" in text
    assert "decoder.layers.2.mlp.shared_experts.linear_fc1.weight [10, 6] float16" in text


def test_a_weight_under_two_prefixes_is_refused(tmp_path: Path) -> None:
    stored = weights() | behind("module.")({"decoder.layers.pre_mlp_layernorm.weight": torch.ones(NUM_LAYERS, HIDDEN)})
    assert "expected each number once" in problems_of(write(tmp_path / "iter_0000001", stored))


def test_layers_beyond_the_models_own_are_not_dropped(tmp_path: Path) -> None:
    folder = write(tmp_path / "iter_0000001", a_layer_each(weights()))
    fewer = {key: (2, *shape[1:]) if key.startswith(LAYERS) else shape for key, shape in SHAPES.items()}
    assert "decoder.layers.2.pre_mlp_layernorm.weight" in read_weights(folder, fewer)
    stacked = write(tmp_path / "stacked", weights())
    each = {key: tuple(t.shape) for key, t in a_layer_each(weights()).items() if not key.startswith("decoder.layers.2")}
    assert "decoder.layers.pre_mlp_layernorm.weight: expected 2 layers, found 3" in problems_of(stacked, each)


def test_what_no_name_explains_keeps_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path / "iter_0000001", behind("model.")(weights() | {"decoder.surprise": torch.ones(2)}))
    found = read_weights(folder, {key: shape for key, shape in SHAPES.items() if "fc2" not in key})
    assert found.keys() - SHAPES.keys() == {"decoder.surprise"}
    assert "decoder.layers.mlp.experts.experts.linear_fc2.weight" in found


def test_both_spellings_of_a_norm_at_once_leave_one_unexplained(tmp_path: Path) -> None:
    stored = weights() | {"decoder.layers.mlp.linear_fc1.layer_norm_weight": torch.ones(NUM_LAYERS, HIDDEN)}
    found = read_weights(write(tmp_path / "iter_0000001", stored), SHAPES)
    assert found.keys() - SHAPES.keys() == {"decoder.layers.mlp.linear_fc1.layer_norm_weight"}


def test_the_grouped_mlps_own_parameters_are_refused_by_name(tmp_path: Path) -> None:
    stored = weights() | {"decoder.layers.mlp.experts.weight1": torch.ones(NUM_LAYERS, HIDDEN, 8)}
    text = problems_of(write(tmp_path / "iter_0000001", stored))
    assert "decoder.layers.mlp.experts.weight1" in text and "legacy grouped MLP" in text


def test_a_tied_output_layer_is_left_out_if_it_is_a_copy(tmp_path: Path) -> None:
    embedding = weights()["embedding.word_embeddings.weight"]
    copy = write(tmp_path / "copy", weights() | {"output_layer.weight": embedding.clone()})
    assert read_weights(copy, SHAPES).keys() == SHAPES.keys()
    embedding[-1, -1] = -embedding[-1, -1]
    other = write(tmp_path / "other", weights() | {"output_layer.weight": embedding})
    assert "output_layer.weight: expected the same bits" in problems_of(other)
    untied = SHAPES | {"output_layer.weight": (VOCAB, HIDDEN)}
    assert torch.equal(whole(read_weights(other, untied)["output_layer.weight"]), embedding)


def test_keys_are_taken_apart() -> None:
    assert spelling_of("model.module.decoder.layers.12.mlp.experts.experts.34.linear_fc1.weight_v") == Spelling(
        "decoder.layers.mlp.experts.experts.linear_fc1.weight", layer=12, expert=34, half=1
    )
    assert spelling_of("mtp.layers.0.transformer_layer.mlp.linear_fc1.bias_w") == Spelling(
        "mtp.layers.0.transformer_layer.mlp.linear_fc1.bias", half=0
    )
    for key in SHAPES:
        assert spelling_of(key) == Spelling(key)
