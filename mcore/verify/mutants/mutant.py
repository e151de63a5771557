"""What a mutant is, and the alterations that mistakes are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mcore.bridge.rules import Family
from mcore.verify.mutants.wrong_rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

Config = dict[str, Any]
Tensors = dict[str, "Tensor"]
L2 = "model.layers.2."


def nothing(_: Any) -> None:
    """Leave it as it is."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake.

    Args:
        name: Short name, in the order family, part, mistake.
        family: Family of the healthy model (`tiny_models`).
        what: The mistake in words.
        where: The part of the model that the proof must name.
        rows: Makes the wrong weight table of the right one.
        config: Alters `config.json` to what the converter took it for.
        tensors: Alters the Hugging Face tensors to what reached the converter.
        tied: Whether the healthy model's head is its embedding.
    """

    name: str
    family: str
    what: str
    where: str
    rows: Callable[[Rows], Rows] | None = None
    config: Callable[[Config], None] = nothing
    tensors: Callable[[Tensors], None] = nothing
    tied: bool = False

    def table(self, family: Family) -> Family:
        """The family as the wrong converter has it."""
        return replace(family, rules=self.rows(family.rules)) if self.rows else family


def setting(**fields: Any) -> Callable[[Config], None]:
    """Fields of `config.json` as the converter took them."""
    return lambda config: config.update(fields)


def set_rope(**fields: Any) -> Callable[[Config], None]:
    """Rope parameters as the converter took them."""
    return lambda config: config["rope_parameters"].update(fields)


def plain_rope(config: Config) -> None:
    """The scaling of the rotary embedding is overlooked."""
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}


def change(name: str, altered: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """One tensor arrives altered."""

    def alter(tensors: Tensors) -> None:
        tensors[name] = altered(tensors[name].clone()).contiguous()

    return alter


def change_each(ending: str, altered: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """All tensors whose name has an ending arrive altered."""

    def alter(tensors: Tensors) -> None:
        names = [name for name in tensors if name.endswith(ending)]
        assert names, ending
        for name in names:
            change(name, altered)(tensors)

    return alter


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    """Two tensors arrive under each other's name."""

    def alter(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return alter


def add(row: int, column: int, value: float) -> Callable[[Tensor], Tensor]:
    """One element is off."""

    def altered(tensor: Tensor) -> Tensor:
        tensor[row, column] += value
        return tensor

    return altered


def zero_row(row: int) -> Callable[[Tensor], Tensor]:
    """One row is left at its initial zeros."""

    def altered(tensor: Tensor) -> Tensor:
        tensor[row] = 0
        return tensor

    return altered


def zero(tensor: Tensor) -> Tensor:
    """Left at its initial zeros."""
    return tensor * 0


def halves_swapped(tensor: Tensor) -> Tensor:
    """The upper half of the rows is taken for the lower one."""
    return tensor.roll(tensor.shape[0] // 2, dims=0)


def rolled(tensor: Tensor) -> Tensor:
    """All rows are off by one."""
    return tensor.roll(1, dims=0)


def layer_2_repeats_layer_1(tensors: Tensors) -> None:
    """A layer is written twice, another one never."""
    for name in tensors:
        if name.startswith(L2):
            tensors[name] = tensors[name.replace(L2, "model.layers.1.")].clone()


def half_tied(tensors: Tensors) -> None:
    """Half of the head's rows are the embedding's."""
    rows = tensors["lm_head.weight"].shape[0] // 2
    tensors["lm_head.weight"][:rows] = tensors["model.embed_tokens.weight"][:rows]


def head_lost(tensors: Tensors) -> None:
    """The head does not arrive."""
    del tensors["lm_head.weight"]


def through_bfloat16(tensors: Tensors) -> None:
    """Weights are rounded on their way."""
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16().float()
