"""Layers for further tokens against the plain reference of `tests.tiny_mtp`.

Legend: B batch, S sequence, H hidden, V vocabulary, P padded vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from mcore.backend.layout import Layout
from mcore.backend.meta import sharded_shapes
from mcore.backend.model import build_model
from mcore.backend.mtp import GPTModelWithMtp
from mcore.backend.parallel import parallel_processes
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.plan import mcore_shapes_of
from tests.tiny_models import PADDED_VOCAB_SIZE, fill, mcore_tensors, tiny_hf_model
from tests.tiny_mtp import MTP_MODELS, NUM_MTP_LAYERS, mtp_tensors, reference_logits, tiny_mtp_model
from tests.unit.mcore.backend.test_model import IDS_BS, MAX_RELATIVE_ERROR, POSITIONS_BS, VOCAB_SIZE, relative_error


@pytest.fixture
def alone() -> Iterator[None]:
    with parallel_processes(Layout()):
        yield


def mcore_model(main: PreTrainedModel, further: MtpModel, config: dict[str, Any]) -> GPTModelWithMtp:
    arguments: dict[str, Any] = {"params_dtype": torch.float32, "layout": Layout(), "backend": "torch"}
    model = build_model(config, padded_vocab_size=PADDED_VOCAB_SIZE, **arguments)
    assert isinstance(model, GPTModelWithMtp)
    more = mtp_tensors(main, further)
    fill(model, mcore_tensors(main, config, padded_vocab_size=PADDED_VOCAB_SIZE, more=more))
    return model.eval()


@torch.no_grad()
def mtp_logits(model: GPTModelWithMtp) -> list[Tensor]:
    """Logits `[B, S, P]` of each depth by megatron-core's layers."""
    hidden: list[Tensor] = []
    hook = model.output_layer.register_forward_pre_hook(lambda layer, inputs: hidden.append(inputs[0]))
    model(IDS_BS, POSITIONS_BS, None)
    hook.remove()
    return model.further_logits(IDS_BS, POSITIONS_BS, hidden[0])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", MTP_MODELS)
def test_logits_of_every_depth_equal_the_reports(name: str) -> None:
    main, further, config = tiny_mtp_model(name)
    expected, found = reference_logits(main, further, IDS_BS), mtp_logits(mcore_model(main, further, config))
    assert len(expected) == len(found) == NUM_MTP_LAYERS
    for logits_BSV, logits_BSP in zip(expected, found, strict=True):
        assert relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE]) < MAX_RELATIVE_ERROR


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("weight", ["eh_proj", "enorm", "hnorm", "final_layernorm"])
def test_a_wrong_weight_is_seen(weight: str) -> None:
    """The control of the test above: halves of the projection exchanged, norms of another layer."""
    main, further, config = tiny_mtp_model("deepseek_v3")
    model = mcore_model(main, further, config)
    one, other = (getattr(layer, weight).weight for layer in model.mtp.layers)
    with torch.no_grad():
        one.copy_(one.roll(one.shape[1] // 2, 1) if weight == "eh_proj" else other)
    logits_BSV, logits_BSP = reference_logits(main, further, IDS_BS)[0], mtp_logits(model)[0]
    assert relative_error(logits_BSV, logits_BSP[..., :VOCAB_SIZE]) > 1e-2


@pytest.mark.usefixtures("alone")
def test_logits_losses_and_gradients_of_the_model_do_not_depend_on_them() -> None:
    main, further, config = tiny_mtp_model("deepseek_v3")
    with_them = mcore_model(main, further, config)
    arguments: dict[str, Any] = {"params_dtype": torch.float32, "layout": Layout(), "backend": "torch"}
    plain_config = config | {"num_nextn_predict_layers": 0}
    without = build_model(plain_config, padded_vocab_size=PADDED_VOCAB_SIZE, **arguments)
    fill(without, mcore_tensors(main, plain_config, padded_vocab_size=PADDED_VOCAB_SIZE))
    assert torch.equal(with_them(IDS_BS, POSITIONS_BS, None), without.eval()(IDS_BS, POSITIONS_BS, None))
    for model in (with_them, without):
        model.train()(IDS_BS, POSITIONS_BS, None, labels=IDS_BS.roll(-1, 1)).mean().backward()
    expected = {name: parameter.grad for name, parameter in without.named_parameters()}
    found = {name: parameter.grad for name, parameter in with_them.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert all(parameter.grad is None for parameter in with_them.mtp.parameters())


@pytest.mark.parametrize("name", MTP_MODELS)
def test_megatrons_checkpoint_is_what_the_table_says(name: str) -> None:
    config = tiny_hf_model(name)[1] | {"num_nextn_predict_layers": NUM_MTP_LAYERS}
    dims = dims_of(config, make_vocab_size_divisible_by=PADDED_VOCAB_SIZE)
    content = sharded_shapes(config, padded_vocab_size=PADDED_VOCAB_SIZE, params_dtype=torch.bfloat16)
    shapes = {key: tensor.shape for key, tensor in content.tensors.items()}
    assert shapes == mcore_shapes_of(family_of_config(config), dims)
    assert "mtp.layers.1.transformer_layer.mlp.router.expert_bias" in shapes
