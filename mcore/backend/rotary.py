"""Rotary embedding in megatron-core's place for it, with the frequencies and factors of transformers' model.

megatron-core's own module knows two scalings (one of them with three of its four numbers fixed in the code), and one
rope for all layers. Ours puts in whatever `mcore.backend.rope` says, at the length at hand, for every layer type.

S sequence, T layer types with a rope of their own, D turned part of a head
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mcore.backend.context import part_of_rank
from mcore.backend.rope import ReferenceRope, RopeTable
from mcore.errors import ConfigError, Problem


class Rotary(RotaryEmbedding):  # type: ignore[misc]
    """Angles by position: `[S, 1, 1, D]`, or `[T, S, 1, 1, D]` if layer types have ropes of their own."""

    def __init__(self, rope: ReferenceRope, *, interleaved: bool, cp_group: torch.distributed.ProcessGroup) -> None:
        torch.nn.Module.__init__(self)  # the parent's would compute frequencies of its own
        self.rope = rope
        self.rotary_interleaved = interleaved
        self.cp_group = cp_group
        self._last: tuple[tuple[int, int, bool, int], Tensor] | None = None

    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor:
        """Angles of positions from `offset` on, of this context parallel rank unless sequences are packed.

        Frequencies that depend on the length are those of one sequence of `offset + max_seq_len` tokens. Of packed
        sequences `max_seq_len` is the longest one's length, which is what transformers goes by as well.
        """
        group = cp_group or self.cp_group
        key = (max_seq_len, offset, packed_seq, id(group))
        if self._last is None or self._last[0] != key:
            angles = [self._angles(table, max_seq_len, offset) for table in self.rope.tables(offset + max_seq_len)]
            if not packed_seq:
                angles = [part_of_rank(of_type, group) for of_type in angles]
            self._last = key, angles[0] if len(angles) == 1 else torch.stack(angles)
        return self._last[1]

    def _angles(self, table: RopeTable, num_positions: int, offset: int) -> Tensor:
        frequencies = table.inverse_frequencies.to(torch.cuda.current_device())
        positions = torch.arange(offset, offset + num_positions, dtype=torch.float32, device=frequencies.device)
        angles = torch.outer(positions, frequencies)
        doubled = angles.repeat_interleave(2, -1) if self.rotary_interleaved else torch.cat((angles, angles), -1)
        return doubled[:, None, None, :]


def install_rotary(model: GPTModel, rope: ReferenceRope, rope_of_layer: tuple[str, ...]) -> None:
    """Give a model our rotary embedding in place of megatron-core's.

    Args:
        model: As built; its decoder may be one pipeline stage's.
        rope: The reference model's.
        rope_of_layer: Layer type of each layer of the whole decoder, empty if they all share one rope
            (`mcore.bridge.features.Features`).

    Raises:
        ConfigError: The ropes are not those that the layers ask for.
    """
    asked = set(rope_of_layer) or {""}
    if not asked <= set(rope.layer_types):
        raise ConfigError(
            "the model's rotary embedding can't be built",
            [
                Problem(
                    "config.json: rope_parameters",
                    f"an entry for each of {', '.join(sorted(asked))}" if rope_of_layer else "one rope for all layers",
                    ", ".join(rope.layer_types) or "one for all layers",
                )
            ],
        )
    config = model.config
    cp_group = model.rotary_pos_emb.cp_group
    model.rotary_pos_emb = Rotary(rope, interleaved=config.rotary_interleaved, cp_group=cp_group)
    factors = [table.attention_factor for table in rope.tables(1)]
    # Transformer Engine's fused kernel knows no factor, and its version for packed sequences turns halves of a head,
    # never pairs. Source: megatron-core 0.16.1, `apply_rotary_pos_emb`.
    config.apply_rope_fusion = config.apply_rope_fusion and set(factors) == {1.0} and not config.rotary_interleaved
    set_attention_factor(config, factors[0])
    if len(factors) == 1:
        return
    for layer in model.decoder.layers:
        number = rope.layer_types.index(rope_of_layer[layer.layer_number - 1])
        layer.self_attention.register_forward_pre_hook(_pick(number), with_kwargs=True)
        if factors[number] != factors[0]:
            layer.self_attention.config = copy.copy(config)
            set_attention_factor(layer.self_attention.config, factors[number])


def set_attention_factor(config: TransformerConfig, factor: float) -> None:
    """Have the attentions of a config multiply cos and sin by `factor`, packed sequences included.

    megatron-core computes the factor as YaRN does from three attributes of the config: 1 + 0.1 * mscale * log(scaling).
    Source: megatron-core 0.16.1, `_yarn_get_concentration_factor_from_config`.
    """
    config.yarn_rotary_scaling_factor = math.e
    config.yarn_mscale = 10 * (factor - 1)
    config.yarn_mscale_all_dim = 0.0


def _pick(number: int) -> Any:
    """Hook that hands an attention its own layer type's angles, out of those of all types.

    A hook, so that it fits whatever class of attention the layer's spec names.
    """

    def pick(
        module: torch.nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        angles_TS11D = options["rotary_pos_emb"]
        return inputs, {**options, "rotary_pos_emb": angles_TS11D[number]}

    return pick
