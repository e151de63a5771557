"""Adam's moments and main weights, guarded on their way into a checkpoint and out of it.

megatron-core 0.16.1 keeps them in buffers of several buckets, each padded at its end. For a checkpoint it puts the
buckets together without that padding, but cuts parameters out where they lie with it: behind a bucket that is padded,
each gets its neighbour's numbers, and the last ones zeros. A tied embedding under pipeline parallelism has a bucket of
its own, and so has every part of the model whose gradients are reduced while others are computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from mcore.bridge.dist_files import DistTensor
from mcore.errors import CheckpointError, Problem, SavingError
from mcore.train.model import Training

MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def whole_state(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Have the optimizer's state for a checkpoint made rightly, and check that nothing of it is lost.

    Raises:
        SavingError: The numbers that megatron-core gathered are not those that the ranks hold.
    """
    lost: list[Problem] = []
    parts = [part for part in parts_of(optimizer) if isinstance(part, DistributedOptimizer)]
    parts = [part for part in parts if not part.is_stub_optimizer]
    unpadded = []
    for holder in (holder for part in parts for buffer in part.buffers for holder in (buffer, *buffer.buckets)):
        unpadded.append((holder, holder.numel_unpadded))
        # With its padding every bucket is where its parameters are looked for.
        holder.numel_unpadded = holder.numel if hasattr(holder, "numel") else holder.grad_data.numel()
    for part in parts:
        part.sharded_param_state_fully_reshardable = _checked(part, lost)
    try:
        yield
    finally:
        for part in parts:
            del part.sharded_param_state_fully_reshardable
        for holder, number in unpadded:
            holder.numel_unpadded = number
    # Once, as not all ranks need have as many parts.
    raise_on_all_ranks("megatron-core did not gather the optimizer's state rightly", lost)


def _checked(part: DistributedOptimizer, lost: list[Problem]) -> Any:
    gather = part.sharded_param_state_fully_reshardable

    def gathered(model: Mapping[str, Any], is_loading: bool = False, metadata: Mapping[str, Any] | None = None) -> Any:
        state = gather(model, is_loading, metadata)
        if not is_loading:
            lost.extend(_lost_numbers(part, state))
        return state

    return gathered


def _lost_numbers(part: DistributedOptimizer, state: Mapping[int, Mapping[str, Any]] | None) -> list[Problem]:
    """Compare the sums of all bit patterns, as whole numbers: any number that is lost or twice there changes them.

    All ranks that share the part call it.
    """
    names = ("param", *MOMENTS)
    held = [
        _sum_of_bits(part._get_main_param_and_optimizer_states(parameter)[name] for parameter in _parameters(part))
        for name in names
    ]
    sums = torch.tensor(held, dtype=torch.int64)
    dist.all_reduce(sums, group=part.data_parallel_group_gloo)
    if state is None:  # another rank gathered
        return []
    gathered = [_sum_of_bits(tensors[name].data for tensors in state.values()) for name in names]
    fix = "Nothing was saved; the last checkpoint is whole."
    return [
        Problem(f"optimizer.state.{name}", "the bits of all ranks", "others", fix)
        for name, ours, theirs in zip(names, gathered, sums.tolist(), strict=True)
        if ours != theirs
    ]


def _sum_of_bits(tensors: Iterator[Tensor]) -> int:
    bits = (tensor.detach().float().contiguous().view(torch.int32) for tensor in tensors)
    total = sum(int(numbers.sum(dtype=torch.int64)) for numbers in bits)
    return (total + 2**63) % 2**64 - 2**63


