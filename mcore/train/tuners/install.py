"""A model with its weights frozen and adapters put on: what training with `tuner_type: lora` changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore.bridge.dims import ModelDims
from mcore.bridge.families import dims_of
from mcore.errors import ConfigError, Problem
from mcore.train.tuners.layers import Linear, linear_of, weights_of_experts
from mcore.train.tuners.lora import (
    ColumnAdapter,
    EmbeddingAdapter,
    ExpertsAdapter,
    LinearAdapter,
    RouterAdapter,
    RowAdapter,
)
from mcore.train.tuners.options import LoraOptions, read_adapter
from mcore.train.tuners.pair import Pair, Share, tensor_share
from mcore.train.tuners.targets import EXPERTS, Target, choose_targets
from mcore.train.tuners.whole import choose_whole
from mcore.train.tuners.whole_parameters import WholeParameter, release_whole

LayerAdapter = LinearAdapter | RouterAdapter | EmbeddingAdapter
Weighted = tuple[Tensor, LayerAdapter]
"""A frozen weight and its adapter."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """All adapters of a model on this rank.

    Attributes:
        adapters: Each with the frozen weight that it belongs to.
        targets: The modules of the whole model that have one, on whatever rank.
        whole: What of this rank learns whole beside them.
        vocab_size: Rows of the embedding, without padding.
    """

    adapters: tuple[Weighted, ...]
    targets: tuple[Target, ...]
    whole: tuple[WholeParameter, ...]
    vocab_size: int

    @property
    def pairs(self) -> Iterator[Pair]:
        """This rank's pairs of matrices."""
        for _, adapter in self.adapters:
            yield from adapter.pairs

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        """This rank's parts of all that learns, by the names that an adapter file has for them."""
        of_pairs = {key: tensor for pair in self.pairs for key, tensor in pair.sharded().items()}
        return of_pairs | {own.key: own.sharded() for own in self.whole}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what learns on this rank by name, over all tensor parallel ranks."""
        of_pairs = {key: pair.shapes[letter] for pair in self.pairs for key, letter, _ in pair.matrices()}
        return of_pairs | {own.key: own.shape for own in self.whole}

    @torch.no_grad()
    def start_from(self, folder: Path, options: LoraOptions) -> None:
        """Take this rank's parts out of a PEFT adapter; all ranks call it. Raises as `read_adapter`."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self.shapes())
        wanted = {key: shape for of_rank in gathered for key, shape in of_rank.items()}
        tensors = read_adapter(folder, options, wanted, vocab_size=self.vocab_size)
        for pair in self.pairs:
            pair.fill(*(tensors[key] for key, _, _ in pair.matrices()))
        for own in self.whole:
            own.fill(tensors[own.key])

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's parts, by name."""
        for pair in self.pairs:
            for key, _, parameter in pair.matrices():
                parameter.copy_(state[key])
        for own in self.whole:
            own.parameter.copy_(state[own.key])

    @torch.no_grad()
    def merge(self, dtype_of: Callable[[str], torch.dtype]) -> None:
        """Add all adapters to the weights, rounded once, and let them add nothing any more. For proofs only.

        Args:
            dtype_of: What the weight of a Hugging Face name is rounded to.
        """
        for own in self.whole:
            own.parameter.copy_(own.parameter.to(dtype_of(own.key)))
        for weight, adapter in self.adapters:
            dtype = dtype_of(f"{adapter.pairs[0].target.hf_module}.weight")
            weight.copy_((weight.double() + adapter.delta()).to(dtype))
            for pair in adapter.pairs:
                pair.lora_B.zero_()


