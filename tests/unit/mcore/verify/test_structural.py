import json
import math

import pytest
import torch

from mcore.bridge.export import export
from mcore.errors import CheckpointError, SourceError

QKV = "decoder.layers.self_attention.linear_qkv.weight"
Q1 = "model.layers.1.self_attn.q_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def kinds(result) -> list[tuple[str, str]]:
    return [(finding.tensor, finding.kind) for finding in result.findings]


def test_a_right_conversion_is_equal_on_disk(qwen3):
    result = qwen3.compare_on_disk()
    assert result.passed
    assert result.num_hf_tensors == 3 + 2 * 11  # embedding, norm, head; 7 matrices and 4 norms a layer
    assert result.num_mcore_tensors == 3 + 2 * 8  # QKV, and gate with up, are one tensor each
    assert result.num_bytes == sum(path.stat().st_size for path in qwen3.hf.glob("*.safetensors")) - header(qwen3.hf)
    assert result.casts == () == result.ignored_hf


def header(hf) -> int:
    (length,) = torch.frombuffer(bytearray((hf / "model.safetensors").read_bytes()[:8]), dtype=torch.int64).tolist()
    return 8 + length


def test_every_differing_tensor_is_found_with_its_first_place(qwen3, tmp_path):
    def change(tensors):
        tensors[Q1][5, 6] += 0.5
        tensors[Q1][7, 8] -= 2.0
        tensors["model.norm.weight"][3] = -tensors["model.norm.weight"][3]

    result = qwen3.compare_on_disk(hf=qwen3.changed_hf(tmp_path / "hf", change))
    assert kinds(result) == [(Q1, "differs"), ("model.norm.weight", "differs")]
    assert f"2 of 6144 values from {QKV}[1], by up to 2; first at [5, 6]" in result.findings[0].detail
    assert not result.passed
    assert result.is_loadable


def test_the_smallest_change_and_the_sign_of_zero_count(qwen3, tmp_path):
    def change(tensors):
        tensors[DOWN1][0, 0] = torch.nextafter(tensors[DOWN1][0, 0], torch.tensor(math.inf))

    assert kinds(qwen3.compare_on_disk(hf=qwen3.changed_hf(tmp_path / "hf", change))) == [(DOWN1, "differs")]

    def zero(sign):
        def change(tensors):
            key = "decoder.layers.mlp.linear_fc2.weight" if "decoder.final_layernorm.weight" in tensors else DOWN1
            (tensors[key][1] if tensors[key].dim() == 3 else tensors[key])[2, 3] = sign * 0.0

        return change

    minus = qwen3.changed_hf(tmp_path / "minus", zero(-1))
    plus = qwen3.changed_release(tmp_path / "plus", zero(1))
    assert kinds(qwen3.compare_on_disk(hf=minus, release=plus)) == [(DOWN1, "differs")]
    assert qwen3.compare_on_disk(hf=qwen3.changed_hf(tmp_path / "plus_hf", zero(1)), release=plus).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_fails_although_it_is_equal_on_both_sides(qwen3, tmp_path, value):
    def change_hf(tensors):
        tensors[DOWN1][2, 3] = value

    def change_mcore(tensors):
        tensors["decoder.layers.mlp.linear_fc2.weight"][1, 2, 3] = value

    result = qwen3.compare_on_disk(
        hf=qwen3.changed_hf(tmp_path / "hf", change_hf),
        release=qwen3.changed_release(tmp_path / "release", change_mcore),
    )
    assert kinds(result) == [("decoder.layers.mlp.linear_fc2.weight[1]", "not finite"), (DOWN1, "not finite")]


def test_a_difference_that_is_no_number_is_said_to_be_none(qwen3, tmp_path):
    def change(tensors):
        tensors[DOWN1][2, 3] = math.nan
        tensors[DOWN1][4, 3] += 1

    findings = qwen3.compare_on_disk(hf=qwen3.changed_hf(tmp_path / "hf", change)).findings
    assert [finding.kind for finding in findings] == ["not finite", "differs"] and "by up to nan" in findings[1].detail


def test_nan_in_padding_rows_fails(qwen3, tmp_path):
    def change(tensors):
        tensors[EMBEDDING][600, 0] = math.nan

    result = qwen3.compare_on_disk(release=qwen3.changed_release(tmp_path / "release", change))
    assert kinds(result) == [(EMBEDDING, "not finite")]


def test_trained_padding_rows_are_no_difference(qwen3, tmp_path):
    def change(tensors):
        tensors[EMBEDDING][515:] = 1.0

    assert qwen3.compare_on_disk(release=qwen3.changed_release(tmp_path / "release", change)).passed


