from __future__ import annotations

import time

import psutil
import pytest
import torch
import torch.distributed as dist

from mcore.backend.meta import sharded_shapes
from mcore.errors import ConfigError
from tests.tiny_dense import DENSE
from tests.tiny_models import MODELS, PADDED_VOCAB_SIZE, mcore_tensors, tiny_hf_model
from tests.tiny_moe import MOE
from tests.tiny_normed import NORMED

QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "hidden_act": "silu",
}
WIDE_MOE = QWEN3_32B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "vocab_size": 129280,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "norm_topk_prob": True,
    "mlp_only_layers": [0, 1, 2],
}
"""As many layers, experts and parameters as DeepSeek-V3 has, in an architecture that is easily written down."""


def test_a_32b_model_is_told_in_seconds_without_memory() -> None:
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    content = sharded_shapes(QWEN3_32B, padded_vocab_size=151936, params_dtype=torch.bfloat16)
    assert time.monotonic() - start < 20
    assert psutil.Process().memory_info().rss - before < 500e6
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in content.tensors.values())
    assert 32e9 < parameters < 33e9
    assert {tensor.dtype for tensor in content.tensors.values()} == {torch.bfloat16}
    assert content.tensors["decoder.layers.mlp.linear_fc1.weight"].shape == (64, 51200, 5120)
    assert len(content.objects) == 64 * 4
    assert "decoder.layers.self_attention.linear_qkv._extra_state/shard_63_64" in content.objects


def test_a_671b_model_with_256_experts_is_told_in_seconds_without_memory() -> None:
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    content = sharded_shapes(WIDE_MOE, padded_vocab_size=129280, params_dtype=torch.bfloat16)
    assert time.monotonic() - start < 40
    assert psutil.Process().memory_info().rss - before < 700e6
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in content.tensors.values())
    assert 671e9 < parameters < 673e9
    assert content.tensors["decoder.layers.60.mlp.experts.experts.linear_fc1.weight"].shape == (256, 4096, 7168)
    assert content.tensors["decoder.layers.2.mlp.linear_fc1.weight"].shape == (36864, 7168)
    assert len(content.objects) == 61 * 2 + 3 * 2 + 58 * 256 * 2
    assert "decoder.layers.3.mlp.experts.experts.linear_fc2._extra_state/shard_255_256" in content.objects


@pytest.mark.parametrize("name", [*MODELS, *DENSE, *MOE, *NORMED])
def test_every_model_can_be_told(name: str) -> None:
    hf, config = tiny_hf_model(name)
    content = sharded_shapes(config, padded_vocab_size=PADDED_VOCAB_SIZE, params_dtype=torch.float32)
    expected = mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE)
    assert {key: tensor.shape for key, tensor in content.tensors.items()} == {
        key: tuple(tensor.shape) for key, tensor in expected.items()
    }


def test_nothing_is_left_behind() -> None:
    current_device = torch.cuda.current_device
    config = tiny_hf_model("qwen2_tied")[1]
    for _ in range(2):
        content = sharded_shapes(config, padded_vocab_size=384, params_dtype=torch.float32)
        assert "output_layer.weight" not in content.tensors
        assert content.tensors["decoder.layers.self_attention.linear_qkv.bias"].shape == (4, 128)
    assert not dist.is_initialized()
    assert torch.cuda.current_device is current_device
    assert torch.empty(1).device.type == "cpu"


def test_a_model_that_can_not_be_built_leaves_nothing_behind_either() -> None:
    config = tiny_hf_model("llama")[1] | {"hidden_act": "relu"}
    with pytest.raises(ConfigError, match="hidden_act"):
        sharded_shapes(config, padded_vocab_size=384, params_dtype=torch.float32)
    assert not dist.is_initialized()
