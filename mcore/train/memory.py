"""An estimate of the memory that each process of a training run needs, before anything starts. No torch here.

Weights, gradients and optimizer are counted: they are what is allocated, to the byte where nothing is divided over data
parallel processes. Activations and the loss's temporaries are sums of what functions keep (`mcore.train.activations`).
What lies outside of tensors (CUDA's context, NCCL's buffers, holes in the allocator's blocks) is a line of its own,
assumed and not computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import ceil, lcm
from typing import Any

from configs.schema.run import RunConfig
from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.bridge.families import dims_of
from mcore.train.activations import LayerBytes, in_flight, kept_of_layers
from mcore.train.parameters import Parameter, layers_of_stages, parameters_of

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
ALIGNMENT, BUCKET = 64, 128
"""Numbers that each parameter's place in megatron-core's buffers, and the whole buffer, is a multiple of."""
FP8_BYTES = 2
"""Of each number of a matrix: Transformer Engine keeps its FP8 form from step to step, and that transposed."""
HOST_BYTES = 16
"""Of each parameter whose optimizer is in the host's memory: weight, gradient and two moments in fp32.

Source: megatron-core 0.16.1 `HybridDeviceOptimizer`, which keeps its copy of the gradients between steps."""
LOGIT_BYTES = 8
"""Of each logit of a chunk, at most at once: in bf16, its gradient, and one in fp32; or two in fp32."""
OUTSIDE_BYTES, HOLES = 1.0e9, 0.04
"""Assumed: CUDA's context and communication; and holes in the allocator's blocks, by the bytes in tensors.

