"""Each module that can be recomputed is, keeps less for it, and changes no gradient.

B batch, S sequence
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.tiny_models import tiny_hf_model
from tests.unit.mcore.backend.test_model import IDS_BS, POSITIONS_BS, mcore_model
from tests.unit.mcore.train.tuners.test_lora import options, with_adapters

pytestmark = pytest.mark.usefixtures("alone")


@dataclass(frozen=True)
class Pass:
    loss: float
    gradients: dict[str, Tensor]
    runs: Counter[str]
    kept_bytes: int


def forward_and_backward(name: str, *modules: str) -> Pass:
    hf, config = tiny_hf_model(name)
    recompute = {"recompute_granularity": "selective", "training": {"recompute_modules": list(modules)}}
    model = mcore_model(hf, config, **(recompute if modules else {})).train()
    runs: Counter[str] = Counter()
    for place, module in model.named_modules():
        leaf = place.rpartition(".")[2]
        module.register_forward_hook(lambda *_, leaf=leaf: runs.update([leaf]))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(IDS_BS, POSITIONS_BS, None, labels=IDS_BS.roll(-1, 1)).mean()
    loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    return Pass(loss.item(), gradients, runs, sum(kept))


@pytest.mark.parametrize(
    ("name", "modules", "runs_twice"),
    [
        ("qwen3", ["core_attn"], "core_attention"),
        ("gemma3", ["mlp"], "linear_fc1"),
        ("qwen3_moe", ["moe"], "router"),
        ("gpt_oss", ["core_attn", "moe"], "router"),
        ("deepseek_v3", ["shared_experts"], "shared_experts"),
        ("deepseek_v3", ["mla_up_proj"], "linear_kv_up_proj"),
    ],
)
def test_what_is_recomputed_is_not_kept_and_changes_nothing(name: str, modules: list[str], runs_twice: str) -> None:
    plain, recomputed = forward_and_backward(name), forward_and_backward(name, *modules)
    assert recomputed.loss == plain.loss and plain.gradients.keys() == recomputed.gradients.keys()
    assert all(torch.equal(gradient, recomputed.gradients[key]) for key, gradient in plain.gradients.items())
    assert plain.runs[runs_twice] > 0 and recomputed.runs[runs_twice] == 2 * plain.runs[runs_twice]
    assert recomputed.kept_bytes < plain.kept_bytes


def test_adapters_of_a_recomputed_mlp_learn_in_the_first_layer_too() -> None:
    gradients = []
    for modules in ([], ["mlp"]):
        recompute = {"recompute_granularity": "selective", "training": {"recompute_modules": modules}}
        module, adapters = with_adapters("llama", options(("linear_fc1",)), **(recompute if modules else {}))
        module.train()(IDS_BS, POSITIONS_BS, None, labels=IDS_BS.roll(-1, 1)).mean().backward()
        learns = [value for value in module.parameters() if value.requires_grad]
        assert adapters is not None and learns
        gradients.append([value.grad for value in learns])
    for plain, recomputed in zip(*gradients, strict=True):
        assert recomputed is not None and torch.equal(plain, recomputed)
