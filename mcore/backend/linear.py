"""Linear layers of the torch backend with what megatron-core's lack: biases of their own, and a norm behind.

S sequence, B batch, H hidden
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class InputLinear(ColumnParallelLinear):  # type: ignore[misc]
    """The linear layer that gives query, key and value.

    Args:
        args: As of `ColumnParallelLinear`.
        bias: Whether megatron's config gives it a bias.
        has_bias: Whether it has one, if that differs.
        kwargs: As of `ColumnParallelLinear`.
    """

    def __init__(self, *args: Any, bias: bool, has_bias: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, bias=bias if has_bias is None else has_bias, **kwargs)


class OutputLinear(RowParallelLinear):  # type: ignore[misc]
    """The linear layer that ends attention or MLP, with what megatron's lacks.

    Args:
        args: As of `RowParallelLinear`.
        bias: Whether megatron's config gives it a bias.
        has_bias: Whether it has one, if that differs.
        post_layernorm: Spec of a norm that its output, bias included, goes through before it is added to the residual.
        kwargs: As of `RowParallelLinear`.
    """

    def __init__(
        self,
        *args: Any,
        config: TransformerConfig,
        bias: bool,
        has_bias: bool | None = None,
        post_layernorm: ModuleSpec | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, config=config, bias=bias if has_bias is None else has_bias, **kwargs)
        self.post_layernorm: Any = None
        if post_layernorm is not None:
            size = config.hidden_size
            self.post_layernorm = build_module(
                post_layernorm, config=config, hidden_size=size, eps=config.layernorm_epsilon
            )
            # Behind the layer, not in it: what else is added to the layer's output comes before the norm (LoRA).
            self.register_forward_hook(self._normalise)

    def _normalise(
        self, layer: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, None]:
        """Output `[S, B, H]`, normalised with its bias, so that none is still to be added."""
        hidden_SBH, bias = output
        return self.post_layernorm(hidden_SBH if bias is None else hidden_SBH + bias), None
