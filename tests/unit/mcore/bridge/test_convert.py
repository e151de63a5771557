"""Convert and export, there and back: what comes back is what went in, to the bit."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from mcore.bridge.convert import convert
from mcore.bridge.dist_files import read_dist_tensors
from mcore.bridge.export import export
from mcore.bridge.families import family_of_config
from mcore.errors import CheckpointError, ConfigError, InputError, SourceError, WeightPlanError
from mcore.select import select_checkpoint
from tests.hf_folders import CHAT_TEMPLATE, assert_same_weights, weights_of, write_hf_folder, write_zero_model
from tests.tiny_models import MODELS, mcore_tensors, tiny_hf_model
from tests.tiny_normed import NORMED


@pytest.mark.parametrize(("dtype", "max_shard_size"), [(torch.float32, "1GB"), (torch.bfloat16, "100KB")])
@pytest.mark.parametrize("name", [*MODELS, *NORMED])
def test_there_and_back_is_the_same_to_the_bit(tmp_path, name, dtype, max_shard_size):
    config = write_hf_folder(tmp_path / "hf", name, dtype=dtype, max_shard_size=max_shard_size)
    figures = convert(tmp_path / "hf", tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "back", max_shard_size_gb=5.0 if max_shard_size == "1GB" else 1e-4)

    before = weights_of(tmp_path / "hf")
    assert figures["num_tensors"] == len(before)
    assert figures["num_parameters"] == sum(tensor.numel() for tensor in before.values())
    assert figures["padded_vocab_size"] == 256
    assert_same_weights(weights_of(tmp_path / "back"), before)
    assert ("lm_head.weight" in before) != config["tie_word_embeddings"]
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    files = {path.name for path in (tmp_path / "hf").iterdir() if path.suffix != ".safetensors"}
    back = {path.name for path in (tmp_path / "back").iterdir() if path.suffix != ".safetensors"}
    assert back == files | {"metrics.json"}


def test_the_checkpoint_holds_what_the_family_says(tmp_path):
    write_hf_folder(tmp_path / "hf", "qwen2")
    convert(tmp_path / "hf", tmp_path / "mcore", make_vocab_size_divisible_by=384)
    chosen = select_checkpoint(tmp_path / "mcore")
    assert chosen.path == tmp_path / "mcore" / "release"
    model, config = tiny_hf_model("qwen2")
    expected = mcore_tensors(model, config, padded_vocab_size=384)
    tensors = read_dist_tensors(chosen.path)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.shape == tuple(expected[key].shape)
        assert torch.equal(tensor.read_rows((), slice(0, tensor.shape[0])), expected[key]), key


def test_dtypes_stay_tensor_by_tensor(tmp_path):
    write_hf_folder(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    weights = weights_of(tmp_path / "hf")
    weights = {name: tensor.float() if "norm" in name else tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "back")
    assert_same_weights(weights_of(tmp_path / "back"), weights)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_export_in_another_dtype(tmp_path):
    write_hf_folder(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "back", torch_dtype="bfloat16")
    rounded = {name: tensor.bfloat16() for name, tensor in weights_of(tmp_path / "hf").items()}
    assert_same_weights(weights_of(tmp_path / "back"), rounded)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_tensors_go_through_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("mcore.bridge.convert.CHUNK_BYTES", 1000)  # a few rows of the tiny model
    write_hf_folder(tmp_path / "hf", "llama_bias")
    convert(tmp_path / "hf", tmp_path / "mcore")
    tensors = read_dist_tensors(tmp_path / "mcore" / "release")
    assert len(tensors["embedding.word_embeddings.weight"].chunks) == -(-256 // 3)
    export(tmp_path / "mcore", tmp_path / "back")
    assert_same_weights(weights_of(tmp_path / "back"), weights_of(tmp_path / "hf"))


def test_two_conversions_give_the_same_bytes(tmp_path):
    write_hf_folder(tmp_path / "hf", "qwen3")
    for name in ("one", "other"):
        convert(tmp_path / "hf", tmp_path / name)
    one = {path.relative_to(tmp_path / "one"): path for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert len(one) > 8
    for relative, path in one.items():
        if relative.name != "metrics.json":  # holds seconds
            assert path.read_bytes() == (tmp_path / "other" / relative).read_bytes(), relative


def files_of(folder):
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name.name != "metrics.json"}  # holds seconds


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_workers_make_the_same_model(tmp_path, name):
    write_hf_folder(tmp_path / "hf", name, dtype=torch.bfloat16)
    weights = weights_of(tmp_path / "hf")
    for workers in (1, 2, 3):
        mcore, back = tmp_path / f"mcore{workers}", tmp_path / f"back{workers}"
        convert(tmp_path / "hf", mcore, num_workers=workers)
        shards = sorted(path.name for path in (mcore / "release").glob("*.distcp"))
        assert shards == [f"__{number}_0.distcp" for number in range(workers + 1)]  # the last one has no weights
        export(mcore, back, num_workers=workers, max_shard_size_gb=1e-4)
        assert files_of(back) == files_of(tmp_path / "back1")
        assert_same_weights(weights_of(back), weights)
    convert(tmp_path / "hf", tmp_path / "again", num_workers=3)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "mcore3")


def test_a_worker_that_fails_publishes_nothing(tmp_path):
    write_hf_folder(tmp_path / "hf", "llama")
    weights = weights_of(tmp_path / "hf")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # the first step's and the last one's
        weights[name][3, 4] = float("nan")
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError) as caught:
        convert(tmp_path / "hf", tmp_path / "mcore", num_workers=2)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(re.findall(r"[\w.]+weight", str(caught.value)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_tied_models_equal_head_is_left_out_and_a_different_one_refused(tmp_path, capfd):
    write_hf_folder(tmp_path / "hf", "qwen3_tied")
    weights = weights_of(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
    convert(tmp_path / "hf", tmp_path / "mcore")
    assert "lm_head.weight equals model.embed_tokens.weight bit for bit" in capfd.readouterr().err
    export(tmp_path / "mcore", tmp_path / "back")
    assert_same_weights(weights_of(tmp_path / "back"), weights)

    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1e-6
    save_file(weights | {"lm_head.weight": head}, file)
    with pytest.raises(WeightPlanError, match="tie_word_embeddings"):
        convert(tmp_path / "hf", tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_old_rotary_buffers_do_not_disturb(tmp_path, capfd):
    write_hf_folder(tmp_path / "hf", "llama")
    weights = weights_of(tmp_path / "hf")
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    save_file(weights | old, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "mcore")
    assert "rotary_emb.inv_freq is left out" in capfd.readouterr().err
    export(tmp_path / "mcore", tmp_path / "back")
    assert_same_weights(weights_of(tmp_path / "back"), weights)


def test_export_drops_a_quantisation_that_no_longer_holds(tmp_path):
    config = write_hf_folder(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    convert(tmp_path / "hf", tmp_path / "mcore")
    export(tmp_path / "mcore", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_problems_of_config_and_files_come_together_and_nothing_is_written(tmp_path):
    config = write_hf_folder(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    file = tmp_path / "hf" / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "hf", tmp_path / "mcore")
    assert "hidden_act" in str(caught.value) and "cut short" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_vocabulary_that_config_and_weights_disagree_on(tmp_path):
    config = write_hf_folder(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"vocab_size": 251}))
    with pytest.raises(WeightPlanError) as caught:
        convert(tmp_path / "hf", tmp_path / "mcore")
    assert [(p.subject, p.expected, p.found) for p in caught.value.problems] == [
        ("hf lm_head.weight", "[251, 64]", "[250, 64]"),
        ("hf model.embed_tokens.weight", "[251, 64]", "[250, 64]"),
    ]


def test_no_model_at_all(tmp_path):
    with pytest.raises(SourceError, match="no Hugging Face model"):
        convert(tmp_path / "nothing", tmp_path / "mcore")


def test_an_existing_output_is_refused_unless_it_may_be_replaced(tmp_path):
    write_hf_folder(tmp_path / "hf", "llama")
    (tmp_path / "mcore").mkdir()
    (tmp_path / "mcore" / "mine").touch()
    with pytest.raises(ConfigError, match="in the way"):
        convert(tmp_path / "hf", tmp_path / "mcore")
    assert (tmp_path / "mcore" / "mine").exists()
    convert(tmp_path / "hf", tmp_path / "mcore", overwrite=True)
    assert not (tmp_path / "mcore" / "mine").exists()
    with pytest.raises(ConfigError, match="in the way"):
        export(tmp_path / "mcore", tmp_path / "hf")


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    write_hf_folder(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "mcore")
    free = shutil.disk_usage(tmp_path)._replace(free=600_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    for run, source in ((convert, "hf"), (export, "mcore")):
        with pytest.raises(ConfigError, match=r"too little room(.|\n)*found 0.001 GB"):
            run(tmp_path / source, tmp_path / "output")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]


def test_an_export_without_the_small_files_or_of_a_damaged_checkpoint(tmp_path):
    write_hf_folder(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "mcore")
    with pytest.raises(CheckpointError, match="checkpoint 100 of"):
        export(tmp_path / "mcore", tmp_path / "back", iteration=100)
    shutil.copytree(tmp_path / "mcore", tmp_path / "without")
    shutil.rmtree(tmp_path / "without" / "hf")
    with pytest.raises(SourceError, match="no Hugging Face model"):
        export(tmp_path / "without", tmp_path / "back")
    (tmp_path / "mcore" / "release" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export(tmp_path / "mcore", tmp_path / "back")
    assert not (tmp_path / "back").exists()


LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 10,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}
"""0.75 GiB in float32."""

MEASURE = """
import re, sys
from pathlib import Path
import mcore.backend.meta  # megatron's own size is nothing to measure
from mcore.bridge.convert import convert
from mcore.bridge.export import export
# Not getrusage: its peak begins with that of the process that started this one.
peak_gib = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
base, hf, mcore, back = peak_gib(), *map(Path, sys.argv[1:])
convert(hf, mcore)
converted = peak_gib()
export(mcore, back)
print(converted - base, peak_gib() - base)
"""


def test_memory_stays_flat(tmp_path):
    num_bytes = write_zero_model(tmp_path / "hf", LARGE)
    assert num_bytes > 0.75 * 2**30
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "hf", tmp_path / "mcore", tmp_path / "back"],
        check=True,
        capture_output=True,
        text=True,
    )
    converted, exported = map(float, done.stdout.split())
    # The model on the meta device and a buffer: less than a chunk of the checkpoint, let alone a large tensor.
    assert 0 < converted < 0.12 and exported < 0.12, done.stdout
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > num_bytes


def test_kill_9_leaves_nothing_under_the_final_name(tmp_path):
    write_zero_model(tmp_path / "hf", LARGE)
    output, shard = tmp_path / "mcore", tmp_path / ".mcore.partial" / "release" / "__0_0.distcp"
    command = [sys.executable, "-m", "mcore.bridge", "convert", "--hf", tmp_path / "hf", "--output", output]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (shard.exists() and shard.stat().st_size > 200 * 2**20):
            assert child.poll() is None and time.monotonic() < deadline, "was done before it could be killed"
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not output.exists() and shard.exists()

    shutil.rmtree(tmp_path / "hf")
    write_hf_folder(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", output)
    export(output, tmp_path / "back")
    assert_same_weights(weights_of(tmp_path / "back"), weights_of(tmp_path / "hf"))
    assert not shard.exists()


@pytest.fixture
def all_models_are_large(monkeypatch):
    """Large ones are copied around the page cache, and while megatron's model is still being built."""
    monkeypatch.setattr("mcore.bridge.check.MEANWHILE_FROM_BYTES", 0)
    monkeypatch.setattr("mcore.bridge.output_file.DIRECT_FROM_BYTES", 0)
    monkeypatch.setattr("mcore.bridge.spans.DIRECT_FROM_BYTES", 0)


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_large_model_gives_the_same_bytes(tmp_path, name, num_workers, request):
    write_hf_folder(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "small", num_workers=num_workers)
    export(tmp_path / "small", tmp_path / "small_back", num_workers=num_workers)
    request.getfixturevalue("all_models_are_large")
    convert(tmp_path / "hf", tmp_path / "large", num_workers=num_workers)
    export(tmp_path / "large", tmp_path / "large_back", num_workers=num_workers)
    assert files_of(tmp_path / "small") == files_of(tmp_path / "large")
    assert files_of(tmp_path / "small_back") == files_of(tmp_path / "large_back")


