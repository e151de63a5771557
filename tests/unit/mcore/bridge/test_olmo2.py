from __future__ import annotations

from mcore.bridge.families import family_of_config
from tests.tiny_models import tiny_hf_model


def test_query_and_key_norms_are_not_megatrons() -> None:
    """It would sum the gradients of every norm of that name over ranks that hold different heads."""
    config = tiny_hf_model("olmo2")[1]
    family = family_of_config(config)
    assert family.features(config).qk_norm_over == "projection"
    assert not family.transformer_config(config)["qk_layernorm"]


def test_a_layer_has_no_norm_in_front() -> None:
    names = {rule.mcore.rpartition("layers.{L}.")[2] for rule in family_of_config(tiny_hf_model("olmo2")[1]).rules}
    assert not any(name.endswith("layer_norm_weight") for name in names)
    assert {"self_attention.linear_proj.post_layernorm.weight", "mlp.linear_fc2.post_layernorm.weight"} <= names
