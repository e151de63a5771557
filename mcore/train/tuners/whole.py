"""Which modules learn whole beside the adapters (`modules_to_save`), and what PEFT calls them. No torch here.

Embedding, output layer and norms can: each is one tensor of megatron's and one of Hugging Face's. Linear layers and
routers have adapters instead; most of them share megatron's matrix with others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.plan import Step, steps_of
from mcore.errors import ConfigError, Problem
from mcore.train.tuners.targets import EMBEDDING, WEIGHT, Target

HEAD = "output_layer"
FIELD = "train.modules_to_save"


def choose_whole(names: Sequence[str], hf_config: Mapping[str, Any], targets: Iterable[Target]) -> tuple[Step, ...]:
    """The steps of the model's table whose tensors belong to the modules that some names stand for.

    A name means what it means to PEFT, which asks whether a module's name ends with it: `norm` stands for every norm
    whose name ends so. The last part of a module's name in megatron (`word_embeddings`, `output_layer`) will do too.

    Args:
        names: As in `train.modules_to_save`.
        hf_config: The model's `config.json`.
        targets: Modules with adapters.

    Raises:
        ConfigError: A name stands for nothing, or for what can't learn whole. Lists all of them.
    """
    dims = dims_of(hf_config)
    everything = [step for step in steps_of(family_of_config(hf_config), dims) if not step.rule.per_mtp_layer]
    can = sorted({_leaf(module) for step in everything if _learns(step) for module in modules_of(step)})
    problems = []
    chosen: list[Step] = []
    for name in names:
        of_name = [step for step in everything if _stands_for(name, step)]
        refused = sorted({_leaf(module) for step in of_name if not _learns(step) for module in modules_of(step)})
        if dims.tied and not of_name and "lm_head".endswith(name):
            problems.append(_shared(name))
        elif not of_name:
            problems.append(Problem(f"{FIELD}: {name}", f"one of {', '.join(can)}", "no such module in the model"))
        elif refused:
            fix = "Name linear layers and routers in train.target_modules."
            text = f"{', '.join(refused)}, which can't learn whole"
            problems.append(Problem(f"{FIELD}: {name}", f"one of {', '.join(can)}", text, fix))
        chosen += of_name
    shares = dims.tied or dims.num_mtp_layers
    ends = [step for step in chosen if step.rule.mcore in (EMBEDDING + WEIGHT, HEAD + WEIGHT)]
    if shares and ends:
        problems += [_shared(module) for step in ends for module in modules_of(step)]
    with_adapter = {target.hf_module for target in targets}
    problems += [
        Problem(f"{FIELD}: {module}", "a module without an adapter", "one of train.target_modules")
        for module in sorted({module for step in chosen for module in modules_of(step)} & with_adapter)
    ]
    if problems:
        raise ConfigError("these modules can't learn whole", list(dict.fromkeys(problems)))
    return tuple(step for step in everything if step in chosen)


def peft_modules_to_save(chosen: Sequence[Step], hf_config: Mapping[str, Any]) -> list[str]:
    """`modules_to_save` of an `adapter_config.json`: last parts of names where PEFT takes them for just these."""
    mine = {module for step in chosen for module in modules_of(step)}
    everything = {module for step in steps_of(family_of_config(hf_config), dims_of(hf_config)) for module in _all(step)}
    short = {_leaf(module) for module in mine}
    meant = {module for module in everything if module.endswith(tuple(short))} if short else set()
    return sorted(short if meant == mine else mine)


def modules_of(step: Step) -> list[str]:
    """Hugging Face modules that a step's tensors belong to."""
    return [name.rpartition(".")[0] for name in step.hf_names]


def _shared(name: str) -> Problem:
    text = "no embedding and no output layer, as another layer shares their weight"
    return Problem(f"{FIELD}: {name}", text, "one of them", "Leave it out, or train with tuner_type: full.")


def _learns(step: Step) -> bool:
    """Whether a tensor is an embedding, an output layer, or a norm's."""
    rule = step.rule
    at_an_end = rule.mcore in (EMBEDDING + WEIGHT, HEAD + WEIGHT)
    is_norm = len(rule.shape.split()) == 1 and "norm" in rule.mcore and not rule.per_expert
    return len(step.hf_names) == 1 and (at_an_end or is_norm)


def _stands_for(name: str, step: Step) -> bool:
    of_mcore = step.rule.mcore.rpartition(".")[0]
    return any(module.endswith(name) for module in _all(step)) or f".{of_mcore}".endswith(f".{name}")


def _all(step: Step) -> Iterator[str]:
    """Modules of a step's tensors, and those that they are in."""
    for module in modules_of(step):
        parts = module.split(".")
        yield from (".".join(parts[:number]) for number in range(1, len(parts) + 1))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