def test_what_is_wrong_with_a_large_model_and_its_weights_comes_at_once(tmp_path, request):
    config = write_hf_folder(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 100}))
    said = []
    for is_large in (False, True):
        if is_large:
            request.getfixturevalue("all_models_are_large")
        with pytest.raises(InputError) as caught:
            convert(tmp_path / "hf", tmp_path / "mcore")
        said.append(set(caught.value.problems))
    assert said[0] == said[1]
    assert {"config.json: num_hidden_layers", "hf model.layers.99.mlp.up_proj.weight"} <= {p.subject for p in said[0]}


def test_what_megatron_says_late_of_a_large_model_is_said_all_the_same(tmp_path, request):
    config = write_hf_folder(tmp_path / "hf", "llama")
    family = family_of_config(config)
    rules = [replace(rule, mcore=rule.mcore.replace("linear_fc2", "linear_fc3")) for rule in family.rules]
    other = replace(family, rules=tuple(rules))
    said = []
    for is_large in (False, True):
        if is_large:
            request.getfixturevalue("all_models_are_large")
        with pytest.raises(WeightPlanError) as caught:
            convert(tmp_path / "hf", tmp_path / "mcore", family=other)
        said.append(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert str(said[0]) == str(said[1]) and "linear_fc3" in str(said[0])
