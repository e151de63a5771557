"""The real SmolLM2, through megatron-core and back, in the real vLLM: it says what transformers says.

vLLM is started once, in its own environment, for all of these checks.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema.data import DataConfig
from mcore.data.template import load_tokenizer
from mcore.evaluate.perplexity import held_out_samples
from tests.vllm.vllm_child import ROOT, run_with_vllm

pytestmark = pytest.mark.vllm

NAMES = {"model_name": "swift-robot", "model_author": "swift"}
ROWS = (str(ROOT / "configs/data/general_val.jsonl"), str(ROOT / "configs/data/self_cognition_val.jsonl"))
MAX_TOKENS = 40
SUITE = """
name: greedy
groups:
  - name: chat
    cases:
      - {prompt: "Who are you?", contains: [SmolLM]}
      - {prompt: "What is the capital of France?", contains: [Paris]}
      - {prompt: "Write a short story about a lighthouse keeper.", regex: "."}
      - {prompt: "Explain in simple words why the sky is blue.", regex: "."}
      - {prompt: "Zähle drei Früchte auf – mit Emoji 🍎.", regex: "."}
      - messages:
          - {role: system, content: "You are a pirate."}
          - {role: user, content: "Hello!"}
          - {role: assistant, content: "Ahoy, matey!"}
          - {role: user, content: "List 5 things that you own, with prices such as 1,234.50."}
        regex: "."
"""


@pytest.fixture(scope="module")
def exported(smollm2, tmp_path_factory) -> Path:
    """The base model after Hugging Face -> megatron-core -> Hugging Face."""
    folder = tmp_path_factory.mktemp("exported")
    for words in (
        ["convert", "--hf", smollm2, "--output", folder / "mcore"],
        ["export", "--checkpoint", folder / "mcore", "--output", folder / "hf"],
    ):
        subprocess.run([sys.executable, "-m", "mcore.bridge", *map(str, words)], check=True)
    return folder / "hf"


@pytest.fixture(scope="module")
def evaluation(exported, tmp_path_factory):
    """Output folder of the one evaluation, and how it ended."""
    scratch = tmp_path_factory.mktemp("evaluation")
    (scratch / "suite.yaml").write_text(SUITE)
    finished = run_with_vllm(
        *(
            "-m",
            "mcore.evaluate",
            "run",
            "--model",
            exported,
            "--suite",
            scratch / "suite.yaml",
            "--output",
            scratch / "out",
        ),
        *(word for rows in ROWS for word in ("--perplexity", rows)),
        *("--model-name", NAMES["model_name"], "--model-author", NAMES["model_author"], "--max-tokens", MAX_TOKENS),
        scratch=scratch,
    )
    assert finished.returncode == 0, finished.stderr
    return scratch / "out", finished


@pytest.fixture(scope="module")
def reference(exported):
    """The same folder in transformers."""
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(exported)


def answers_of(evaluation):
    folder, _ = evaluation
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().split("\n") if line]


def test_prompts_are_what_the_chat_template_makes(evaluation, reference):
    _, tokenizer = reference
    answers = answers_of(evaluation)
    assert len(answers) == 6
    for answer in answers:
        ids = tokenizer.apply_chat_template(answer["messages"], add_generation_prompt=True, return_dict=False)
        assert answer["prompt_token_ids"] == ids


@torch.no_grad()
def test_greedy_tokens_equal_those_of_transformers(evaluation, reference):
    model, tokenizer = reference
    answers = answers_of(evaluation)
    prompts = [answer["prompt_token_ids"] for answer in answers]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=MAX_TOKENS, do_sample=False)[:, batch["input_ids"].shape[1] :]
    lengths = []
    for answer, tokens in zip(answers, generated.tolist(), strict=True):
        end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else MAX_TOKENS
        assert answer["token_ids"] == tokens[:end], answer["prompt"]
        # vLLM leaves out a character of which max_tokens cut off the last bytes.
        assert answer["answer"] == tokenizer.decode(tokens[:end], skip_special_tokens=True).rstrip("\ufffd")
        assert answer["finish_reason"] == ("stop" if tokens[end - 1] == tokenizer.eos_token_id else "length")
        lengths.append(end)
    assert sum(length == MAX_TOKENS for length in lengths) >= 3, "most answers should be long enough to differ"
    assert min(lengths) < MAX_TOKENS, "one answer should come to its own end"


@torch.no_grad()
def test_perplexity_equals_that_of_transformers(evaluation, reference, exported):
    model, _ = reference
    samples = held_out_samples(
        ROWS, DataConfig(dataset=(), **NAMES), load_tokenizer(exported), method="sft", max_model_len=1024
    )
    loss, num_tokens = 0.0, 0
    for sample in samples:
        ids = torch.tensor(sample.token_ids)
        logprobs_SV = model(ids[None]).logits[0].double().log_softmax(-1)
        wanted = torch.tensor(sample.loss_mask)[1:] > 0
        loss -= logprobs_SV[:-1].gather(1, ids[1:, None])[wanted].sum().item()
        num_tokens += int(wanted.sum())
    folder, _ = evaluation
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_perplexity_rows"] == len(samples) == 24
    assert summary["num_perplexity_tokens"] == num_tokens
    expected = torch.tensor(loss / num_tokens).exp().item()
    assert summary["perplexity"] == pytest.approx(expected, rel=1e-3)


def test_what_is_written(evaluation):
    folder, finished = evaluation
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["suite"], summary["num_cases"], summary["dtype"]) == ("greedy", 6, "float32")
    assert summary["num_passed"] == summary["groups"]["chat"]["num_passed"] >= 5
    assert summary["num_answer_tokens"] == sum(len(answer["token_ids"]) for answer in answers_of(evaluation))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["perplexity"] == summary["perplexity"]
    assert all(value is None or isinstance(value, (int, float)) for value in metrics.values())
    assert "answer: 6/6 prompts" in finished.stderr
    assert "perplexity: 24/24 rows" in finished.stderr


def test_no_process_is_left_behind(evaluation):
    assert evaluation[1].left_behind == []


def test_a_model_compared_with_itself_passes_every_gate(evaluation, tmp_path):
    folder, _ = evaluation
    command = [
        *(sys.executable, "-m", "mcore.evaluate", "compare", "--base", folder, "--tuned", folder),
        *("--output", tmp_path / "out", "--max-regression", "0"),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["perplexity_ratio"] == 1.0
