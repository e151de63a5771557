"""How many parameters each process of a run holds, from its family's table of weights. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.bridge.dims import ModelDims
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.features import Features
from mcore.bridge.rules import DECODER, MTP_LAYER, Rule
from mcore.train.tuners.targets import choose_targets

ROWS_DIVIDED = (
    "word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_q_proj.weight",
    "linear_q_up_proj.weight",
    "linear_q_down_proj.weight",  # by torch's layers; Transformer Engine's are copies
    "linear_kv_down_proj.weight",
    "linear_kv_up_proj.weight",
    "linear_fc1.weight",
    "linear_fc1.bias",
    "core_attention.softmax_offset",
    "eh_proj.weight",
)
"""Ends of the names of parameters whose rows tensor parallel processes divide."""
COLUMNS_DIVIDED = ("linear_proj.weight", "linear_fc2.weight")
"""The same of columns. All other parameters are copies on every one of these processes."""
NO_PARAMETER = "router.expert_bias"
"""End of the name of a row that is a buffer: nothing learns it, and it is small."""
HEAD_NORMS = ("q_layernorm.weight", "k_layernorm.weight")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as one process has it, or several that are alike.

    Attributes:
        numel: Numbers in one of them.
        count: How many there are.
        learns: Whether the optimizer changes it.
        is_expert: Whether its copies are on the processes that have copies of the experts.
        is_matrix: Whether it is a matrix of a decoder layer that tokens are multiplied with: what FP8 is about.
    """

    numel: int
    count: int = 1
    learns: bool = True
    is_expert: bool = False
    is_matrix: bool = False


def layers_of_stages(layout: Layout, num_layers: int) -> list[list[int]]:
    """Numbers of the layers of each pipeline process, in the order in which it computes them."""
    pp, parts = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    ends = {0: layout.decoder_first_pipeline_num_layers, pp - 1: layout.decoder_last_pipeline_num_layers}
    given = {stage: layers for stage, layers in ends.items() if layers is not None}
    others = (num_layers - sum(given.values())) // max(1, pp - len(given))
    stages: list[list[int]] = [[] for _ in range(pp)]
    first = 0
    for _ in range(parts):
        for stage, layers in enumerate(stages):
            end = first + given.get(stage, others) // parts
            layers += range(first, end)
            first = end
    return stages


def parameters_of(
    config: TrainConfig, hf_config: Mapping[str, Any], *, padded_vocab_size: int
) -> list[list[Parameter]]:
    """Parameters of a process of each pipeline stage.

    Args:
        config: The run's `train` group.
        hf_config: The model's `config.json`.
        padded_vocab_size: Rows of the embedding in megatron-core.

    Raises:
        ConfigError: The model is not known, or its sizes can't be read.
    """
    layout = Layout.of(config)
    dims = dims_of(hf_config)
    stages = []
    for stage, layers in enumerate(layers_of_stages(layout, dims.num_layers)):
        own = list(_base(config, layout, hf_config, stage, layers, padded_vocab_size))
        if config.tuner_type == "lora":
            own += _adapters(config, layout, hf_config, stage, layers)
        stages.append(own)
    return stages


def _base(
    config: TrainConfig,
    layout: Layout,
    hf_config: Mapping[str, Any],
    stage: int,
    layers: list[int],
    padded_vocab_size: int,
) -> Iterator[Parameter]:
    family, dims = family_of_config(hf_config), dims_of(hf_config)
    features = family.features(hf_config)
    last = layout.pipeline_model_parallel_size - 1
    learns = config.tuner_type == "full"
    for rule in family.rules:
        if rule.mcore.endswith(NO_PARAMETER):
            continue
        if rule.per_layer:
            for layer in layers:
                if rule.applies(dims, layer):
                    yield _parameter(rule, dims, layout, features, learns)
        elif rule.per_mtp_layer:
            for layer in range(dims.num_layers, dims.num_layers + dims.num_mtp_layers):
                if stage == last and rule.applies(dims, layer):
                    yield _parameter(rule, dims, layout, features, learns=False)
        elif rule.applies(dims):
            rows = padded_vocab_size // layout.tensor_model_parallel_size * dims.hidden
            if rule.mcore == "embedding.word_embeddings.weight":
                # Where the stages differ, the last one has a copy for the output layer, or for further-token layers.
                if stage == 0 or (stage == last and (dims.tied or dims.num_mtp_layers)):
                    yield Parameter(rows, learns=learns)
            elif stage == last:
                is_vocabulary = rule.mcore == "output_layer.weight" and features.num_labels is None
                yield Parameter(rows if is_vocabulary else prod(rule.mcore_shape(dims)), learns=learns)


def _parameter(rule: Rule, dims: ModelDims, layout: Layout, features: Features, learns: bool) -> Parameter:
    name = rule.mcore.removeprefix(DECODER).removeprefix(MTP_LAYER)
    numel = prod(rule.mcore_shape(dims))
    is_divided = name.endswith(ROWS_DIVIDED + COLUMNS_DIVIDED)
    if features.qk_norm_over == "projection":
        is_divided |= name.endswith(HEAD_NORMS)
    is_matrix = rule.per_layer and name.endswith(ROWS_DIVIDED + COLUMNS_DIVIDED) and name.endswith(".weight")
    if not rule.per_expert:
        numel //= layout.tensor_model_parallel_size if is_divided else 1
        return Parameter(numel, learns=learns, is_matrix=is_matrix)
    size = layout.expert_tensor_size if is_divided else 1
    count = dims.size("experts") // layout.expert_model_parallel_size
    return Parameter(numel // size, count, learns, layout.divides_experts_differently, is_matrix)


def _adapters(
    config: TrainConfig, layout: Layout, hf_config: Mapping[str, Any], stage: int, layers: list[int]
) -> Iterator[Parameter]:
    """A and B of every adapter: the factor on the divided side of its module is divided, the other is a copy."""
    dims = dims_of(hf_config)
    for target in choose_targets(config.target_modules, hf_config):
        if target.layer not in layers and not (target.layer is None and stage == 0):
            continue
        is_expert = target.expert is not None
        if target.expert is not None and target.expert >= dims.size("experts") // layout.expert_model_parallel_size:
            continue
        size = layout.expert_tensor_size if is_expert else layout.tensor_model_parallel_size
        rows, columns = target.rule.hf_shapes(dims)[target.part]
        name = target.rule.mcore
        rows //= size if name.endswith(ROWS_DIVIDED) else 1
        columns //= size if name.endswith(COLUMNS_DIVIDED) else 1
        differs = is_expert and layout.divides_experts_differently
        yield Parameter(config.lora_rank * columns, is_expert=differs)
        yield Parameter(rows * config.lora_rank, is_expert=differs)
