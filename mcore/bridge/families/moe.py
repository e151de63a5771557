"""What the `config.json` of a decoder with experts means to megatron, beside what dense ones say too. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mcore.errors import ConfigError, Problem


def expert_sizes(config: Mapping[str, Any], *, experts: Sequence[str], moe_ffn: str) -> dict[str, Any]:
    """Sizes that the tables of models with experts name: `experts` a layer, `moe_ffn` of each, and `moe_layers`: all.

    Args:
        config: Mapping of a Hugging Face `config.json`.
        experts: Keys that may hold the number of experts of a layer; all that do must agree.
        moe_ffn: Key of an expert's intermediate size.

    Raises:
        ConfigError: Sizes are missing, or no positive integers, or contradict each other. Lists all of them.
    """
    found = {key: config[key] for key in experts if config.get(key) is not None}
    values = {**(found or {experts[0]: None}), moe_ffn: config.get(moe_ffn)}
    problems = [
        Problem(f"config.json: {key}", "a positive integer", repr(config.get(key, "nothing")))
        for key, value in values.items()
        if not isinstance(value, int) or value < 1
    ]
    if len(set(found.values())) > 1:
        problems.append(Problem(f"config.json: {', '.join(found)}", "one number", ", ".join(map(str, found.values()))))
    if problems:
        raise ConfigError("the model's sizes can't be read", problems)
    return {
        "experts": values[next(iter(found))],
        "moe_ffn": values[moe_ffn],
        "moe_layers": (True,) * config["num_hidden_layers"],
    }


def qwen_moe_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each layer is a mixture of experts, by `decoder_sparse_step` and `mlp_only_layers`; all are without them.

    Raises:
        ConfigError: The step is no positive integer.

    Source: transformers 5.19 `modeling_qwen2_moe.py`, `Qwen2MoeDecoderLayer`.
    """
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    if not isinstance(step, int) or step < 1:
        problem = Problem("config.json: decoder_sparse_step", "a positive integer", repr(step))
        raise ConfigError("the model's sizes can't be read", [problem])
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(config["num_hidden_layers"]))


def expert_arguments(config: Mapping[str, Any], sizes: Mapping[str, Any], *, is_normalised: bool) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig` about experts; none if no layer has any.

    A softmax over all experts whose largest shares are then normalised is a softmax over the chosen ones, which is what
    megatron computes unless `moe_router_pre_softmax` is set.

    Args:
        config: Mapping of a Hugging Face `config.json`.
        sizes: From `expert_sizes`.
        is_normalised: Whether the shares of the experts that a token goes to sum up to 1.

    Raises:
        ConfigError: The number of experts that a token goes to can't be built.
    """
    is_moe = sizes["moe_layers"]
    if not any(is_moe):
        return {}
    chosen, least = config.get("num_experts_per_tok"), 2 if is_normalised else 1
    if not isinstance(chosen, int) or not least <= chosen <= sizes["experts"]:
        raise ConfigError(
            "the model's router can't be expressed",
            [
                Problem(
                    "config.json: num_experts_per_tok",
                    f"{least} to {sizes['experts']}, the number of experts",
                    repr(chosen),
                    "megatron-core has no router that gives a single expert a share of 1." if chosen == 1 else "",
                )
            ],
        )
    return {
        "num_moe_experts": sizes["experts"],
        "moe_ffn_hidden_size": sizes["moe_ffn"],
        "moe_layer_freq": 1 if all(is_moe) else [int(it) for it in is_moe],
        "moe_router_topk": chosen,
        "moe_router_pre_softmax": not is_normalised,
    }
