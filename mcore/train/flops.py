"""How many floating-point operations a model takes, from its family's table of weights. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.rules import DECODER


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """What the model FLOPs of training follow from.

    Attributes:
        products: Parameters that a token is multiplied by in the decoder's layers: all matrices of attention (with
            latents, the projections down and up), of dense MLPs, routers and shared experts, and those of as many
            experts as a token goes to.
        output: Parameters of the output layer, without padding.
        attention: Sum over layers and heads of the sizes of a key and of a value.
    """

    products: int
    output: int
    attention: int

    @classmethod
    def of(cls, hf_config: Mapping[str, Any]) -> Self:
        """That of the model that a `config.json` describes. Layers for further tokens don't run in training.

        Raises:
            ConfigError: The model is not known, or its sizes can't be read.
        """
        family, dims = family_of_config(hf_config), dims_of(hf_config)
        topk = active_experts(hf_config)
        products = 0
        for layer in range(dims.num_layers):
            for rule in family.rules:
                if rule.mcore.startswith(DECODER) and rule.applies(dims, layer):
                    rows, *columns = rule.mcore_shape(dims)
                    products += rows * sum(columns) * (topk if rule.per_expert else 1)
        has_latents = "qk_dim" in dims.more
        of_head = dims.size("qk_dim") + dims.size("v_dim") if has_latents else 2 * dims.head_dim
        return cls(
            products=products,
            output=dims.vocab * dims.hidden,
            attention=dims.num_layers * dims.heads * of_head,
        )

    def of_step(self, lengths: Sequence[int], num_trained: int, *, is_frozen: bool = False) -> float:
        """FLOPs that training needs for samples of these lengths, without padding and without recomputation.

        Formula: `6 * (P * tokens + O * trained tokens) + 3 * A * sum over samples of s^2`, with P, O and A for
        `products`, `output` and `attention` and s for a sample's tokens. A matrix product costs 2 forward and 4
        backward for each parameter and token. Causal attention multiplies half of all pairs of tokens, by a key and by
        a value: forward `s^2 / 2 * 2 * A`, and twice that backward. Windows are not taken off, nor are scalars, norms,
        softmax and the optimizer counted.

        Of frozen weights (LoRA) no gradient is computed, so their products cost 2 backward; adapters are left out.

        Args:
            lengths: Tokens of each sample.
            num_trained: Tokens that have a loss.
            is_frozen: Whether only adapters learn.
        """
        products = self.products * sum(lengths) + self.output * num_trained
        attention = self.attention * sum(length * length for length in lengths)
        return 6.0 * products + 3.0 * attention - (2.0 * products if is_frozen else 0.0)


def active_experts(hf_config: Mapping[str, Any]) -> int:
    """Experts that a token goes to in a layer that has some; 0 in a model without."""
    if not any(dims_of(hf_config).moe_layers):
        return 0
    return int(family_of_config(hf_config).transformer_config(hf_config)["moe_router_topk"])
