"""megatron-core's attention with our rotary embedding: factors, packed sequences, interleaving, layer types.

S sequence, N heads, D head size
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as glm4_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3_rotary

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.rope import ReferenceRope
from mcore.backend.rotary import Rotary, install_rotary, set_attention_factor
from mcore.errors import ConfigError
from tests.tiny_models import SIZES, tiny_hf_model
from tests.unit.mcore.backend.test_rope import GEMMA3, GLOBAL, LOCAL

pytestmark = pytest.mark.usefixtures("alone")

SEQ_LEN = 40


def rotary_of(config: dict[str, Any], *, interleaved: bool = False) -> Rotary:
    group = parallel_state.get_context_parallel_group()
    return Rotary(ReferenceRope(config), interleaved=interleaved, cp_group=group)


def built(name: str) -> GPTModel:
    config = tiny_hf_model(name)[1]
    return build_model(config, padded_vocab_size=256, layout=Layout(), params_dtype=torch.float32, backend="torch")


def megatron_config(**fields: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=8, **fields)


@pytest.mark.parametrize("name", ["llama3", "llama_yarn", "mistral_yarn", "phi3_long", "phi4_partial"])
def test_heads_turn_as_in_the_reference_model(name: str) -> None:
    hf, model = tiny_hf_model(name)[0], built(name)
    heads_SND = torch.randn(SEQ_LEN, 3, model.config.kv_channels, generator=torch.Generator().manual_seed(1))
    angles = model.rotary_pos_emb(SEQ_LEN)
    factor = _yarn_get_concentration_factor_from_config(model.config)
    turned_SND = apply_rotary_pos_emb(heads_SND[:, None], angles, model.config, mscale=factor)[:, 0]

    cos, sin = hf.model.rotary_emb(heads_SND, torch.arange(SEQ_LEN)[None])
    reference = phi3_rotary if name == "phi4_partial" else llama_rotary
    expected_SND = reference(heads_SND.transpose(0, 1)[None], heads_SND.transpose(0, 1)[None], cos, sin)[0]
    assert torch.equal(turned_SND, expected_SND[0].transpose(0, 1))


@pytest.mark.parametrize("name", ["llama_yarn", "phi4_partial"])
def test_packed_sequences_each_start_at_position_zero_and_have_the_factor(name: str) -> None:
    model = built(name)
    lengths = (11, 23, 6)
    heads_TND = torch.randn(sum(lengths), 3, model.config.kv_channels, generator=torch.Generator().manual_seed(1))
    factor = _yarn_get_concentration_factor_from_config(model.config)
    assert factor != 1.0
    angles = model.rotary_pos_emb(max(lengths), packed_seq=True)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    group = parallel_state.get_context_parallel_group()
    packed_TND = apply_rotary_pos_emb(heads_TND, angles, model.config, cu_seqlens=bounds, mscale=factor, cp_group=group)
    for part_SND, found_SND in zip(heads_TND.split(lengths), packed_TND.split(lengths), strict=True):
        alone = apply_rotary_pos_emb(part_SND[:, None], angles[: len(part_SND)], model.config, mscale=factor)
        assert torch.equal(found_SND, alone[:, 0])


def test_interleaved_pairs_turn_as_in_glm_4() -> None:
    config = tiny_hf_model("phi4_partial")[1]
    rotary = rotary_of(config, interleaved=True)
    heads_SND = torch.randn(SEQ_LEN, 3, 16, generator=torch.Generator().manual_seed(1))
    turned = apply_rotary_pos_emb(heads_SND[:, None], rotary(SEQ_LEN), megatron_config(rotary_interleaved=True))[:, 0]
    frequencies = ReferenceRope(config).tables(SEQ_LEN)[0].inverse_frequencies
    angles = torch.outer(torch.arange(float(SEQ_LEN)), frequencies).repeat(1, 2)[None]
    heads_1NSD = heads_SND.transpose(0, 1)[None]
    expected = glm4_rotary(heads_1NSD, heads_1NSD, angles.cos(), angles.sin())[0][0].transpose(0, 1)
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("factor", [1.0, 1.1386294361119891, 0.5, 0.0, 1.3, 2.7])
def test_megatrons_attention_reads_the_factor_that_was_set(factor: float) -> None:
    config = megatron_config()
    assert _yarn_get_concentration_factor_from_config(config) == 1.0
    set_attention_factor(config, factor)
    found = _yarn_get_concentration_factor_from_config(config)
    assert torch.tensor(found, dtype=torch.float32) == torch.tensor(factor, dtype=torch.float32)


@pytest.mark.parametrize(("name", "fused"), [("llama3", True), ("llama_yarn", False)])
def test_a_factor_switches_the_fused_kernel_off(name: str, fused: bool) -> None:
    model = built(name)
    model.config.apply_rope_fusion = True  # as with Transformer Engine
    install_rotary(model, ReferenceRope(tiny_hf_model(name)[1]), ())
    assert model.config.apply_rope_fusion is fused


def test_interleaving_switches_the_fused_kernel_off() -> None:
    model = built("llama")
    model.config.apply_rope_fusion = model.config.rotary_interleaved = True
    install_rotary(model, ReferenceRope(tiny_hf_model("llama")[1]), ())
    assert model.config.apply_rope_fusion is False


def test_positions_after_an_offset_are_those_of_the_longer_sequence() -> None:
    rotary = rotary_of(tiny_hf_model("llama_dynamic")[1])
    assert torch.equal(rotary(10, offset=30), rotary(40)[30:])
    assert not torch.equal(rotary(10), rotary(40)[:10])


def two_kinds_of_layers(**global_rope: Any) -> tuple[GPTModel, dict[str, Any], Gemma3TextConfig]:
    """A model with two kinds of layers, and the angles that each layer's attention was given in a forward."""
    rope = {**GEMMA3["rope_parameters"], GLOBAL: {**GEMMA3["rope_parameters"][GLOBAL], **global_rope}}
    config = Gemma3TextConfig(**{**GEMMA3, "rope_parameters": rope, "vocab_size": SIZES["vocab_size"]})
    model = built("llama")
    install_rotary(model, ReferenceRope(config.to_dict()), tuple(config.layer_types))
    seen: dict[str, Any] = {}
    for layer in model.decoder.layers:
        layer.self_attention.register_forward_pre_hook(
            lambda module, inputs, options: seen.update({module.layer_number: options["rotary_pos_emb"]}),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(torch.ones(1, SEQ_LEN, dtype=torch.long), torch.arange(SEQ_LEN)[None], None)
    return model, seen, config


def test_each_layer_turns_by_the_rope_of_its_type() -> None:
    _, seen, config = two_kinds_of_layers()
    reference = Gemma3RotaryEmbedding(config)
    for number, layer_type in enumerate(config.layer_types, start=1):
        expected = torch.outer(torch.arange(float(SEQ_LEN)), getattr(reference, f"{layer_type}_inv_freq"))
        assert torch.equal(seen[number][:, 0, 0, :4], expected)
    assert not torch.equal(seen[1], seen[2])


def test_layer_types_may_differ_in_their_factor() -> None:
    model, _, config = two_kinds_of_layers(rope_type="yarn", original_max_position_embeddings=16)
    factors = [
        _yarn_get_concentration_factor_from_config(layer.self_attention.config) for layer in model.decoder.layers
    ]
    expected = {
        layer_type: table.attention_factor
        for layer_type, table in zip(
            ReferenceRope(config.to_dict()).layer_types, ReferenceRope(config.to_dict()).tables(1), strict=True
        )
    }
    assert expected[LOCAL] == 1.0 != expected[GLOBAL]
    assert factors == pytest.approx([expected[layer_type] for layer_type in config.layer_types], abs=1e-12)


def test_ropes_by_layer_type_need_layers_that_say_theirs() -> None:
    rope = ReferenceRope(Gemma3TextConfig(**GEMMA3).to_dict())
    with pytest.raises(ConfigError, match="expected one rope for all layers, found"):
        install_rotary(built("llama"), rope, ())
    with pytest.raises(ConfigError, match="an entry for each of chunked_attention"):
        install_rotary(built("llama"), rope, ("chunked_attention",) * 4)


def test_a_checkpoint_has_no_rotary_embedding() -> None:
    assert not [key for key in built("llama_yarn").sharded_state_dict() if "rotary" in key]
