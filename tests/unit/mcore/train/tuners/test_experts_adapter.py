"""Adapters on a layer that multiplies all experts at once: what the same adapters add on each expert by itself.

The layer here has the shape of Transformer Engine's (a weight for each expert, tokens in their order) and is torch's
own arithmetic; on that layer itself they are in `tests/gpu/test_lora_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.train.tuners.layers import Linear
from mcore.train.tuners.lora import ColumnAdapter, ExpertsAdapter, LinearAdapter, RowAdapter
from mcore.train.tuners.pair import Pair, Share
from mcore.train.tuners.targets import choose_targets
from tests.tiny_models import tiny_hf_model

COUNTS = (5, 0, 7, 2)
"""Tokens of each expert; the second one has none, and the third no adapter."""


class Experts(torch.nn.Module):
    """`[T, H]` to `[T, O]`, each expert its own tokens."""

    def __init__(self, num_experts: int, out_size: int, in_size: int) -> None:
        super().__init__()
        for number in range(num_experts):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.randn(out_size, in_size)))

    def forward(self, tokens_TH: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, None]:
        parts = tokens_TH.split(list(counts))
        return torch.cat([F.linear(part, getattr(self, f"weight{n}")) for n, part in enumerate(parts)]), None


def test_each_expert_gets_what_its_own_adapter_adds() -> None:
    targets = [
        target for target in choose_targets(("experts.linear_fc1", "experts.linear_fc2"), tiny_hf_model("qwen3_moe")[1])
        if target.layer == 0
    ]  # fmt: skip
    torch.manual_seed(0)
    with parallel_processes(Layout()):
        for is_gated, width in ((True, 2), (False, 1)):
            layer = Experts(4, 6 * width, 8)
            group = parallel_state.get_expert_tensor_parallel_group()
            adapters: list[LinearAdapter | None] = []
            for number in range(4):
                weight = getattr(layer, f"weight{number}")
                linear = Linear(weight, "column" if is_gated else "row", group, False, True)
                pairs = [
                    Pair(target, rank=2, in_size=8, out_size=6, share_a=Share(1), share_b=Share(0), like=weight, seed=1)
                    for target in targets
                    if target.expert == number and target.mcore_module.endswith("linear_fc1") == is_gated
                ]
                assert len(pairs) == width
                for pair in pairs:
                    torch.nn.init.normal_(pair.lora_B)
                rows = [torch.arange(6) + 6 * part for part in range(width)]
                options = {"scale": 0.5, "dropout": 0.0}
                if is_gated:
                    made: LinearAdapter = ColumnAdapter(linear, pairs, rows, **options)
                else:
                    made = RowAdapter(linear, pairs, **options)
                adapters.append(None if number == 2 else made)
            ExpertsAdapter(layer, adapters)
            tokens_TH = torch.randn(sum(COUNTS), 8)
            found, _ = layer(tokens_TH, COUNTS)
            parts = []
            for number, part in enumerate(tokens_TH.split(COUNTS)):
                whole = getattr(layer, f"weight{number}").detach().double()
                if (adapter := adapters[number]) is not None:
                    whole = whole + torch.cat([0.5 * (p.lora_B.double() @ p.lora_A.double()) for p in adapter.pairs])
                    torch.testing.assert_close(adapter.delta(), whole - getattr(layer, f"weight{number}").double())
                parts.append(part.double() @ whole.T)
            torch.testing.assert_close(found.double(), torch.cat(parts), atol=1e-5, rtol=1e-5)
            found.square().sum().backward()
            learns = {name for name, parameter in layer.named_parameters() if ".lora_" in name}
            assert len(learns) == 3 * 2 * width
            for number, adapter in enumerate(adapters):
                for pair in adapter.pairs if adapter is not None else ():
                    assert bool(pair.lora_B.grad.any()) == (COUNTS[number] > 0)
