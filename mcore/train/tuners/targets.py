"""Which modules of a model get an adapter, by Hugging Face's names or Megatron's. No torch here.

The family's table says what there is: every row is a megatron module's weight, and the Hugging Face modules whose
weights it is made of. Each of those gets an adapter of its own, so q, k and v never share a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mcore.bridge.dims import ModelDims
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.rules import DECODER, LAYER, Family, Rule
from mcore.errors import ConfigError, Problem

Kind = Literal["linear", "router", "embedding"]

ALL: Mapping[str, Kind] = {"all-linear": "linear", "all-router": "router", "all-embedding": "embedding"}
"""Names that stand for all modules of a kind. The output layer belongs to none of them, as in PEFT."""

EMBEDDING, ROUTER, EXPERTS = "embedding.word_embeddings", ".mlp.router", ".mlp.experts.experts."
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Target:
    """A Hugging Face module that an adapter can be put on, and where it is in megatron.

    Attributes:
        kind: What it is.
        hf_module: Its name in transformers' model, such as `model.layers.0.self_attn.q_proj`.
        mcore_module: Name of megatron's module that holds its weight, counted over all ranks; experts' modules have no
            number there.
        rule: The row of the family's table.
        part: Which of the row's Hugging Face tensors it is.
        layer: Number of the decoder layer; None outside of the decoder.
        expert: Number of the expert; None if it is none.
    """

    kind: Kind
    hf_module: str
    mcore_module: str
    rule: Rule
    part: int
    layer: int | None = None
    expert: int | None = None


def choose_targets(names: Sequence[str], hf_config: Mapping[str, Any]) -> tuple[Target, ...]:
    """The modules of a model that some names stand for, in the model's order.

    A name is one of `ALL`, or the end of a module's name in transformers or in megatron (`q_proj`, `mlp.up_proj`,
    `linear_qkv`, `shared_experts.linear_fc1`).

    Args:
        names: As in `train.target_modules`.
        hf_config: The model's `config.json`.

    Raises:
        ConfigError: A name stands for nothing, or for what can't have an adapter. Lists all of them.
    """
    family, dims = family_of_config(hf_config), dims_of(hf_config)
    everything = tuple(_all_targets(family, dims))
    problems = [
        Problem(
            f"train.target_modules: {name}",
            f"{', '.join(ALL)}, or one of {', '.join(_short_names(everything))}",
            "no such module in the model, or one that can't have an adapter",
        )
        for name in names
        if not any(_stands_for(name, target) for target in everything)
    ]
    chosen = tuple(target for target in everything if any(_stands_for(name, target) for name in names))
    stacked = sorted({_leaf(target.hf_module) for target in chosen if "[" in target.hf_module})
    if stacked:
        problems.append(
            Problem(
                "train.target_modules",
                "modules of which each has a weight of its own",
                f"{', '.join(stacked)}, which the model's files hold stacked over all experts",
                "Name the other modules one by one.",
            )
        )
    if (dims.tied or dims.num_mtp_layers) and any(target.kind == "embedding" for target in chosen):
        problems.append(
            Problem(
                "train.target_modules",
                "no embedding, as another layer shares its weight",
                "the embedding",
                "An adapter on one of them could not be merged.",
            )
        )
    if problems:
        raise ConfigError("these modules can't have adapters", problems)
    return chosen


def peft_target_modules(chosen: Iterable[Target], hf_config: Mapping[str, Any]) -> list[str]:
    """`target_modules` of an `adapter_config.json`: last parts of names where they mean just the chosen modules."""
    mine = {target.hf_module for target in chosen}
    everything = {target.hf_module for target in _all_targets(family_of_config(hf_config), dims_of(hf_config))}
    short = {_leaf(name) for name in mine}
    return sorted(short if {name for name in everything if _leaf(name) in short} == mine else mine)


def _all_targets(family: Family, dims: ModelDims) -> Iterator[Target]:
    for rule in family.rules:
        if rule.mcore == EMBEDDING + WEIGHT:
            yield from _of_rule(rule, "embedding")
        elif rule.mcore.startswith(DECODER) and rule.mcore.endswith(WEIGHT) and len(rule.shape.split()) == 2:
            kind: Kind = "router" if rule.mcore.endswith(ROUTER + WEIGHT) else "linear"
            layers = [layer for layer in range(dims.num_layers) if rule.applies(dims, layer)]
            experts = range(dims.size("experts")) if rule.per_expert and layers else (None,)
            for layer in layers:
                for expert in experts:
                    yield from _of_rule(rule, kind, layer, expert)


def _of_rule(rule: Rule, kind: Kind, layer: int | None = None, expert: int | None = None) -> Iterator[Target]:
    mcore = rule.mcore.removesuffix(WEIGHT).replace(LAYER, str(layer))
    for part, name in enumerate(rule.hf_names(layer or 0, expert or 0)):
        yield Target(kind, name.removesuffix(WEIGHT), mcore, rule, part, layer, expert)


def _stands_for(name: str, target: Target) -> bool:
    if name in ALL:
        return target.kind == ALL[name]
    return any(f".{module}".endswith(f".{name}") for module in (target.hf_module, target.mcore_module))


def _short_names(targets: Iterable[Target]) -> list[str]:
    return sorted({_leaf(name) for target in targets for name in (target.hf_module, target.mcore_module)})


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
