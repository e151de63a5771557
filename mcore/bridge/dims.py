"""The sizes of one model that weight tables and layouts speak of, read from its `config.json`. No torch here."""

from __future__ import annotations

import copyreg
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from mcore.errors import ConfigError, Problem

Shape = tuple[int, ...]


def _read_only(mapping: dict[str, Any]) -> MappingProxyType[str, Any]:
    return MappingProxyType(mapping)


copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))  # ranks send each other plans

REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""Keys of `config.json` that no class default may stand in for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDims:
    """Sizes of one decoder. Every size that a table may name is a field, a property, or an entry of `more`."""

    num_layers: int
    hidden: int
    ffn: int
    vocab: int
    padded_vocab: int
    heads: int
    groups: int
    head_dim: int
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    moe_layers: tuple[bool, ...] = ()
    """Whether each layer's MLP is a mixture of experts; empty if none is."""
    num_mtp_layers: int = 0
    """Layers that predict further tokens. They follow the decoder's, and look like its last one."""
    more: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Sizes and switches (0 or 1) that only some families have, by the names that their tables use."""

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 1) -> Self:
        """Sizes of the model that a Hugging Face `config.json` describes.

        Args:
            config: The file's mapping.
            make_vocab_size_divisible_by: Rows: the vocabulary is padded up to a multiple of this.

        Raises:
            ConfigError: Keys are missing, no positive integers, or do not fit each other; lists all of them.
        """
        problems = [
            Problem(f"config.json: {key}", "a positive integer", repr(config.get(key, "nothing")))
            for key in REQUIRED
            if not _is_count(config.get(key))
        ]
        problems += [
            Problem(f"config.json: {key}", "a positive integer, null or nothing", repr(config[key]))
            for key in ("num_key_value_heads", "head_dim")
            if config.get(key) is not None and not _is_count(config[key])
        ]
        if make_vocab_size_divisible_by < 1:
            problems.append(Problem("make_vocab_size_divisible_by", "1 or more", str(make_vocab_size_divisible_by)))
        if problems:
            raise ConfigError("the model's sizes can't be read", problems)
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        if heads % groups:
            problems.append(
                Problem("config.json: num_key_value_heads", f"a divisor of num_attention_heads {heads}", str(groups))
            )
        head_dim = config.get("head_dim")
        if head_dim is None and config["hidden_size"] % heads:
            problems.append(
                Problem(
                    "config.json: hidden_size",
                    f"a multiple of num_attention_heads {heads}, as there is no head_dim",
                    str(config["hidden_size"]),
                )
            )
        if problems:
            raise ConfigError("the model's sizes do not fit each other", problems)
        multiple = make_vocab_size_divisible_by
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            padded_vocab=math.ceil(config["vocab_size"] / multiple) * multiple,
            heads=heads,
            groups=groups,
            head_dim=head_dim or config["hidden_size"] // heads,
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )

    @property
    def untied(self) -> bool:
        """Whether the output layer has a weight of its own."""
        return not self.tied

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.groups

    @property
    def q_rows(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.groups * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Rows of megatron's joint projection."""
        return self.q_rows + 2 * self.kv_rows

    @property
    def gate_up_rows(self) -> int:
        """Rows of megatron's joint gate and up projection."""
        return 2 * self.ffn

    @property
    def has_stacked_layers(self) -> bool:
        """Whether a checkpoint holds all layers of a parameter as one tensor: megatron's way if all are alike."""
        return len(set(self.moe_layers)) <= 1

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts. Layers for further tokens are like the decoder's last one."""
        return bool(self.moe_layers) and self.moe_layers[min(layer, self.num_layers - 1)]

    def size(self, name: str) -> int:
        """One size or switch by its name in a table.

        Raises:
            AttributeError: There is no such size.
        """
        return self.more[name] if name in self.more else getattr(self, name)

    def shape(self, column: str) -> Shape:
        """Sizes of a table's shape column: names or products, as in `qkv_rows hidden` or `2*moe_ffn hidden`."""
        return tuple(math.prod(self._factor(factor) for factor in axis.split("*")) for axis in column.split())

    def _factor(self, text: str) -> int:
        return int(text) if text.isdecimal() else self.size(text)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
