"""Fields of `train` that make a step faster or leaner and change no more than rounding, under megatron-core's names."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from configs.schema.base import StrictModel


class SpeedFields(StrictModel):
    """What runs beside the computation, and what of the optimizer is kept outside of the GPU."""

    overlap_grad_reduce: bool = False
    """Sum gradients over the data parallel processes while the backward pass of a step's last micro-batch is still
    running, a bucket of parameters at a time (40 million, or a million a process if that is more)."""
    overlap_param_gather: bool = False
    """Gather updated weights from the data parallel processes while the next step's forward pass is already running.
    Needs `overlap_grad_reduce` and `use_distributed_optimizer`."""
    optimizer_cpu_offload: bool = False
    """Keep main weights and moments in the host's memory, and update them there. Needs CUDA and
    `use_precision_aware_optimizer`; main weights are then whole in fp32, and so are moments."""
    optimizer_offload_fraction: float = Field(default=1.0, gt=0, le=1)
    """With `optimizer_cpu_offload`: the share of them, from 0 to 1; the rest stays on the GPU."""

    def speed_problems(self, *, use_distributed_optimizer: bool, lean_moments: Sequence[str] | None) -> list[str]:
        """Settings that have no meaning without another, or not beside it.

        Args:
            use_distributed_optimizer: The run's setting.
            lean_moments: With `use_precision_aware_optimizer`: the dtype fields of moments not fp32; else None.
        """
        problems = []
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            problems.append("overlap_param_gather needs overlap_grad_reduce")
        if self.overlap_param_gather and not use_distributed_optimizer:
            problems.append("overlap_param_gather needs use_distributed_optimizer")
        if self.optimizer_cpu_offload and lean_moments is None:
            problems.append("optimizer_cpu_offload needs use_precision_aware_optimizer")
        if self.optimizer_cpu_offload:
            problems += [f"{name}: bfloat16 can't be had with optimizer_cpu_offload" for name in lean_moments or ()]
        if self.optimizer_offload_fraction != 1 and not self.optimizer_cpu_offload:
            problems.append("optimizer_offload_fraction needs optimizer_cpu_offload")
        return problems
