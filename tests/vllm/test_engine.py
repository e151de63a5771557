"""The engine on tiny models: failures with their cause, dates that stand still, and nothing left behind."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mcore.data.template import RENDER_DATE
from mcore.errors import EvaluationError
from tests.vllm.vllm_child import run_with_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.long]


@pytest.fixture(scope="module")
def finished(smollm2, tmp_path_factory):
    """One process that starts three engines after each other, and the folder of the second model."""
    scratch = tmp_path_factory.mktemp("engines")
    damaged, dated, nan = (tiny_model(scratch / name, smollm2) for name in ("damaged", "dated", "nan"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    template = dated / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}" + template.read_text())
    with_nan = LlamaForCausalLM.from_pretrained(nan)
    with torch.no_grad():
        with_nan.model.norm.weight[3] = float("nan")
    with_nan.save_pretrained(nan)
    script = Path(__file__).with_name("engine_script.py")
    return run_with_vllm(script, damaged, dated, nan, scratch=scratch), dated


def tiny_model(folder: Path, tokenizer_of: Path) -> Path:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer_of / name, folder)
    return folder


def test_damaged_weights_fail_the_start_with_the_cause(finished):
    found = json.loads(finished[0].stdout)["damaged"]
    assert "vLLM could not start" in found
    assert "SafetensorError" in found


def test_a_template_that_asks_for_the_date_is_told_the_date_of_training(finished):
    child, folder = finished
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        return_dict=False,
        strftime_now=RENDER_DATE.strftime,
    )
    assert json.loads(child.stdout)["prompt_token_ids"] == expected
    assert tokenizer.decode(expected).startswith(f"{RENDER_DATE:%d %B %Y}")
    assert f"{RENDER_DATE:%d %B %Y}" != f"{datetime.now():%d %B %Y}"


def test_logits_that_are_no_numbers_fail_the_stage_and_leave_nothing_behind(finished):
    child, _ = finished
    assert child.returncode == 1, child.stderr
    assert isinstance(child.error, EvaluationError)
    assert "NaN" in str(child.error)
    assert child.left_behind == []
