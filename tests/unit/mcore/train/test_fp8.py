"""FP8: what a run may ask for, what it is padded to, and scales in checkpoints. The products are in tests/gpu.

Scales belong to Transformer Engine's layers, which need a GPU. The layer here has its attributes and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from pydantic import ValidationError

from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.data.template import Sample
from mcore.train.batches import Batching
from mcore.train.context import length_multiples, part_of_batch
from mcore.train.fp8_options import fp8_arguments, fp8_problems
from mcore.train.fp8_state import add_scales, nothing_pickled, take_scales
from tests.tiny_models import tiny_hf_model

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def config(**fields: Any) -> TrainConfig:
    return TrainConfig.model_validate({"train_iters": 1, "fp8_format": "hybrid"} | fields)


def subjects(fields: dict[str, Any], hf_config: dict[str, Any], **more: Any) -> list[str]:
    settings = {"backend": "transformer_engine", "capability": (9, 0)} | more
    return [problem.subject for problem in fp8_problems(config(**fields), hf_config, **settings)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"fp8_format": None, "fp8_recipe": "tensorwise", "fp8_amax_history_len": 4},
         ["fp8_recipe needs fp8_format", "fp8_amax_history_len needs fp8_format"]),
        ({"torch_dtype": "float32", "backend": "torch"},
         ["fp8_format needs torch_dtype: bfloat16", "fp8_format needs backend transformer_engine"]),
        ({"fp8_recipe": "blockwise", "fp8_amax_compute_algo": "most_recent"},
         ["fp8_amax_compute_algo needs fp8_recipe: delayed"]),
        ({"tuner_type": "lora"}, ["fp8_recipe: delayed needs tuner_type: full"]),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused_all_at_once(fields: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**fields)
    assert all(text in str(caught.value) for text in expected)


def test_megatron_is_told_what_the_run_says_and_nothing_of_a_run_without() -> None:
    assert fp8_arguments(config(fp8_format=None)) == {}
    assert fp8_arguments(config(fp8_amax_history_len=16)) == {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "max",
    }
    assert "fp8_format" in config().fields_for_transformer_engine


def test_sizes_machine_and_backend_are_refused_all_at_once() -> None:
    assert subjects({}, QWEN3) == []
    assert subjects({}, QWEN3, backend="torch", capability=(8, 0)) == ["train.fp8_format"] * 2
    assert subjects({"fp8_recipe": "blockwise"}, QWEN3, capability=(8, 9)) == ["train.fp8_format"]
    assert subjects({}, QWEN3, capability=None) == []
    odd = QWEN3 | {"intermediate_size": 104}
    assert subjects({}, odd) == ["train.fp8_format: mlp.linear_fc2.weight"]  # gate and up are 208 rows
    assert subjects({"tensor_model_parallel_size": 2}, odd) == [
        "train.fp8_format: mlp.linear_fc1.weight",
        "train.fp8_format: mlp.linear_fc2.weight",
    ]
    experts = tiny_hf_model("qwen3_moe")[1]
    assert "train.fp8_recipe" in subjects({}, experts)
    assert "train.fp8_recipe" not in subjects({"fp8_recipe": "tensorwise"}, experts)
    assert not [name for name in subjects({}, experts) if "router" in name]


@pytest.mark.parametrize("packing_length", [None, 64])
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(context_parallel_size=2), Layout(tensor_model_parallel_size=2, sequence_parallel=True)]
)
def test_every_process_gets_tokens_by_multiples_of_16(layout: Layout, packing_length: int | None) -> None:
    of_row, of_sample = length_multiples(layout, config().token_multiple)
    batching = Batching(
        micro_batch_size=1, length_multiple=of_row, sample_multiple=of_sample, packing_length=packing_length
    )
    samples = [Sample(list(range(1, length)), [True] * (length - 1)) for length in (5, 13, 40, 22)]
    ranks = layout.context_parallel_size
    shared = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    seen = 0
    for batch in batching.micro_batches(samples, torch.device("cpu")):
        for rank in range(ranks):
            part = part_of_batch(batch, ranks, rank)
            assert part.tokens_BS.shape[1] % (16 * shared) == 0
            seen += int((~part.padding_BS).sum())
    assert seen == sum(len(sample.token_ids) - 1 for sample in samples)


class Layer(torch.nn.Module):
    """What `mcore.train.fp8_state` knows of a layer of Transformer Engine's."""

    def __init__(self, *, has_run: bool) -> None:
        super().__init__()
        self.config = argparse.Namespace(fp8="hybrid")
        self.fp8, self.fp8_calibration = has_run, False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": has_run}
        if has_run:
            self.fp8_meta["num_gemms"] = 1
            self.init_fp8_meta_tensors(None)

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        assert self.fp8_meta["num_gemms"] == 1
        for key, width in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(width), amax_history=torch.zeros(4, width))

    def get_extra_state(self) -> torch.Tensor:
        assert not (self.fp8 or self.fp8_calibration or self.fp8_meta["fp8_checkpoint"]), "would be pickled"
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        assert state.numel() == 0, "takes no pickles again"


def described(module: torch.nn.Module) -> dict[str, Any]:
    with nothing_pickled([module]):
        state = {key: ShardedObject(key, value, (1,), (0,)) for key, value in module.state_dict().items()}
    add_scales(state, module)
    return state


def test_scales_go_through_a_checkpoint_as_tensors(tmp_path: Path) -> None:
    saved, loaded = (torch.nn.ModuleDict({"a": Layer(has_run=run), "b": Layer(has_run=False)}) for run in (True, False))
    layer: Any = saved["a"]
    for key in ("scaling_fwd", "scaling_bwd"):
        layer.fp8_meta[key].scale.uniform_()
        layer.fp8_meta[key].amax_history.uniform_()
    with parallel_processes(Layout()):
        dist_checkpointing.save(described(saved), str(tmp_path))
        assert layer.fp8 and layer.fp8_meta["fp8_checkpoint"]
        state = dist_checkpointing.load(described(loaded), str(tmp_path))
    loaded.load_state_dict(take_scales(state, loaded))
    other: Any = loaded["a"]
    for key in ("scaling_fwd", "scaling_bwd"):
        assert torch.equal(other.fp8_meta[key].scale, layer.fp8_meta[key].scale)
        assert torch.equal(other.fp8_meta[key].amax_history, layer.fp8_meta[key].amax_history)
    assert "scaling_fwd" not in loaded["b"].fp8_meta