def install_adapters(
    modules: Sequence[GPTModel], hf_config: Mapping[str, Any], options: LoraOptions, *, seed: int
) -> Adapters:
    """Freeze a model's weights and put adapters on it; all ranks call it, once the weights are loaded.

    Layers for further tokens (MTP) get none: transformers does not know them.

    Args:
        modules: This rank's parts of the model: one, or one a virtual pipeline stage. No norm is part of a linear layer
            (`build_model` with `norms_apart`).
        hf_config: Its `config.json`.
        options: What adapters, on which modules, and which modules learn whole.
        seed: The run's.

    Raises:
        ConfigError: Some modules can't have adapters, or not in this layout. Lists all of them.
    """
    targets = choose_targets(options.target_modules, hf_config)
    steps = choose_whole(options.modules_to_save, hf_config, targets)
    dims = dims_of(hf_config)
    adapters: list[Weighted] = []
    whole: list[WholeParameter] = []
    problems: list[Problem] = []
    for module in modules:
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        own = release_whole(module, steps)
        whole += own
        before = len(adapters) + len(problems)
        for _, group in groupby(targets, key=lambda target: target.mcore_module):
            for found in _put_on(module, list(group), dims, options, seed):
                if isinstance(found, Problem):
                    problems.append(found)
                else:
                    adapters.append(found)
        if not own and len(adapters) + len(problems) == before:
            text = "modules on every pipeline stage"
            problems.append(Problem("train.target_modules", text, f"none on one of rank {dist.get_rank()}"))
    _raise_on_all_ranks(problems)
    for module in modules:
        if module.pre_process and module.config.recompute_granularity is not None:
            # What is recomputed only has gradients if its input has one, and in front of the first one nothing learns.
            module.embedding.register_forward_hook(lambda layer, inputs, output: output.requires_grad_())
    return Adapters(tuple(adapters), targets, tuple(whole), dims.vocab)


def _put_on(
    module: GPTModel, targets: Sequence[Target], dims: ModelDims, options: LoraOptions, seed: int
) -> Iterator[Weighted | Problem]:
    """Put adapters on megatron's layers of one name: one layer, or one of each expert, or one of all experts."""
    parent = _parent(module, targets[0])
    if parent is None:
        return
    if targets[0].expert is None:
        path = targets[0].mcore_module.removeprefix(f"decoder.layers.{targets[0].layer}.")
        yield _put_on_layer(parent.get_submodule(path), targets, dims, options, seed)
        return
    path = f".{targets[0].mcore_module}".partition(EXPERTS)[2]
    first = parent.ep_group.rank() * parent.num_local_experts
    by_expert = {number: list(group) for number, group in groupby(targets, key=lambda target: target.expert)}
    mine = [by_expert.get(first + number, []) for number in range(parent.num_local_experts)]
    if hasattr(parent, "local_experts"):
        for number, of_expert in enumerate(mine):
            if of_expert:
                layer = parent.local_experts[number].get_submodule(path)
                yield _put_on_layer(layer, of_expert, dims, options, seed)
        return
    layer, adapters = parent.get_submodule(path), []
    for name, of_expert in zip(weights_of_experts(layer), mine, strict=True):
        linear = linear_of(layer, inside_expert=True, weight=name)
        assert linear is not None, "a layer of all experts is a linear one"
        adapter = _linear_adapter(linear, of_expert, dims, options, seed) if of_expert else None
        if isinstance(adapter, Problem):
            yield adapter
            return
        adapters.append(adapter)
        if adapter is not None:
            yield linear.weight, adapter
    if any(adapter is not None for adapter in adapters):
        ExpertsAdapter(layer, adapters)


def _parent(module: GPTModel, target: Target) -> Any:
    """What megatron's layers of a target are in, if this rank has it: the model, a decoder layer, or all experts."""
    if target.layer is None:
        return module if module.pre_process else None
    for layer in module.decoder.layers:
        if layer.layer_number - 1 == target.layer:
            return layer if target.expert is None else layer.mlp.experts
    return None


