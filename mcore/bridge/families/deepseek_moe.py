"""Mixtures of experts with shared experts, and layers for further tokens (MTP), as DeepSeek's files name them.

GLM-4.5's files and its code in transformers are the same in all of this.

Source: transformers 5.19 `modeling_deepseek_v3.py`, `modeling_glm4_moe.py` and `MtpModel`; megatron-core 0.16.1
`transformer/moe/`, `multi_token_prediction.py` and its global names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.windows import no_windows
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, GateUp
from mcore.errors import ConfigError, Problem
from mcore.findings import refuse, together

M, MM, MTP = "decoder.layers.{L}.", "decoder.layers.{L}.mlp.", "mtp.layers.{M}."
H, HM = "model.layers.{L}.", "model.layers.{L}.mlp."

COUNTS = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size")
"""Keys of `config.json` that must be positive integers, beside those of every decoder."""

# fmt: off
MLP_RULES = (
    #           megatron parameter                   shape                  Hugging Face tensors
    Copy  (MM + "linear_fc1.layer_norm_weight",      "hidden",              H  + "post_attention_layernorm.weight", "dense"),  # noqa: E501
    GateUp(MM + "linear_fc1.weight",                 "gate_up_rows hidden", HM + "{gate,up}_proj.weight", "dense"),
    Copy  (MM + "linear_fc2.weight",                 "hidden ffn",          HM + "down_proj.weight", "dense"),
    Copy  (M  + "pre_mlp_layernorm.weight",          "hidden",              H  + "post_attention_layernorm.weight", "moe"),  # noqa: E501
    Copy  (MM + "router.weight",                     "experts hidden",      HM + "gate.weight", "moe"),
    Copy  (MM + "router.expert_bias",                "experts",             HM + "gate.e_score_correction_bias", "moe router_bias"),  # noqa: E501
    GateUp(MM + "experts.experts.linear_fc1.weight", "2*moe_ffn hidden",    HM + "experts.{E}.{gate,up}_proj.weight", "moe"),  # noqa: E501
    Copy  (MM + "experts.experts.linear_fc2.weight", "hidden moe_ffn",      HM + "experts.{E}.down_proj.weight", "moe"),
    GateUp(MM + "shared_experts.linear_fc1.weight",  "2*shared_ffn hidden", HM + "shared_experts.{gate,up}_proj.weight", "moe"),  # noqa: E501
    Copy  (MM + "shared_experts.linear_fc2.weight",  "hidden shared_ffn",   HM + "shared_experts.down_proj.weight", "moe"),  # noqa: E501
)
MTP_RULES = (
    # Both sides have the embedding's columns first, then those of the hidden states.
    Copy(MTP + "eh_proj.weight",                     "hidden 2*hidden",     H  + "eh_proj.weight"),
    Copy(MTP + "enorm.weight",                       "hidden",              H  + "enorm.weight"),
    Copy(MTP + "hnorm.weight",                       "hidden",              H  + "hnorm.weight"),
    Copy(MTP + "final_layernorm.weight",             "hidden",              H  + "shared_head.norm.weight"),
)
# fmt: on

TIED = (
    ("lm_head.weight", "model.embed_tokens.weight"),
    (H + "embed_tokens.weight", "model.embed_tokens.weight"),
    (H + "shared_head.head.weight", "lm_head.weight"),
)
"""What stands for what: of embeddings that are tied, and what files repeat in each layer for further tokens."""


def moe_sizes(config: Mapping[str, Any], *, router_bias: bool) -> dict[str, Any]:
    """Sizes and switches that `MLP_RULES` name, and which layers have experts."""
    return {
        "moe_layers": moe_layers(config),
        "num_mtp_layers": config.get("num_nextn_predict_layers") or 0,
        "experts": config["n_routed_experts"],
        "moe_ffn": config["moe_intermediate_size"],
        "shared_ffn": config["n_shared_experts"] * config["moe_intermediate_size"],
        "router_bias": router_bias,
    }


def moe_layers(config: Mapping[str, Any]) -> tuple[bool, ...]:
    """Whether each layer is a mixture of experts: all but the first `first_k_dense_replace`."""
    return tuple(layer >= (config.get("first_k_dense_replace") or 0) for layer in range(config["num_hidden_layers"]))


def moe_arguments(config: Mapping[str, Any], *, has_groups: bool = True) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig` about experts and further tokens.

    Args:
        config: The model's `config.json`.
        has_groups: Whether `n_group` and `topk_group` count.

    Raises:
        ConfigError: Groups can't be, no layer has experts, or embeddings are tied that further tokens would share.
    """
    layers = moe_layers(config)
    problems = first_dense_problems(config) + (group_problems(config) if has_groups else [])
    if not layers[-1]:
        text = f"less than num_hidden_layers {len(layers)}"
        problems.append(Problem("config.json: first_k_dense_replace", text, str(config["first_k_dense_replace"])))
    if config.get("num_nextn_predict_layers") and config.get("tie_word_embeddings"):
        text = "false, as there are layers for further tokens"
        problems.append(Problem("config.json: tie_word_embeddings", text, "true"))
    if problems:
        raise ConfigError("the model can't be expressed", problems)
    chosen = config["num_experts_per_tok"]
    if chosen > config["n_routed_experts"]:
        text = f"at most n_routed_experts {config['n_routed_experts']}"
        raise ConfigError(
            "the model can't be expressed", [Problem("config.json: num_experts_per_tok", text, str(chosen))]
        )
    groups = num_groups(config) if has_groups else 1
    return {
        "num_moe_experts": config["n_routed_experts"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": config["n_shared_experts"] * config["moe_intermediate_size"],
        "moe_layer_freq": 1 if all(layers) else [int(is_moe) for is_moe in layers],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": config["topk_group"] if groups > 1 else None,
        "moe_router_topk_scaling_factor": config.get("routed_scaling_factor"),
        "mtp_num_layers": config.get("num_nextn_predict_layers") or None,
    }


def num_groups(config: Mapping[str, Any]) -> int:
    """Groups of experts of which a token's experts may come from some only; 1 if they may come from anywhere."""
    return int(config.get("n_group", 1))


def group_problems(config: Mapping[str, Any]) -> list[Problem]:
    """What keeps a token's experts from coming out of `topk_group` of `n_group` groups; one group if a key is missing.

    transformers masks other groups' experts, by different numbers in V2 and V3: no more experts may be asked for than
    the chosen groups have.
    """
    keys = ("n_group", "topk_group")
    if problems := missing_counts({**dict.fromkeys(keys, 1), **config}, keys):
        return problems
    groups, best = num_groups(config), config.get("topk_group", 1)
    experts, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    if experts % groups:
        problems.append(Problem("config.json: n_group", f"a divisor of n_routed_experts {experts}", str(groups)))
    elif chosen > best * (experts // groups):
        text = f"at most {best * (experts // groups)}, as many as topk_group {best} of n_group {groups} have"
        problems.append(Problem("config.json: num_experts_per_tok", text, str(chosen)))
    if best > groups:
        problems.append(Problem("config.json: topk_group", f"at most n_group {groups}", str(best)))
    return problems


def sigmoid_router(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `TransformerConfig` for a router with sigmoid scores and a correction bias.

    Raises:
        ConfigError: A single expert's weight is normalised, which would make it 1 whatever the router says.
    """
    if config["num_experts_per_tok"] == 1 and normalises(config):
        problem = Problem("config.json: num_experts_per_tok", "2 or more, as norm_topk_prob is set", "1")
        raise ConfigError("the model can't be expressed", [problem])
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        # The bias balances the experts' load in pretraining; a run that goes on from a checkpoint keeps it.
        "moe_router_bias_update_rate": 0.0,
    }


def sigmoid_features(config: Mapping[str, Any]) -> Features:
    """How a sigmoid router's choice differs from megatron's, and that there are no windows.

    transformers ranks groups by their best two experts; megatron by the best `topk // group_topk`.

    Raises:
        ConfigError: `layer_types` asks for windows, or groups can't be.
    """
    found = together(
        lambda: {"windows": no_windows(config)},
        lambda: refuse(missing_counts(config, ("n_routed_experts", "num_experts_per_tok"))),
        lambda: refuse(group_problems(config)),
        lambda: refuse(_single_expert_groups(config)),
    )
    groups, best = num_groups(config), 2
    alike = groups == 1 or config["num_experts_per_tok"] // config["topk_group"] == best
    return Features(**found, expert_groups_by=None if alike else best, expert_weights_sum_to_one=normalises(config))


def _single_expert_groups(config: Mapping[str, Any]) -> list[Problem]:
    """Groups of one expert each, which have no two best to be ranked by: transformers fails at the first token."""
    if num_groups(config) < 2 or num_groups(config) * 2 <= config["n_routed_experts"]:
        return []
    text = f"at most {config['n_routed_experts'] // 2}, as groups are ranked by their best two experts"
    return [Problem("config.json: n_group", text, str(config["n_group"]))]


def normalises(config: Mapping[str, Any]) -> bool:
    """Whether the weights of a token's experts are made to sum to 1, before they are scaled."""
    return bool(config.get("norm_topk_prob", True))


def missing_counts(config: Mapping[str, Any], keys: tuple[str, ...]) -> list[Problem]:
    """Keys that are no positive integers."""
    return [
        Problem(f"config.json: {key}", "a positive integer", repr(config.get(key, "nothing")))
        for key in keys
        if not isinstance(config.get(key), int) or config[key] <= 0
    ]


def other_values(config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> list[Problem]:
    """Keys that hold a value, or null, that is not among those which can be built. A missing key is none."""
    return [
        Problem(f"config.json: {key}", f"one of {', '.join(map(repr, values))}, or no such key", repr(config[key]))
        for key, values in only.items()
        if key in config and config[key] not in values
    ]


def other_names(config: Mapping[str, Any]) -> list[Problem]:
    """Further names of the number of experts, by which transformers would build another one."""
    experts = config.get("n_routed_experts")
    return [
        Problem(f"config.json: {key}", f"{experts}, as n_routed_experts, or no such key", repr(config[key]))
        for key in ("num_experts", "num_local_experts")
        if key in config and config[key] != experts
    ]


def first_dense_problems(config: Mapping[str, Any]) -> list[Problem]:
    """`first_k_dense_replace` if it is null."""
    if config.get("first_k_dense_replace", 0) is not None:
        return []
    return [Problem("config.json: first_k_dense_replace", "a number of layers", "None")]