On the H100 of docs/benchmarks/train_h100.md torch held 1 to 6 % more than tensors took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of a process of one pipeline stage, of the one that needs the most.

    Attributes:
        weights: `dtype * parameters`. With the distributed optimizer they lie in a buffer, padded as gradients are.
            With `fp8_format` 2 more for the layers' matrices, whether they learn or not.
        gradients: `main_grads_dtype * learning parameters`, padded: they are summed over micro-batches.
        main_weights: fp32 copies of bf16 weights, 4 each; 2 with `use_precision_aware_optimizer` (remainders).
        moments: `exp_avg_dtype + exp_avg_sq_dtype`. Main weights and moments are divided by DP x CP with the
            distributed optimizer, those of experts by their own data parallel size. With `optimizer_cpu_offload` main
            weights are 4, and so are fp32 copies of bf16 gradients, of what is not offloaded.
        activations: `tokens of a micro-batch * bytes a token of the layers * micro-batches at once`.
        loss: On the last stage: gradients of the hidden states (a * H * tokens) and of the output weight (fp32 and, in
            bf16, a copy: 6 * V * H), and a chunk's logits (8 * V * chunk); what is larger of this and of `layer`.
        layer: Elsewhere, and where nothing else needs more: gradients inside one layer's backward pass, and what
            recomputation makes again.
        communication: Whole sequences gathered for sequence parallelism; what stages send each other (2 * a * H).
        outside: Assumed: CUDA, NCCL, the allocator.
        host: Not of the device: with `optimizer_cpu_offload` 16 bytes of the host's memory for each parameter that is
            offloaded, as divided over processes as moments are.
    """

    weights: float
    gradients: float
    main_weights: float
    moments: float
    activations: float
    loss: float
    layer: float
    communication: float
    outside: float
    host: float

    @property
    def total(self) -> float:
        """All of it that is on the device."""
        return float(sum(getattr(self, name) for name in DEVICE_PARTS))

    @property
    def tensors(self) -> float:
        """What tensors take: what torch calls allocated."""
        return self.total - self.outside


DEVICE_PARTS = tuple(field.name for field in fields(StageMemory) if field.name != "host")
"""What the device holds."""


def estimate(run: RunConfig, hf_config: Mapping[str, Any], *, engine: bool, on_gpu: bool) -> list[StageMemory]:
    """Memory of a run's processes, by pipeline stage.

    Args:
        run: The run.
        hf_config: Its model's `config.json`.
        engine: Whether layers are Transformer Engine's.
        on_gpu: Whether it runs on GPUs.

    Raises:
        ConfigError: The model is not known, or its sizes can't be read.
    """
    return estimate_training(
        run.train,
        hf_config,
        num_processes=run.launch.num_processes,
        row_tokens=run.packing_length or run.data.max_length,
        longest=run.data.max_length,
        padded_vocab_size=_padded(dims_of(hf_config).vocab, run.convert.make_vocab_size_divisible_by),
        engine=engine,
        on_gpu=on_gpu,
    )


def estimate_training(
    config: TrainConfig,
    hf_config: Mapping[str, Any],
    *,
    num_processes: int,
    row_tokens: int,
    longest: int,
    padded_vocab_size: int,
    engine: bool,
    on_gpu: bool,
) -> list[StageMemory]:
    """Memory of processes by pipeline stage.

    Args:
        config: What is trained and how.
        hf_config: The model's `config.json`.
        num_processes: Of the whole run.
        row_tokens: Tokens of a row; a micro-batch has `micro_batch_size` rows.
        longest: Tokens of the longest sample.
        padded_vocab_size: Rows of the embedding.
        engine: Whether layers are Transformer Engine's.
        on_gpu: Whether it runs on GPUs; else nothing is assumed outside of tensors.

    Raises:
        ConfigError: The model is not known, or its sizes can't be read.
    """
    layout, dims = Layout.of(config), dims_of(hf_config)
    layers = LayerBytes.of(config, hf_config, engine=engine, on_gpu=on_gpu, longest=longest)
    data_parallel = num_processes // layout.model_parallel_size
    tokens = config.micro_batch_size * row_tokens / layout.context_parallel_size
    num_micro_batches = max(1, config.global_batch_size // (config.micro_batch_size * data_parallel))
    last = layout.pipeline_model_parallel_size - 1
    stages = []
    parameters = parameters_of(config, hf_config, padded_vocab_size=padded_vocab_size)
    for stage, numbers in enumerate(layers_of_stages(layout, dims.num_layers)):
        kept, again = kept_of_layers(layers, config, numbers)
        held = in_flight(layout, stage, num_micro_batches)
        if stage == last:
            kept += layers.final_norm()
        passing = 2 * layers.boundary() * held if last else 0.0
        gathered = layers.item * dims.hidden if layout.sequence_parallel else 0.0
        loss = _loss(config, layers, tokens, padded_vocab_size) if stage == last else 0.0
        in_layer = tokens * (again + layers.gradients(max(numbers, default=0)))
        static = _static(config, layout, parameters[stage], num_processes)
        host = static.pop("host")
        tensors = {
            **static,
            "activations": tokens * kept * held,
            "loss": loss if loss >= in_layer else 0.0,
            "layer": 0.0 if loss >= in_layer else in_layer,
            "communication": tokens * (passing + gathered),
        }
        outside = OUTSIDE_BYTES + HOLES * sum(tensors.values()) if on_gpu else 0.0
        stages.append(StageMemory(**tensors, outside=outside, host=host))
    return stages


def _static(
    config: TrainConfig, layout: Layout, parameters: Iterable[Parameter], num_processes: int
) -> dict[str, float]:
    """What is there from the first step to the last."""
    weight, gradient = ITEM_BYTES[config.torch_dtype], ITEM_BYTES[config.main_grads_dtype]
    moments = ITEM_BYTES[config.exp_avg_dtype] + ITEM_BYTES[config.exp_avg_sq_dtype]
    main = 0 if weight == 4 else 2 if config.use_precision_aware_optimizer else 4
    on_device, copied_gradient = 1.0, 0
    if config.optimizer_cpu_offload:
        main, on_device, copied_gradient = 4, 1 - config.optimizer_offload_fraction, 4 if gradient < 4 else 0
    parameters = list(parameters)
    pipeline = layout.pipeline_model_parallel_size
    copies = {
        False: num_processes // (layout.tensor_model_parallel_size * pipeline),
        True: num_processes // (layout.expert_tensor_size * layout.expert_model_parallel_size * pipeline),
    }
    frozen = sum(p.numel * p.count for p in parameters if not p.learns)
    found = {"weights": float(weight * frozen), "gradients": 0.0, "main_weights": 0.0, "moments": 0.0, "host": 0.0}
    if config.fp8_format is not None:
        found["weights"] += FP8_BYTES * sum(p.numel * p.count for p in parameters if p.is_matrix)
    for is_expert, divisor in copies.items():
        mine = [p for p in parameters if p.learns and p.is_expert == is_expert]
        numel = sum(p.numel * p.count for p in mine)
        held = numel
        if config.use_distributed_optimizer:
            padded = sum(_padded(p.numel, ALIGNMENT) * p.count for p in mine)
            numel, held = ceil(numel / divisor), _padded(padded, lcm(divisor, BUCKET))
        found["weights"] += weight * held
        found["gradients"] += gradient * held + copied_gradient * numel * on_device
        found["main_weights"] += main * numel * on_device
        found["moments"] += moments * numel * on_device
        found["host"] += HOST_BYTES * numel * (1 - on_device)
    return found


def _loss(config: TrainConfig, layers: LayerBytes, tokens: float, padded_vocab_size: int) -> float:
    rows, hidden = padded_vocab_size / layers.layout.tensor_model_parallel_size, layers.dims.hidden
    chunk = min(config.cross_entropy_chunk_tokens or tokens, tokens)
    of_weight = 4 + (layers.item if layers.item < 4 else 0) if config.tuner_type == "full" else 0
    return 2 * layers.item * hidden * tokens + of_weight * rows * hidden + LOGIT_BYTES * rows * chunk


def _padded(number: int, multiple: int) -> int:
    return ceil(number / multiple) * multiple
