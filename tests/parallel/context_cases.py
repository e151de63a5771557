"""Runs under torchrun: attention whose samples four ranks share, against the same on each rank alone.

context_cases.py

S tokens of this rank, T tokens of the row, N heads, G groups, D head size
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mcore.backend.attention import SDPAttention
from mcore.backend.context import places_of_rank
from mcore.backend.layout import Layout
from mcore.backend.packed import PackedSamples
from mcore.backend.parallel import parallel_processes

SIZE = 4
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"softmax_scale": 0.3},
    "window of one chunk's size": {"windows": (5,)},
    "window within a chunk": {"windows": (2,)},
    "window over chunks": {"windows": (13,)},
    "window beyond": {"windows": (500,)},
    "capped": {"softcap": 0.8},
    "capped, window": {"softcap": 0.8, "windows": (7,)},
    "sinks": {"sinks": True},
    "sinks, window": {"sinks": True, "windows": (7,)},
}
ROWS = {"padded": None, "packed": (8, 24, 8, 40), "packed alone": (40,)}


def attention(*, sinks: bool = False, group: Any = None, **options: Any) -> SDPAttention:
    config = SimpleNamespace(
        attention_dropout=0.0,
        softmax_type="learnable" if sinks else "vanilla",
        num_attention_heads=6,
        params_dtype=torch.float32,
    )
    layer = SDPAttention(config, pg_collection=group, **options)
    if sinks:
        with torch.no_grad():
            layer.softmax_offset.copy_(torch.linspace(-2, 3, 6))
    return layer


def tensors(lengths: tuple[int, ...] | None) -> list[Tensor]:
    """Query, key, value of a row, whose heads of values are narrower, as with latents."""
    shape = (40, 2) if lengths is None else (sum(lengths),)
    return [torch.randn(*shape, *heads) for heads in ((6, 16), (2, 16), (2, 12))]


def check(kind: dict[str, Any], lengths: tuple[int, ...] | None, group: ProcessGroupCollection) -> None:
    torch.manual_seed(1)  # the same on all ranks
    whole = tensors(lengths)
    places_S = places_of_rank(lengths or (40,), SIZE, dist.get_rank())
    samples = None if lengths is None else PackedSamples.of(lengths, torch.device("cpu"))
    alone, shared = attention(**kind), attention(group=group, **kind)

    inputs = [x.clone().requires_grad_() for x in whole]
    expected = alone(*inputs, None, packed_seq_params=samples)
    direction = torch.randn_like(expected)
    (expected * direction).sum().backward()
    parts = [x[places_S].clone().requires_grad_() for x in whole]
    found = shared(*parts, None, packed_seq_params=samples)
    (found * direction[places_S]).sum().backward()

    torch.testing.assert_close(found, expected[places_S], atol=1e-6, rtol=1e-5)
    for part, of_all in zip(parts, inputs, strict=True):
        torch.testing.assert_close(part.grad, of_all.grad[places_S], atol=2e-6, rtol=1e-4)
    if shared.softmax_offset is not None:
        total = shared.softmax_offset.grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, alone.softmax_offset.grad, atol=1e-5, rtol=1e-4)


def check_that_nothing_later_is_seen(kind: dict[str, Any], group: ProcessGroupCollection) -> None:
    """Each token's output is the same to the bit whatever comes behind it, for every place of a sample."""
    torch.manual_seed(2)
    query, key, value = tensors(None)
    places_S = places_of_rank((len(key),), SIZE, dist.get_rank())
    layer = attention(group=group, **kind)
    before = layer(query[places_S], key[places_S], value[places_S], None)
    for place in range(1, len(key)):
        other_key, other_value = key.clone(), value.clone()
        other_key[place:] += 3 * torch.randn_like(key[place:])
        other_value[place:] += 3 * torch.randn_like(value[place:])
        after = layer(query[places_S], other_key[places_S], other_value[places_S], None)
        is_before_S = places_S < place
        assert torch.equal(after[is_before_S], before[is_before_S]), place
        assert (after[~is_before_S] - before[~is_before_S]).abs().amax(dim=(1, 2)).gt(1e-3).all(), place


def main() -> None:
    with parallel_processes(Layout(context_parallel_size=SIZE)):
        group = ProcessGroupCollection.use_mpu_process_groups(["cp"])
        for name, kind in KINDS.items():
            for row, lengths in ROWS.items():
                try:
                    check(kind, lengths, group)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {row}") from error
            check_that_nothing_later_is_seen(kind, group)
        if dist.get_rank() == 0:
            print(f"checked {len(KINDS)} kinds")


if __name__ == "__main__":
    main()
