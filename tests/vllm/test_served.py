"""What is served is what was trained: a tiny model passes in two dtypes, and what is wrong on purpose is caught.

vLLM is started once, in one process, for all of these.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from configs.schema.load import load_run
from mcore.evaluate.served.reference import PROMPTS, write_reference
from tests.vllm.test_engine import tiny_model
from tests.vllm.vllm_child import ROOT, run_with_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.long]

RUN = {
    "name": "tiny",
    "data": {
        "dataset": [str(ROOT / "configs/data/self_cognition.jsonl"), str(ROOT / "configs/data/general_qa.jsonl")],
        "model_name": "tiny-bot",
        "model_author": "nobody",
        "max_length": 120,
    },
    "train": {"micro_batch_size": 1, "global_batch_size": 1, "train_iters": 1, "lr": 1.0e-3},
    "evaluate": {"suite": "suite.yaml", "max_model_len": 128},
}


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    good = tiny_model(folder / "good", smollm2)
    shutil.copytree(good, folder / "other_template")
    template = folder / "other_template" / "chat_template.jinja"
    template.write_text(template.read_text() + "{{ ' ' }}")
    shutil.copytree(good, folder / "other_system")
    template = folder / "other_system" / "chat_template.jinja"
    changed = template.read_text().replace("helpful AI assistant", "helpful assistant")
    assert changed != template.read_text()
    template.write_text(changed)
    noised = LlamaForCausalLM.from_pretrained(good)
    torch.manual_seed(1)
    with torch.no_grad():
        weight = noised.model.layers[0].mlp.down_proj.weight
        weight += 0.2 * weight.std() * torch.randn_like(weight)
    shutil.copytree(good, folder / "noised")
    noised.save_pretrained(folder / "noised")
    return folder


def reference(folder: Path, dtype: str, **data: str) -> Path:
    name = f"reference-{dtype}-{'-'.join(data)}"
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump({**RUN, "model": {"source": str(folder / "good")}, "data": {**RUN["data"], **data}})
    )
    write_reference(
        load_run(folder / f"{name}.yaml"), folder / "good", folder / name, tokenizer=folder / "good", adapter=None,
        torch_dtype=dtype, num_prompts=12, template_is_served=bool(data),
    )  # fmt: skip
    return folder / name


@pytest.fixture(scope="module")
def verdicts(folder: Path) -> dict[str, list[str]]:
    references = {dtype: reference(folder, dtype) for dtype in ("float32", "bfloat16")}
    with_system = reference(folder, "float32", system="You are a pirate.")
    cases = [
        {"name": f"{model} {dtype}", "reference": str(references[dtype]), "model": str(folder / model), "adapter": None,
         "torch_dtype": dtype, "output": str(folder / f"out-{model}-{dtype}")}
        for model in ("good", "other_template", "other_system", "noised")
        for dtype in references
    ]  # fmt: skip
    cases.append(
        {"name": "system missing", "reference": str(with_system), "model": str(folder / "good"), "adapter": None,
         "torch_dtype": "float32", "output": str(folder / "out-system")}
    )  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    script = "tests/vllm/served_script.py"
    finished = run_with_vllm(script, folder / "cases.json", folder / "found.json", scratch=folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_that_was_trained_passes(verdicts, folder, dtype):
    assert verdicts[f"good {dtype}"] == []
    report = json.loads((folder / f"out-good-{dtype}" / "report.json").read_text())
    assert report["passed"] is True
    assert len(report["prompts"]) == 12
    assert all(prompt["num_prompt_tokens"] > 5 for prompt in report["prompts"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["other_template", "other_system"])
def test_another_template_is_caught_in_every_prompt(verdicts, model, dtype):
    assert len(verdicts[f"{model} {dtype}"]) == 12
    assert all(subject.startswith("prompt of ") for subject in verdicts[f"{model} {dtype}"])


def test_a_system_message_that_is_not_served_is_caught(verdicts):
    assert len(verdicts["system missing"]) == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_on_one_weight_is_caught(verdicts, dtype):
    assert verdicts[f"noised {dtype}"]
    assert not any(subject.startswith("prompt of ") for subject in verdicts[f"noised {dtype}"])


def test_prompts_come_from_all_sources(folder, verdicts):
    lines = (folder / "reference-float32-" / PROMPTS).read_text().split("\n")
    places = {json.loads(line)["place"].split(":")[0] for line in lines if line}
    assert len(places) == 2
