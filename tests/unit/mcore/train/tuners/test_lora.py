"""Adapters on a megatron-core model in one process: logits and gradients of PEFT's, and weights that stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.bridge.adapters import read_adapter_weights
from mcore.errors import ConfigError, InputError
from mcore.train.tuners.dropout import seed_step
from mcore.train.tuners.install import Adapters, install_adapters
from mcore.train.tuners.options import LoraOptions
from mcore.train.tuners.targets import choose_targets
from mcore.train.tuners.whole import choose_whole, peft_modules_to_save
from tests.lora_reference import Lora, random_matrices
from tests.tiny_models import PADDED_VOCAB_SIZE, fill, mcore_tensors, tiny_hf_model

CASES = [
    ("llama", ("all-linear", "all-embedding"), ()),
    ("llama", ("all-linear",), ("embed_tokens", "lm_head", "model.norm")),
    ("qwen3_tied", ("q_proj", "v_proj", "mlp.gate_proj"), ()),  # parts of joint layers without the others
    ("qwen3_tied", ("q_proj",), ("norm",)),  # every norm, as in PEFT
    ("phi3", ("all-linear",), ()),  # q, k and v in one tensor, gate and up in another
    ("gemma2", ("linear_qkv", "linear_proj", "linear_fc2"), ("layers.1.post_attention_layernorm",)),  # norms behind
    ("qwen3_moe", ("all-linear", "all-router"), ("lm_head", "input_layernorm")),
    ("qwen2_moe", ("shared_experts.linear_fc1", "experts.linear_fc2"), ()),
    ("deepseek_v3", ("all-linear", "all-router"), ("embed_tokens", "kv_a_layernorm")),
]


def options(targets: tuple[str, ...], **more: object) -> LoraOptions:
    return LoraOptions(target_modules=targets, lora_rank=4, lora_alpha=6.0, use_rslora=True, **more)


def with_adapters(name: str, wanted: LoraOptions, **more: Any) -> tuple[torch.nn.Module, Adapters]:
    model, config = tiny_hf_model(name)
    module = build_model(
        config,
        padded_vocab_size=PADDED_VOCAB_SIZE,
        layout=Layout(),
        params_dtype=torch.float32,
        backend="torch",
        **more,
    )
    fill(module, mcore_tensors(model, config, padded_vocab_size=PADDED_VOCAB_SIZE))
    return module, install_adapters([module], config, wanted, seed=1)


def logits(module: torch.nn.Module, ids: torch.Tensor, vocab: int) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return module(ids, positions, None)[..., :vocab]


@pytest.mark.parametrize(("name", "targets", "whole"), CASES)
def test_logits_and_gradients_are_those_of_peft(name: str, targets: tuple[str, ...], whole: tuple[str, ...]) -> None:
    wanted = options(targets, modules_to_save=whole)
    model, config = tiny_hf_model(name)
    vocab = config["vocab_size"]
    ids = torch.randint(vocab, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, dims=1)
    matrices = random_matrices(wanted, model, config)
    reference = Lora(model, config, wanted, matrices)
    expected = reference.model(input_ids=ids).logits
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    with parallel_processes(Layout()):
        module, adapters = with_adapters(name, wanted)
        before = {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
        fresh = logits(module, ids, vocab)
        for pair in adapters.pairs:
            pair.fill(*(_padded(matrices[key], parameter) for key, _, parameter in pair.matrices()))
        for own in adapters.whole:
            own.fill(_padded_rows(matrices[own.key], own.parameter))
        found = logits(module, ids, vocab)
        F.cross_entropy(found.flatten(0, 1), labels.flatten()).backward()
        scale = expected.std()
        assert (fresh - expected).abs().max() > 0.1 * scale
        assert ((found - expected).abs().max() / scale).item() < 2e-5
        gradients = {key: parameter.grad for pair in adapters.pairs for key, _, parameter in pair.matrices()}
        gradients |= {own.key: _without_padding(own.parameter.grad, matrices[own.key]) for own in adapters.whole}
        assert gradients.keys() == reference.parameters.keys()
        for key, parameter in reference.parameters.items():
            of_peft, largest = parameter.grad, parameter.grad.abs().max()
            assert largest > 0 or ".experts." in key, key
            ours = gradients[key] if gradients[key] is not None else torch.zeros_like(parameter)
            ours = ours if ours.shape == of_peft.shape else ours[:, : of_peft.shape[1]]
            assert torch.allclose(ours, of_peft, rtol=1e-4, atol=1e-5 * max(largest, 1e-3)), key
        learns = {id(own.parameter) for own in adapters.whole}
        frozen = [own for key, own in module.named_parameters() if ".lora." not in key and id(own) not in learns]
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
        adapters.merge(lambda target: torch.float32)
        merged = logits(module, ids, vocab)
        assert ((merged - expected).abs().max() / scale).item() < 2e-5
        if not whole:
            assert all(torch.equal(module.state_dict()[key], before[key]) for key in before if "norm" in key)


def _padded(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return F.pad(whole, (0, parameter.shape[1] - whole.shape[1])) if whole.shape[0] == parameter.shape[0] else whole


def _padded_rows(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return torch.cat([whole, whole.new_zeros(parameter.shape[0] - whole.shape[0], *whole.shape[1:])])


def _without_padding(gradient: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    assert not gradient[whole.shape[0] :].any(), "rows of padding learn"
    return gradient[: whole.shape[0]]


def test_an_adapter_of_peft_is_taken_exactly(tmp_path: Path) -> None:
    """Made by PEFT alone: every module has matrices of its own, q, k and v like gate and up."""
    wanted = options(("all-linear", "all-embedding"))
    model, _ = tiny_hf_model("llama")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": True, "init_lora_weights": False}
    made = get_peft_model(model, LoraConfig(**settings, target_modules=modules))
    made.save_pretrained(tmp_path, save_embedding_layers=False)
    ids = torch.arange(40).reshape(2, 20)
    expected = made(input_ids=ids).logits
    with parallel_processes(Layout()):
        module, adapters = with_adapters("llama", wanted)
        adapters.start_from(tmp_path, wanted)
        found = logits(module, ids, 250)
        matrices = {key: parameter for pair in adapters.pairs for key, _, parameter in pair.matrices()}
    stored = read_adapter_weights(tmp_path)
    assert stored.keys() == matrices.keys()
    assert all(torch.equal(matrices[key][:, : tensor.shape[1]], tensor) for key, tensor in stored.items())
    assert not torch.equal(stored["model.layers.0.self_attn.q_proj.lora_A.weight"],
                           stored["model.layers.0.self_attn.k_proj.lora_A.weight"])  # fmt: skip
    assert ((found - expected).abs().max() / expected.std()).item() < 2e-5


@pytest.mark.parametrize(
    ("change", "of_run", "what"),
    [
        ({}, {"lora_rank": 8}, "train.lora_rank: expected 4"),
        ({}, {"use_rslora": False}, "train.use_rslora: expected True"),
        ({}, {"target_modules": ("q_proj", "v_proj")}, "v_proj.lora_A.weight: expected a matrix [4, 64], found none"),
        ({}, {"target_modules": ("k_proj", "v_proj")}, "q_proj.lora_A.weight: expected a module of train.target"),
        ({}, {"modules_to_save": ("lm_head",)}, "lm_head.weight: expected a tensor [250, 64], found none"),
        ({"use_dora": True}, {}, "use_dora: expected nothing"),
        ({"rank_pattern": {"k_proj": 2}}, {}, "rank_pattern"),
        ({"alpha_pattern": {"k_proj": 2}}, {}, "alpha_pattern"),
        ({"bias": "lora_only"}, {}, "bias: expected none, found 'lora_only'"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, {}, "peft_type: expected LORA"),
        ({"r": None}, {}, "holds no LoRA adapter"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    change: dict[str, object], of_run: dict[str, Any], what: str, tmp_path: Path
) -> None:
    model, _ = tiny_hf_model("llama")
    made = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"] if of_run else ["k_proj"])
    )
    made.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    targets = of_run.pop("target_modules", ("q_proj",)) if of_run else ("k_proj",)
    wanted = replace(options(targets), **of_run)
    with parallel_processes(Layout()), pytest.raises(InputError) as error:
        _, adapters = with_adapters("llama", wanted)
        adapters.start_from(tmp_path, wanted)
    assert what in str(error.value)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_layers_learn_the_same(dropout: float) -> None:
    """With dropout too: what is computed again leaves the same numbers out."""
    ids = torch.arange(40).reshape(2, 20)
    gradients = []
    for recompute in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
        with parallel_processes(Layout()):
            module, adapters = with_adapters("llama", options(("all-linear",), lora_dropout=dropout), **recompute)
            seed_step(1, 1)
            for pair in adapters.pairs:
                torch.nn.init.constant_(pair.lora_B, 0.01)
            logits(module, ids, 250).square().mean().backward()
            gradients.append({pair.target.hf_module: (pair.lora_A.grad, pair.lora_B.grad) for pair in adapters.pairs})
    for name, pair in gradients[0].items():
        for plain, recomputed in zip(pair, gradients[1][name], strict=True):
            assert plain.abs().max() > 0 and torch.equal(plain, recomputed), name


def test_a_fresh_adapter_changes_nothing() -> None:
    ids = torch.arange(20)[None]
    with parallel_processes(Layout()):
        module, adapters = with_adapters("llama", options(("all-linear", "all-embedding")))
        with_fresh = logits(module, ids, 250)
        adapters.merge(lambda target: torch.float32)
        assert torch.equal(logits(module, ids, 250), with_fresh)


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    ids = torch.arange(20)[None]
    with parallel_processes(Layout()):
        module, adapters = with_adapters("llama", options(("linear_qkv",), lora_dropout=0.5))
        for pair in adapters.pairs:
            torch.nn.init.ones_(pair.lora_B)
        first, second = logits(module, ids, 250), logits(module, ids, 250)
        assert not torch.equal(first, second)
        module.eval()
        assert torch.equal(logits(module, ids, 250), logits(module, ids, 250))


@pytest.mark.parametrize(
    ("name", "targets", "what"),
    [
        ("llama", ("q_projj",), "train.target_modules: q_projj: expected all-linear"),
        ("llama", ("lm_head",), "train.target_modules: lm_head"),
        ("qwen3_tied", ("embed_tokens",), "as another layer shares its weight"),
        ("gpt_oss", ("all-linear",), "which the model's files hold stacked over all experts"),
    ],
)
def test_what_can_not_have_an_adapter_is_named(name: str, targets: tuple[str, ...], what: str) -> None:
    with parallel_processes(Layout()), pytest.raises(ConfigError) as error:
        with_adapters(name, options(targets))
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("name", "whole", "what"),
    [
        ("llama", ("score",), ["score: expected one of embed_tokens, input_layernorm, lm_head, norm, post_attention_"]),
        ("llama", ("o_proj", "lm_hed"), ["o_proj, which can't learn whole", "lm_hed: expected one of"]),
        ("llama", ("self_attn",), ["k_proj, o_proj, q_proj, v_proj, which can't learn whole"]),
        ("llama", ("embed_tokens",), ["model.embed_tokens: expected a module without an adapter"]),
        (
            "qwen3_tied",
            ("lm_head", "embed_tokens"),
            ["lm_head: expected no embedding", "embed_tokens: expected no emb"],
        ),
        ("qwen3_moe", ("gate",), ["gate, which can't learn whole"]),
    ],
)
def test_what_can_not_learn_whole_is_named(name: str, whole: tuple[str, ...], what: list[str]) -> None:
    targets = ("all-linear",) if name == "qwen3_tied" else ("all-linear", "all-embedding")
    with pytest.raises(ConfigError) as error:
        choose_whole(whole, tiny_hf_model(name)[1], choose_targets(targets, tiny_hf_model(name)[1]))
    assert all(text in str(error.value) for text in what), str(error.value)


def test_modules_that_learn_whole_are_named_as_peft_takes_them() -> None:
    """PEFT asks for the end of a name: where the last part means more than was chosen, whole names are written."""
    _, config = tiny_hf_model("llama")
    for names, written in (
        (("word_embeddings", "output_layer"), ["embed_tokens", "lm_head"]),
        (("final_layernorm",), ["model.norm"]),
        (("norm",), ["input_layernorm", "norm", "post_attention_layernorm"]),
        (("layers.1.input_layernorm",), ["model.layers.1.input_layernorm"]),
    ):
        assert peft_modules_to_save(choose_whole(names, config, ()), config) == written