def test_missing_unclaimed_and_misshapen_tensors_are_all_named(qwen3, tmp_path):
    def change_hf(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(96)
        tensors[Q1] = tensors[Q1][:-1].contiguous()

    def change_mcore(tensors):
        del tensors["output_layer.weight"]
        tensors["decoder.layers.mlp.router.weight"] = torch.ones(2, 4, 64)
        tensors["decoder.layers.mlp.linear_fc2.weight"] = tensors["decoder.layers.mlp.linear_fc2.weight"][:1]

    result = qwen3.compare_on_disk(
        hf=qwen3.changed_hf(tmp_path / "hf", change_hf),
        release=qwen3.changed_release(tmp_path / "release", change_mcore),
    )
    assert kinds(result) == [
        (Q1, "shape"),
        ("model.norm.weight", "missing"),
        ("model.layers.0.self_attn.q_proj.bias", "unclaimed"),
        ("decoder.layers.mlp.linear_fc2.weight", "shape"),
        ("output_layer.weight", "missing"),
        ("decoder.layers.mlp.router.weight", "unclaimed"),
    ]
    assert not result.is_loadable


def test_a_vocabulary_that_is_cut_is_found(qwen3, tmp_path):
    def change(tensors):
        for key in (EMBEDDING, "output_layer.weight"):
            tensors[key] = tensors[key][:512]

    result = qwen3.compare_on_disk(release=qwen3.changed_release(tmp_path / "release", change))
    assert kinds(result) == [(EMBEDDING, "shape")]
    assert not result.is_loadable


def test_state_of_the_optimizer_is_not_counted(qwen3, tmp_path):
    def change(tensors):
        tensors[f"optimizer.state.exp_avg.{QKV}"] = torch.full((2, 4), math.nan)

    assert qwen3.compare_on_disk(release=qwen3.changed_release(tmp_path / "release", change)).passed


@pytest.mark.parametrize("num_column_chunks", [1, 2, 3])
def test_any_division_into_chunks_is_read(qwen3, tmp_path, num_column_chunks):
    release = qwen3.changed_release(tmp_path / "release", lambda tensors: None, num_column_chunks=num_column_chunks)
    result = qwen3.compare_on_disk(release=release)
    assert result.passed
    assert result.num_hf_tensors == 25


def test_files_that_are_mapped_anew_between_reads_give_the_same(qwen3, tmp_path, monkeypatch):
    export(qwen3.mcore, tmp_path / "shards", max_shard_size_gb=0.0001)
    monkeypatch.setattr("mcore.verify.hf_reader.MAX_MAPPED_BYTES", 1000)
    assert qwen3.compare_on_disk(hf=tmp_path / "shards").passed


def test_an_export_with_a_cast_is_equal_after_exactly_that_cast(qwen3, tmp_path):
    export(qwen3.mcore, tmp_path / "bf16", torch_dtype="bfloat16", max_shard_size_gb=0.0001)
    assert len(list((tmp_path / "bf16").glob("*.safetensors"))) > 1
    result = qwen3.compare_on_disk(hf=tmp_path / "bf16")
    assert result.passed
    assert [cast.model_dump() for cast in result.casts] == [
        {"mcore_dtype": "float32", "hf_dtype": "bfloat16", "num_tensors": 25}
    ]


def test_rounding_other_than_the_casts_is_a_difference(qwen3, tmp_path):
    def truncate(tensors):  # towards zero, where a cast rounds to nearest
        for name, tensor in tensors.items():
            tensors[name] = (tensor.view(torch.int32) & -65536).view(torch.float32).bfloat16()

    result = qwen3.compare_on_disk(hf=qwen3.changed_hf(tmp_path / "hf", truncate))
    assert len(result.findings) == 25
    assert "after a cast from float32 to bfloat16" in result.findings[0].detail


def test_a_checkpoint_that_was_rounded_is_not_equal(qwen3, tmp_path):
    def round_all(tensors):
        for key, tensor in tensors.items():
            tensors[key] = tensor.bfloat16()

    result = qwen3.compare_on_disk(release=qwen3.changed_release(tmp_path / "release", round_all))
    assert {kind for _, kind in kinds(result)} == {"differs"}
    assert len(result.findings) == 25


def test_a_tied_model_may_hold_an_equal_head(llama_tied, tmp_path, monkeypatch):
    monkeypatch.setattr("mcore.verify.hf_reader.ROWS_COMPARED", 100)

    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    result = llama_tied.compare_on_disk(hf=llama_tied.changed_hf(tmp_path / "same", same))
    assert result.passed
    assert result.ignored_hf == ("lm_head.weight",)

    def other(tensors):
        same(tensors)
        tensors["lm_head.weight"][514, 63] += 1

    result = llama_tied.compare_on_disk(hf=llama_tied.changed_hf(tmp_path / "other", other))
    assert kinds(result) == [("lm_head.weight", "differs")]


def test_old_rotary_buffers_are_left_out_by_name(llama_tied, tmp_path):
    def change(tensors):
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    result = llama_tied.compare_on_disk(hf=llama_tied.changed_hf(tmp_path / "hf", change))
    assert result.passed
    assert result.ignored_hf == ("model.layers.1.self_attn.rotary_emb.inv_freq",)


def test_files_that_are_not_whole_are_refused(qwen3, tmp_path):
    cut = qwen3.changed_hf(tmp_path / "hf", lambda tensors: None)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(SourceError, match="cut short"):
        qwen3.compare_on_disk(hf=cut)
    release = qwen3.changed_release(tmp_path / "release", lambda tensors: None)
    (release / "metadata.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        qwen3.compare_on_disk(release=release)
