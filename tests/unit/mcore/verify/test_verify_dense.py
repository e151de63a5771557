"""Dense models of every table, rope, window and head through the files: there, proven, and back to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from mcore.bridge.convert import convert
from mcore.bridge.export import export
from mcore.verify.prompts import Prompt
from mcore.verify.traces import hf_traces
from mcore.verify.verify import verify
from tests.hf_folders import assert_same_weights, weights_of, write_hf_folder
from tests.tiny_classifiers import CLASSIFIERS
from tests.tiny_dense import DENSE
from tests.tiny_models import tiny_hf_model

MAX_RELATIVE_ERROR = 2e-5


def write_folder(folder, name):
    """A model without a tokenizer: prompts are then token ids, of any length."""
    config = write_hf_folder(folder, name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    return config


ONLY_LOGITS = ("mistral", "mistral_full", "qwen2_yarn", "qwen3_window", "phi3", "phi3_short")
"""These differ from others in their config alone; `test_dense_models.py` has their logits."""


@pytest.mark.parametrize("name", [*(name for name in DENSE if name not in ONLY_LOGITS), *CLASSIFIERS])
def test_there_proven_and_back_to_the_bit(tmp_path, name):
    config = write_folder(tmp_path / "hf", name)
    convert(tmp_path / "hf", tmp_path / "mcore")
    report = verify(tmp_path / "hf", tmp_path / "mcore", tmp_path / "report", num_prompts=2, max_prompt_tokens=70)
    assert report.passed
    assert report.numerical.relative_error < MAX_RELATIVE_ERROR
    # Past every window and every length before scaling; no further than the model is said to go.
    assert {prompt.num_tokens for prompt in report.numerical.prompts} == {64 if name == "llama_dynamic" else 70}

    export(tmp_path / "mcore", tmp_path / "back")
    before = weights_of(tmp_path / "hf")
    assert_same_weights(weights_of(tmp_path / "back"), before)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert ("score.weight" in before) == (name in CLASSIFIERS)


def test_a_swapped_head_of_a_classifier_is_stopped(tmp_path):
    write_folder(tmp_path / "hf", "llama_classifier")
    convert(tmp_path / "hf", tmp_path / "mcore")
    write_folder(tmp_path / "other", "llama_classifier")
    weights = weights_of(tmp_path / "other")
    weights["score.weight"] = weights["score.weight"].roll(1, 0)
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    report = verify(tmp_path / "other", tmp_path / "mcore", tmp_path / "report")
    assert [finding.tensor for finding in report.structural.findings] == ["score.weight"]
    assert report.numerical.first_bad_point == "head"


def test_a_classifier_answers_before_its_padding(tmp_path):
    """Where the answer is taken is part of the proof: another padding token, another answer."""
    write_folder(tmp_path / "hf", "qwen3_classifier")
    convert(tmp_path / "hf", tmp_path / "mcore")
    prompt = Prompt("padded", (3, 4, 5, 249, 249))
    model, _ = tiny_hf_model("qwen3_classifier")
    trace = next(hf_traces(model, [prompt], torch.device("cpu")))
    assert trace.logits.shape == (6, 2)
    assert torch.equal(trace.logits[5], trace.logits[2])


@pytest.mark.parametrize("name", ["llama_dynamic", "phi3_long"])
def test_a_prompt_is_not_computed_as_the_longer_one_before_it(name):
    short, long = Prompt("short", tuple(range(20))), Prompt("long", tuple(range(60)))
    model, _ = tiny_hf_model(name)
    device = torch.device("cpu")
    after_long = list(hf_traces(model, [long, short], device))[1]
    alone = next(hf_traces(tiny_hf_model(name)[0], [short], device))
    assert torch.equal(after_long.logits, alone.logits)