def refuse_other_moments(training: Training, folder: Path, stored: Mapping[str, DistTensor], *, updates: int) -> None:
    """Compare what the optimizer holds with what a checkpoint holds, number by number; all ranks call it.

    Args:
        training: With the checkpoint loaded.
        folder: The checkpoint.
        stored: Its tensors.
        updates: Steps that Adam has made.

    Raises:
        CheckpointError: The checkpoint does not hold the optimizer's state.
        SavingError: They differ in a moment, a main weight, or the number of steps; names all that do.
    """
    places, _ = extract_sharded_tensors_and_factories(training.sharded_weights())
    place_of = {id(place.data): place for place in nested_values(places)}
    problems = []
    for parameter, rows, state in chain.from_iterable(map(_held, parts_of(training.optimizer))):
        place = place_of[id(parameter)]
        step = state.pop("step", None)
        if step is not None and int(step) != updates:
            problems.append(Problem(f"optimizer.state.step.{place.key}", str(updates), str(int(step))))
        differences = (_difference(place, name, rows, tensor, stored) for name, tensor in state.items())
        problems += [difference for difference in differences if difference is not None]
    raise_on_all_ranks(f"the optimizer did not take what {folder} holds", problems)


def _difference(
    place: ShardedTensor | ShardedTensorFactory, name: str, rows: slice, found: Tensor, stored: Mapping[str, DistTensor]
) -> Problem | None:
    key = f"optimizer.state.{name}.{place.key}"
    what = dataclasses.replace(place, key=key)
    parts = what.build() if isinstance(what, ShardedTensorFactory) else [what]
    whole = dict_list_map_inplace(lambda part: _read(part, stored), parts)
    expected = what.merge_fn(whole) if isinstance(what, ShardedTensorFactory) else whole[0]
    numbers = expected.flatten()[rows]
    ours = found.detach().cpu().flatten().to(numbers.dtype)
    if numbers.shape == ours.shape and torch.equal(numbers, ours):
        return None
    same = int((numbers == ours).sum()) if numbers.shape == ours.shape else 0
    return Problem(key, f"{numbers.numel()} numbers as they were saved", f"{ours.numel()}, {same} of them the same")


def _read(part: ShardedTensor, stored: Mapping[str, DistTensor]) -> Tensor:
    tensor = stored.get(part.key)
    if tensor is None or tensor.shape != tuple(part.global_shape):
        found = "none" if tensor is None else str(tensor.shape)
        raise CheckpointError(
            "the optimizer's state does not fit", [Problem(part.key, str(tuple(part.global_shape)), found)]
        )
    sizes = (*(1,) * part.prepend_axis_num, *part.local_shape)
    return tensor.read_box(part.global_offset, sizes).reshape(part.local_shape)


def _held(part: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, slice, dict[str, Tensor]]]:
    """Each parameter of the model that this part updates here, its numbers that are here, and what is kept of them."""
    if part.is_stub_optimizer:
        return
    if isinstance(part, DistributedOptimizer):
        for parameter in _parameters(part):
            here = part._get_model_param_range_map(parameter)["param"]
            yield parameter, slice(here.start, here.end), dict(part._get_main_param_and_optimizer_states(parameter))
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        main = zip(chain(*part.float16_groups), chain(*part.fp32_from_float16_groups), strict=True)
        own = ((parameter, parameter) for parameter in chain(*part.fp32_from_fp32_groups))
        for parameter, weight in chain(main, own):
            kept = {} if weight is parameter else {"fp32_param": weight}
            yield parameter, slice(None), kept | part.optimizer.state[weight]
    else:
        for parameter in part.get_parameters():
            yield parameter, slice(None), dict(part.optimizer.state[parameter])


def _parameters(part: DistributedOptimizer) -> list[torch.nn.Parameter]:
    return list(part.model_param_group_index_map)


def parts_of(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that make up one: megatron-core has one of their own for experts in some layouts."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def raise_on_all_ranks(summary: str, problems: list[Problem]) -> None:
    """Raise a SavingError with what any rank found; all of them call it."""
    everywhere: list[list[Problem]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, problems)
    if found := list(dict.fromkeys(chain.from_iterable(everywhere))):
        raise SavingError(summary, found)
