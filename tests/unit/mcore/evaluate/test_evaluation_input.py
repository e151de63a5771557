"""What is found before vLLM starts. None of this needs vLLM, and it is not installed where these tests run."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mcore.data.template import Sample
from mcore.errors import ConfigError, EvaluationError, error_from_json
from mcore.evaluate.engine import EngineSettings
from mcore.evaluate.perplexity import perplexity
from mcore.evaluate.run import EvaluationSettings, evaluate

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system messages here') }}{% endif %}"
    "<s> {{ message.role }} {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
SUITE = "name: small\ngroups: [{name: all, cases: [{prompt: 'Who are you ?', contains: ['{{NAME}}']}]}]\n"
ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello you"}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder as far as anything is read of it before vLLM loads the weights."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<s>", "</s>", "user", "assistant", "Who", "are", "you", "?", "hello"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    save_file({"weight": torch.ones(2)}, folder / "model.safetensors")
    write_config(folder)
    return folder


def write_config(folder, **changes):
    config = {"dtype": "float32", "max_position_embeddings": 128, "vocab_size": 10, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture(autouse=True)
def own_environment():
    """Setting up for vLLM changes the process's environment; other tests need theirs."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    return tmp_path


def settings_for(model, files, *, max_model_len=64, max_tokens=8, **changes):
    options = {"suite": files / "suite.yaml", "perplexity": (str(files / "rows.jsonl"),), "model_name": "robot"}
    return EvaluationSettings(EngineSettings(model, "auto", max_model_len), max_tokens=max_tokens, **options | changes)


def problems_of(settings, output):
    with pytest.raises(ConfigError) as caught:
        evaluate(settings, output)
    assert not output.exists()
    return [str(problem) for problem in caught.value.problems]


def test_good_input_gets_as_far_as_vllm(model, files):
    assert importlib.util.find_spec("vllm") is None, "this test is about an environment without vLLM"
    with pytest.raises(EvaluationError, match="vLLM's own environment"):
        evaluate(settings_for(model, files), files / "out")
    assert not (files / "out").exists()


def test_all_problems_at_once(model, files):
    (files / "rows.jsonl").write_text(json.dumps(ROW) + "\n{}\n")
    (files / "out").mkdir()
    settings = settings_for(model, files, max_model_len=256, model_name="")
    with pytest.raises(ConfigError) as caught:
        evaluate(settings, files / "out")
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == 4
    for words in ("max_position_embeddings", "out: expected no such folder", "--model-name", "rows.jsonl:2"):
        assert any(words in problem for problem in found), (words, found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": None}, "dtype: expected float32, bfloat16 or float16, found None. Pass --torch-dtype."),
        ({"dtype": "float8_e4m3fn"}, "found 'float8_e4m3fn'"),
        ({"max_position_embeddings": 32}, "--max-model-len 64: expected at most 32"),
    ],
)
def test_model_configurations_that_cannot_be_served(model, files, changes, words):
    write_config(model, **changes)
    try:
        found = problems_of(settings_for(model, files), files / "out")
    finally:
        write_config(model)
    assert len(found) == 1
    assert words in found[0]


def test_older_spelling_of_dtype_and_a_dtype_that_is_asked_for(model):
    write_config(model, dtype=None, torch_dtype="bfloat16")
    try:
        assert EngineSettings(model).resolved_dtype == "bfloat16"
        assert EngineSettings(model, max_model_len=128).problems() == []
        assert EngineSettings(model, "float16").resolved_dtype == "float16"
    finally:
        write_config(model)
    assert EngineSettings(model).resolved_dtype == "float32"


def test_a_rope_factor_lengthens_the_context(model):
    write_config(model, rope_scaling={"rope_type": "linear", "factor": 2.0})
    try:
        assert EngineSettings(model, max_model_len=256).problems() == []
        (problem,) = EngineSettings(model, max_model_len=257).problems()
    finally:
        write_config(model)
    assert "--max-model-len 257: expected at most 256" in str(problem)


def test_a_folder_without_model(files):
    found = problems_of(settings_for(files / "nothing", files), files / "out")
    assert any("config.json" in problem for problem in found)
    assert any("tokenizer files" in problem for problem in found)


def test_a_prompt_without_room_for_an_answer(model, files):
    # "<s> user Who are you ? </s> <s> assistant": 9 tokens.
    assert problems_of(settings_for(model, files, max_model_len=32, max_tokens=24), files / "out") == [
        "question all 1: expected at most 8 tokens (max_model_len - max_tokens), found 9. "
        "Raise max_model_len, or lower max_tokens."
    ]


def test_a_template_that_refuses_the_messages(model, files):
    found = problems_of(settings_for(model, files, perplexity=(), system="Be kind."), files / "out")
    assert found == ["question all 1: expected messages that the chat template takes, found no system messages here"]


def test_a_held_out_row_as_long_as_the_engine_allows_has_no_room(model, files):
    row = {"messages": [ROW["messages"][0], {"role": "assistant", "content": "hello " * 28 + "you"}]}
    (files / "rows.jsonl").write_text(json.dumps(row) + "\n")
    # 4 tokens of the user's turn, 2 before the answer, 29 of the answer and its end.
    found = problems_of(settings_for(model, files, max_model_len=36), files / "out")
    assert len(found) == 1
    assert found[0].endswith("rows.jsonl:1: expected fewer than 36 tokens (max_model_len), found 36")


def test_perplexity_counts_masked_tokens_only():
    samples = [
        Sample([1, 2, 3], [False, True, False]),
        Sample([1, 2, 3, 4], [False, False, True, True]),
    ]
    found = perplexity(samples, [[math.log(0.5), -99.0], [-99.0, math.log(0.25), math.log(0.125)]])
    assert (found.num_tokens, found.num_rows) == (3, 2)
    assert found.value == pytest.approx(4.0)  # (2 * 4 * 8) ** (1/3)


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, -1e6])
def test_a_perplexity_that_is_no_number_is_no_result(logprob):
    with pytest.raises(EvaluationError, match="not finite"):
        perplexity([Sample([1, 2], [False, True])], [[logprob]])


def test_the_command_reports_wrong_input_as_such(model, files, monkeypatch):
    monkeypatch.setenv("MCORE_FLOWS_ERROR_FILE", str(files / "error.json"))
    command = [
        *(sys.executable, "-m", "mcore.evaluate", "run", "--model", model, "--suite", files / "absent.yaml"),
        *("--output", files / "out", "--perplexity", files / "gone.jsonl", "--max-model-len", 64),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    error = error_from_json((files / "error.json").read_text())
    assert isinstance(error, ConfigError)
    assert len(error.problems) == 2
    assert not (files / "out").exists()
