from __future__ import annotations

import pytest

from mcore.bridge.hf_config import copy_small_files, exported_config, max_served_tokens, read_hf_config
from mcore.errors import SourceError


def test_small_files_travel_but_no_weights_no_code_no_pickles(tmp_path):
    source = tmp_path / "hf"
    (source / "additional_chat_templates").mkdir(parents=True)
    travels = [
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer.model",
    ]
    stays = [
        "metrics.json",
        "manifest.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "modeling_custom.py",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "training_args.pt",
    ]
    for name in travels + stays:
        (source / name).write_text(name)
    assert sorted(copy_small_files(source, tmp_path / "out")) == travels
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == set(travels)
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({}, {"dtype": "bfloat16"}),
        ({"dtype": "float32", "quantization_config": {"bits": 4}}, {"dtype": "bfloat16"}),
    ],
)
def test_the_config_names_the_dtype_that_was_written(before, after):
    assert exported_config({"vocab_size": 250} | before, "bfloat16") == {"vocab_size": 250} | after


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(SourceError, match="no Hugging Face model"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\udce9"])
def test_a_config_that_is_no_json_object(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SourceError, match=r"config\.json: expected JSON"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({}, 64),
        ({"max_position_embeddings": None}, None),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"type": "linear", "factor": 1.5}}, 96),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2}}, 128),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 64),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 64),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, 64),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, 64),
        ({"rope_scaling": "linear"}, 64),
    ],
)
def test_a_context_is_lengthened_as_vllm_does(config, longest):
    assert max_served_tokens({"max_position_embeddings": 64} | config) == longest
