"""Experts that prompts reach are counted on the running model; what stays without a token is reported."""

import torch
from safetensors.torch import load_file, save_file

from mcore.bridge.convert import convert
from mcore.verify.experts import MAX_EXTRA, ExpertCount
from mcore.verify.mutants.tiny_models import tiny_config, tiny_model, write_tiny_model
from mcore.verify.verify import verify

NUM_EXPERTS = 8


def test_tokens_are_counted_by_layer_and_expert():
    model = tiny_model(tiny_config("qwen3_moe"), 0)
    chosen: dict[int, list[torch.Tensor]] = {}
    for layer, of in enumerate(model.model.layers):
        of.mlp.gate.register_forward_hook(
            lambda module, inputs, output, layer=layer: chosen.setdefault(layer, []).append(output[-1])
        )
    count = ExpertCount(model, NUM_EXPERTS)
    with torch.no_grad(), count.counting():
        model(torch.arange(40)[None])
        model(torch.arange(100, 120)[None])
    with torch.no_grad():
        model(torch.arange(7)[None])  # behind the block nothing is counted
    for layer in range(4):
        expected = torch.cat(chosen[layer][:2]).flatten().bincount(minlength=NUM_EXPERTS)
        assert torch.equal(count.num_tokens[layer], expected)
        assert count.num_tokens[layer].sum() == 60 * 4


def test_prompts_are_added_until_every_expert_has_tokens(tmp_path):
    """Eight tokens go to four experts each, which is too few for all eight in every layer."""
    hf = write_tiny_model(tmp_path / "hf", "qwen3_moe", 0)
    convert(hf, tmp_path / "mcore")
    report = verify(hf, tmp_path / "mcore", tmp_path / "out", num_prompts=1, max_prompt_tokens=8)
    assert report.passed
    names = [prompt.prompt for prompt in report.numerical.prompts]
    assert names[0] == "seeded_0" and 1 < len(names) <= 1 + MAX_EXTRA
    assert report.numerical.unreached_experts == {}
    assert (
        "Every one of the 8 experts of every decoder layer got tokens" in (tmp_path / "out" / "report.md").read_text()
    )


def test_an_expert_that_nothing_reaches_is_reported(tmp_path):
    hf = write_tiny_model(tmp_path / "hf", "deepseek_v3", 0)
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.2.mlp.gate.e_score_correction_bias"][5] = -100
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    convert(hf, tmp_path / "mcore")
    report = verify(hf, tmp_path / "mcore", tmp_path / "out", num_prompts=1, max_prompt_tokens=16)
    assert report.passed
    assert len(report.numerical.prompts) == 1 + MAX_EXTRA
    # Groups are chosen by the sum of their best two experts, so its neighbour gets nothing either.
    assert report.numerical.unreached_experts == {2: (4, 5)}
    assert "* layer 2: 4, 5" in (tmp_path / "out" / "report.md").read_text()
