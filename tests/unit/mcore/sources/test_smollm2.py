"""The catalogue's demo model, as the project's own stage makes it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from mcore.bridge.dims import ModelDims
from mcore.bridge.families import family_of_config
from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.hf_headers import read_headers
from mcore.sources import catalogue

NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def model(smollm2) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2)


def test_the_catalogues_copy_of_the_config_is_what_fetching_makes(smollm2):
    assert catalogue.config_of(NAME) == read_hf_config(smollm2)


def test_it_is_a_llama_that_can_be_converted(smollm2):
    config = read_hf_config(smollm2)
    assert family_of_config(config).name == "llama"
    dims = ModelDims.from_hf_config(config)
    assert (dims.num_layers, dims.hidden, dims.heads, dims.groups, dims.head_dim) == (30, 576, 9, 3, 64)
    assert dims.tied and dims.vocab == 49152
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5 and config["rope_parameters"]["rope_theta"] == 100000.0
    tensors = read_headers(smollm2)
    assert len(tensors) == 272 and "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {"float32"}


def test_special_tokens_of_tokenizer_config_and_generation_config_agree(smollm2, tokenizer):
    config = read_hf_config(smollm2)
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == config[f"{name}_token_id"] == generation[f"{name}_token_id"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.model_max_length == config["max_position_embeddings"] == 8192


def test_the_chat_template_ends_turns_with_the_eos_token(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("In 2024", ["In", "Ġ", "2", "0", "2", "4"]),
        ("x  12", ["x", "ĠĠ", "1", "2"]),  # GPT-2's rule alone would give x, Ġ, Ġ, 1, 2
        ("Hello world", ["Hello", "Ġworld"]),
    ],
)
def test_text_is_split_as_the_model_was_trained(tokenizer, text, tokens):
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text


def test_it_answers_sensibly_and_stops(model, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id
