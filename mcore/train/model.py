"""A model made ready to learn: megatron-core's model, data parallel wrapper, optimizer and scheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.specs import Backend, resolve_backend
from mcore.bridge.families import dims_of, family_of_config
from mcore.errors import Problem
from mcore.train import adam, fp8_state, offload
from mcore.train.base import Base
from mcore.train.expert_options import expert_arguments
from mcore.train.fp8_options import fp8_arguments
from mcore.train.overlap import Gathering, OverlappingDataParallel, overlap
from mcore.train.schedule import Schedule, lr_scheduler
from mcore.train.tuners.install import Adapters, install_adapters
from mcore.train.tuners.options import LoraOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Training:
    """Everything that a step changes.

    Attributes:
        modules: megatron-core's bare models, this rank's parts: one, or one a virtual pipeline stage.
        chunks: The same, wrapped for training.
        optimizer: Its optimizer.
        scheduler: Writes learning rates into the optimizer.
        gathering: Whether updated weights are gathered beside the forward pass.
        adapters: What learns, with `tuner_type: lora`; None if all of the model does.
    """

    modules: Sequence[GPTModel]
    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    gathering: Gathering
    adapters: Adapters | None = None

    def sharded_weights(self) -> dict[str, Any]:
        """This rank's parts of what learns, as checkpoints hold it."""
        holders = self._holders()
        with fp8_state.nothing_pickled(self.modules):
            states = [holder.sharded_state_dict() for holder in holders]
        if self.adapters is None:
            for state, module in zip(states, self.modules, strict=True):
                fp8_state.add_scales(state, module)
        # Parts are told apart in this process only: in a checkpoint each layer has its own place.
        return states[0] if len(states) == 1 else {f"stage_{number}": state for number, state in enumerate(states)}

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Take this rank's parts, by the keys of `sharded_weights`."""
        holders = self._holders()
        for number, holder in enumerate(holders):
            own = state if len(holders) == 1 else state[f"stage_{number}"]
            holder.load_state_dict(own if self.adapters is not None else fp8_state.take_scales(own, holder))

    def _holders(self) -> Sequence[Any]:
        return self.modules if self.adapters is None else [self.adapters]


def engine_problems(config: TrainConfig, backend: Backend) -> list[Problem]:
    """Everything that a run asks of Transformer Engine where it can't have it."""
    problems = []
    if config.gradient_accumulation_fusion and backend == "torch":
        problems.append(
            Problem(
                "train.gradient_accumulation_fusion",
                "backend transformer_engine",
                "backend torch",
                "Leave it null: it is used where it can be.",
            )
        )
    if resolve_backend("auto") == "torch":
        asked = ("use_precision_aware_optimizer", "optimizer_cpu_offload")
        problems += [
            Problem(f"train.{name}", "Transformer Engine and CUDA", "not both")
            for name in asked
            if getattr(config, name)
        ]
    return problems


def build_training(
    config: TrainConfig,
    schedule: Schedule,
    base: Base,
    layout: Layout,
    *,
    has_weights: bool,
) -> Training:
    """Model, optimizer and scheduler of a run on this rank.

    Args:
        config: The run's `train` group.
        schedule: Its resolved length and warm-up.
        base: What the run starts from.
        layout: How the model is divided.
        has_weights: Whether the base's weights are loaded; if not, a checkpoint of the run must be, afterwards.

    Raises:
        ConfigError: The model can't be built or divided this way.
        InputError, CheckpointError: The base does not hold the model.
    """
    dtype = DTYPES[config.torch_dtype]
    backend = resolve_backend(config.backend, family_of_config(base.hf_config).features(base.hf_config))
    fusion = config.gradient_accumulation_fusion
    has_experts = any(dims_of(base.hf_config).moe_layers)
    num_parts = layout.virtual_pipeline_model_parallel_size
    modules = [
        build_model(
            base.hf_config,
            padded_vocab_size=base.padded_vocab_size,
            layout=layout,
            params_dtype=dtype,
            backend=backend,
            recompute_granularity=config.recompute_granularity,
            recompute_method=config.recompute_method,
            recompute_num_layers=config.recompute_num_layers,
            gradient_accumulation_fusion=backend == "transformer_engine" if fusion is None else fusion,
            norms_apart=config.tuner_type == "lora",
            training={"calculate_per_token_loss": True, "recompute_modules": list(config.recompute_modules)}
            | (expert_arguments(config) if has_experts else {})
            | fp8_arguments(config),
            vp_stage=None if num_parts is None else part,
        )
        for part in range(num_parts or 1)
    ]
    wrapped = [module if dtype == torch.float32 else Float16Module(module.config, module) for module in modules]
    is_lora = config.tuner_type == "lora"
    if has_weights or is_lora:  # checkpoints of adapters hold nothing of the base
        # Only now: the wrapper rounds buffers, and routers have one that stays in fp32.
        base.fill(modules)
    adapters = None
    if is_lora:
        options = LoraOptions.of(config)
        adapters = install_adapters(modules, base.hf_config, options, seed=config.seed)
        if has_weights and config.adapter_load:
            adapters.start_from(Path(config.adapter_load), options)
    chunks = [
        OverlappingDataParallel(
            module.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=config.main_grads_dtype == "float32",
                use_distributed_optimizer=config.use_distributed_optimizer,
                overlap_grad_reduce=config.overlap_grad_reduce,
                overlap_param_gather=config.overlap_param_gather,
            ),
            whole,
            # Of several virtual stages the others' communication is beside the first one's computation as it is.
            disable_bucketing=config.overlap_grad_reduce and part > 0,
        )
        for part, (module, whole) in enumerate(zip(modules, wrapped, strict=True))
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            # Off means never: the norm is wanted for the record all the same.
            clip_grad=config.clip_grad or math.inf,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            use_distributed_optimizer=config.use_distributed_optimizer,
            overlap_param_gather=config.overlap_param_gather,
            use_precision_aware_optimizer=config.use_precision_aware_optimizer,
            main_grads_dtype=DTYPES[config.main_grads_dtype],
            exp_avg_dtype=DTYPES[config.exp_avg_dtype],
            exp_avg_sq_dtype=DTYPES[config.exp_avg_sq_dtype],
            optimizer_cpu_offload=config.optimizer_cpu_offload,
            optimizer_offload_fraction=config.optimizer_offload_fraction,
        ),
        chunks,
    )
    adam.fuse(optimizer)
    adam.keep_main_weights_whole(optimizer)
    offload.prime(optimizer)
    if config.overlap_grad_reduce:
        overlap(modules, chunks)
    else:
        for module in modules:
            module.config.finalize_model_grads_func = finalize_model_grads
    return Training(modules, chunks, optimizer, lr_scheduler(config, schedule, optimizer), Gathering(chunks), adapters)
