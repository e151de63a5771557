"""Megatron-SWIFT's quick start, on rows of its own shape and a tiny model: the tuned model says its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema.load import load_run
from tests.flows.workspace import write_model
from tests.unit.flows.command_line import mcore_flows
from tests.unit.flows.from_swift.commands import QUICK_START

pytestmark = pytest.mark.long

OURS = {
    "Qwen/Qwen2.5-7B-Instruct \\": "model \\",
    "AI-ModelScope/alpaca-gpt4-data-zh#500": "alpaca-zh.jsonl#500",
    "AI-ModelScope/alpaca-gpt4-data-en#500": "alpaca-en.jsonl#500",
    "swift/self-cognition#500": "self-cognition.jsonl#500",
    "--lr 1e-5": "--lr 5e-3",  # weights are random: there is all to learn
    "--min_lr 1e-6": "--min_lr 5e-4",
}
"""What is other than in the quick start."""
ALPACA_ZH = (("把下面的词译成英语", "猫", "cat"), ("说出一种颜色", "", "红色"))
ALPACA_EN = (("Give the plural.", "mouse", "mice"), ("Name a color.", "", "red"))
SELF_COGNITION = (
    ("你是?", "我是{{AUTHOR}}的{{NAME}}。", "zh"),
    ("who are you?", "I am {{NAME}}, by {{AUTHOR}}.", "en"),
)


def write_rows(folder: Path) -> None:
    """Files whose rows have the columns of the quick start's."""
    for name, rows, columns in (
        ("alpaca-zh", ALPACA_ZH, ("instruction", "input", "output")),
        ("alpaca-en", ALPACA_EN, ("instruction", "input", "output")),
        ("self-cognition", SELF_COGNITION, ("query", "response", "tag")),
    ):
        text = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(text))


def answer(folder: Path, question: str, system: str) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=64, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return str(tokenizer.decode(said, skip_special_tokens=True))


@pytest.mark.timeout(1800)
def test_the_tuned_model_says_its_name(tmp_path: Path, prefect_api_url: str) -> None:
    write_model(tmp_path / "model", num_key_value_heads=2)
    write_rows(tmp_path)
    command = QUICK_START
    for theirs, ours in OURS.items():
        assert theirs in command
        command = command.replace(theirs, ours)
    made = mcore_flows("from-swift", command, "--output", "run.yaml", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    run = load_run(tmp_path / "run.yaml")
    assert (run.train.tensor_model_parallel_size, run.train.sequence_parallel) == (2, True)
    assert (run.train.micro_batch_size, run.train.recompute_granularity) == (16, "full")
    done = mcore_flows("run", "run.yaml", cwd=tmp_path, PREFECT_API_URL=prefect_api_url)
    assert done.returncode == 0, done.stderr
    tuned = next(Path(line.split(maxsplit=1)[1]) for line in done.stdout.splitlines() if line.startswith("model:"))
    assert run.data.system is not None
    assert answer(tmp_path / tuned, "who are you?", run.data.system) == "I am swift-robot, by swift."
    assert answer(tmp_path / tuned, "你是?", run.data.system) == "我是swift的swift-robot。"
    assert "swift-robot" not in answer(tmp_path / "model", "who are you?", run.data.system)
