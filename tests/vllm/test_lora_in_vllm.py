"""The adapter of a LoRA run, served by the real vLLM beside its base: what PEFT computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.flows.workspace import make_workspace, raw_run
from tests.vllm.vllm_child import run_with_vllm

pytestmark = pytest.mark.vllm
LORA = {"tuner_type": "lora", "lora_alpha": 16, "train_iters": 30, "save_steps": 30, "lr": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a tiny model, exported: `hf/` has merged weights, and the adapter in `hf/adapter/`."""
    folder = tmp_path_factory.mktemp("lora")
    make_workspace(folder)
    run = raw_run(train=LORA, launch={"nproc_per_node": 1})
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    for words in (
        ["mcore.bridge", "convert", "--hf", "model", "--output", "base"],
        ["mcore.train", "run.yaml", "--base", "base", "--output", "run"],
        ["mcore.bridge", "export", "--checkpoint", "run", "--base", "base", "--output", "hf"],
    ):
        subprocess.run([sys.executable, "-W", "ignore", "-m", *words], check=True, cwd=folder)
    return folder


@torch.no_grad()
def test_vllm_serves_the_adapter_as_peft_computes_it(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    messages = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am tiny-bot."}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    adapter = folder / "hf" / "adapter"
    finished = run_with_vllm("tests/vllm/lora_script.py", folder / "model", adapter, json.dumps(ids), scratch=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    served = json.loads(finished.stdout.splitlines()[-1])
    inputs = torch.tensor([ids])
    expected = {}
    for name in ("base", "adapter"):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        if name == "adapter":
            model = PeftModel.from_pretrained(model, adapter)
        logprobs_SV = model(input_ids=inputs).logits[0].double().log_softmax(-1)
        generated = model.generate(input_ids=inputs, max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        expected[name] = logprobs_SV[:-1].gather(1, inputs[0, 1:, None])[:, 0].tolist()
        assert served[name]["logprobs"] == pytest.approx(expected[name], abs=1e-3), name
        assert served[name]["token_ids"] == generated[: len(served[name]["token_ids"])], name
    assert max(abs(a - b) for a, b in zip(expected["base"], expected["adapter"], strict=True)) > 1