def _put_on_layer(
    layer: Any, targets: Sequence[Target], dims: ModelDims, options: LoraOptions, seed: int
) -> Weighted | Problem:
    first = targets[0]
    rows, columns = first.rule.mcore_shape(dims)
    common = _common(options)
    if first.kind == "embedding":
        mine = tensor_share(1, of_expert=False)
        padded = layer.weight.shape[0] * mine.size
        pair = _pair(first, layer.weight, (padded, columns), (mine, Share(0)), options, seed)
        return layer.weight, EmbeddingAdapter(layer, [pair], **common)
    if first.kind == "router":
        pair = _pair(first, layer.weight, (columns, rows), (Share(1), Share(0)), options, seed)
        return layer.weight, RouterAdapter(layer, [pair], **common)
    linear = linear_of(layer, inside_expert=first.expert is not None)
    if linear is None:
        name = f"train.target_modules: {first.mcore_module}"
        text = "a linear layer that tensor parallel ranks divide"
        return Problem(name, text, type(layer).__name__, "Set train.backend: torch.")
    adapter = _linear_adapter(linear, targets, dims, options, seed)
    if isinstance(adapter, Problem):
        return adapter
    adapter.put_on(layer)
    return linear.weight, adapter


def _linear_adapter(
    linear: Linear, targets: Sequence[Target], dims: ModelDims, options: LoraOptions, seed: int
) -> LinearAdapter | Problem:
    first = targets[0]
    rows, columns = first.rule.mcore_shape(dims)
    mine = tensor_share(0, of_expert=linear.inside_expert)
    if linear.division == "row":
        shares = (Share(1, mine.rank, mine.size), Share(0))
        pair = _pair(first, linear.weight, (columns, rows), shares, options, seed)
        return RowAdapter(linear, [pair], **_common(options))
    hf_shapes = first.rule.hf_shapes(dims)
    pairs, places = [], []
    for target in targets:
        own = _own_rows(target, rows, dims, mine)
        num_rows = hf_shapes[target.part][0]
        if own is None or len(own) * mine.size != num_rows:
            name = f"train.target_modules: {target.hf_module}"
            return Problem(name, "rows that lie together on every tensor parallel rank", "rows that don't")
        pairs.append(_pair(target, linear.weight, (columns, num_rows), (Share(1), mine), options, seed))
        places.append(own)
    return ColumnAdapter(linear, pairs, places, **_common(options))


def _pair(
    target: Target, like: Tensor, sizes: tuple[int, int], shares: tuple[Share, Share], options: LoraOptions, seed: int
) -> Pair:
    """The matrices of a module with so many inputs and outputs, A and B divided as `shares` say."""
    return Pair(
        target,
        rank=options.lora_rank,
        in_size=sizes[0],
        out_size=sizes[1],
        share_a=shares[0],
        share_b=shares[1],
        like=like,
        seed=seed,
    )


def _common(options: LoraOptions) -> dict[str, float]:
    return {"scale": options.scale, "dropout": options.lora_dropout}


def _own_rows(target: Target, num_rows: int, dims: ModelDims, share: Share) -> Tensor | None:
    """Rows of this rank's part of a weight that a Hugging Face module's rows are, in that module's order.

    None if its rows on this rank are not the share of them that the adapter's file is divided by.
    """
    blocks = 2 if target.rule.mcore.endswith("linear_fc1.weight") else 1  # gate's rows and up's are divided each
    width = num_rows // blocks // share.size
    found: list[tuple[int, int]] = []
    for block in range(blocks):
        first = block * (num_rows // blocks) + share.rank * width
        for run in target.rule.runs_within(first, first + width, dims):
            if run.part == target.part:
                own = run.mcore_row - first + block * width
                found += [(run.hf_row + number * run.hf_step, own + number) for number in range(run.num_rows)]
    found.sort()
    hf_rows = [hf_row for hf_row, _ in found]
    together = hf_rows == list(range(share.rank * len(found), (share.rank + 1) * len(found)))
    return torch.tensor([own for _, own in found]) if together else None


def _raise_on_all_ranks(problems: Sequence[Problem]) -> None:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(problems))
    if everything := list(dict.fromkeys(problem for of_rank in gathered for problem in of_rank)):
        raise ConfigError("these modules can't have adapters in this layout", everything)
