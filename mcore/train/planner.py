"""Layouts of a training run on GPUs of one host, ranked by the step time that is predicted for them. No torch here.

What a layout needs of memory is `mcore.train.memory`'s estimate. The time is a sum of simple terms, each computed from
sizes and a speed of the machine, and nothing overlaps: docs/planner.md has the formulas and what they leave out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from pydantic import ValidationError

from configs.schema.run import layout_problems
from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.bridge.dims import ModelDims
from mcore.bridge.families import dims_of
from mcore.train.flops import ModelFlops, active_experts
from mcore.train.memory import ITEM_BYTES, StageMemory, estimate_training
from mcore.train.parameters import parameters_of

GIB = 2**30
MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTE: tuple[Mapping[str, Any], ...] = (
    {"recompute_granularity": "none", "recompute_method": None, "recompute_num_layers": None},
    {"recompute_granularity": "selective", "recompute_method": None, "recompute_num_layers": None},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """GPUs of one host, each linked to every other at full speed.

    Attributes:
        num_gpus: How many.
        memory_gib: Of each.
        peak_flops: bf16 products a second, each.
        mfu: Share of them that a GPU by itself reaches. 0.44 was measured on an H100 at 3B and at 7B
            (docs/benchmarks/train_h100.md).
        link_bytes_per_s: That a GPU sends while it receives as many. NVLink of an H200 has 450e9; assumed: 70 % of it.
        memory_bytes_per_s: Of each GPU's memory. 4.8e12 of an H200; assumed: 70 % of it.
    """

    num_gpus: int
    memory_gib: float = 141.0
    peak_flops: float = 989e12
    mfu: float = 0.44
    link_bytes_per_s: float = 0.7 * 450e9
    memory_bytes_per_s: float = 0.7 * 4.8e12


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step of the process that is waited for, by what they go to.

    Attributes:
        compute: Model FLOPs at the machine's MFU, and what is computed again.
        bubble: Waiting for other pipeline stages, and for the last one, which has the output layer.
        tensor: Gathers and sums of sequence and tensor parallelism.
        context: Gathers of keys and values, and sums of their gradients.
        expert: Tokens to their experts and back.
        pipeline: Hidden states and their gradients between stages.
        data: Sums of gradients and gathers of weights over data parallel processes.
        optimizer: Reading and writing weights, gradients and moments.
    """

    compute: float
    bubble: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that the model, the batch and the machine allow.

    Attributes:
        config: The run's `train` with this layout.
        stages: Memory of a process of each pipeline stage.
        time: Of a step.
        mfu: Model FLOPs utilisation that follows.
        tokens_per_s: Of all GPUs.
    """

    config: TrainConfig
    stages: list[StageMemory]
    time: StepTime
    mfu: float
    tokens_per_s: float

    @property
    def memory_gib(self) -> float:
        """Of the process that needs the most."""
        return max(stage.total for stage in self.stages) / GIB


def rank_layouts(
    config: TrainConfig,
    hf_config: Mapping[str, Any],
    machine: Machine,
    *,
    row_tokens: int,
    padded_vocab_size: int,
    top: int | None = None,
) -> list[Candidate]:
    """Layouts whose memory fits, the fastest first.

    Args:
        config: The run's `train`. Its batch, precision and tuner stay, layout, micro-batch and recomputation are tried.
        hf_config: The model's `config.json`.
        machine: Where it is to run.
        row_tokens: Tokens of a row, all of which are taken to be trained.
        padded_vocab_size: Rows of the embedding.
        top: How many; all if None.

    Raises:
        ConfigError: The model is not known, or its sizes can't be read.
    """
    timed = []
    traffic: dict[Layout, tuple[float, float]] = {}
    for tried in _configs(config, hf_config, machine.num_gpus, row_tokens, padded_vocab_size):
        layout = Layout.of(tried)
        if layout not in traffic:
            traffic[layout] = _data_and_optimizer(tried, hf_config, machine, padded_vocab_size)
        timed.append((step_time(tried, hf_config, machine, row_tokens, traffic[layout]), tried))
    timed.sort(key=lambda pair: (pair[0].total, pair[1].micro_batch_size))
    found: list[Candidate] = []
    for time, tried in timed:
        if top is not None and len(found) == top:
            break
        stages = estimate_training(
            tried, hf_config, num_processes=machine.num_gpus, row_tokens=row_tokens, longest=row_tokens,
            padded_vocab_size=padded_vocab_size, engine=True, on_gpu=True,
        )  # fmt: skip
        if max(stage.total for stage in stages) <= machine.memory_gib * GIB:
            found.append(_candidate(tried, hf_config, machine, row_tokens, stages, time))
    return found


def _configs(
    config: TrainConfig, hf_config: Mapping[str, Any], num_gpus: int, row_tokens: int, padded_vocab_size: int
) -> Iterator[TrainConfig]:
    """What the run model, the model and the number of processes allow."""
    sizes = [size for size in range(1, num_gpus + 1) if num_gpus % size == 0]
    has_experts = any(dims_of(hf_config).moe_layers)
    given = config.model_dump()
    for tp, pp, cp, ep, parts, rows, recompute in product(
        sizes, sizes, sizes, sizes if has_experts else [1], (None, 2), MICRO_BATCHES, RECOMPUTE
    ):
        if tp * pp * cp > num_gpus or (parts and pp == 1):
            continue
        changes = {
            "tensor_model_parallel_size": tp, "sequence_parallel": tp > 1, "pipeline_model_parallel_size": pp,
            "virtual_pipeline_model_parallel_size": parts, "context_parallel_size": cp,
            "expert_model_parallel_size": ep, "micro_batch_size": rows,
            "decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None,
        }  # fmt: skip
        try:
            tried = TrainConfig.model_validate(given | changes | recompute)
        except ValidationError:
            continue
        layout = Layout.of(tried)
        batch = layout_problems(
            num_gpus, layout.model_parallel_size, rows, tried.global_batch_size,
            expert_parallel_size=layout.expert_parallel_size, interleaved_stages=pp if parts else 1,
        )  # fmt: skip
        problems = layout.problems(hf_config, padded_vocab_size=padded_vocab_size, seq_length=row_tokens)
        if not batch and not problems and not layout.training_problems(hf_config):
            yield tried


def _candidate(
    config: TrainConfig,
    hf_config: Mapping[str, Any],
    machine: Machine,
    row_tokens: int,
    stages: list[StageMemory],
    time: StepTime,
) -> Candidate:
    lengths = [row_tokens] * config.global_batch_size
    flops = ModelFlops.of(hf_config).of_step(lengths, sum(lengths), is_frozen=config.tuner_type == "lora")
    mfu = flops / (time.total * machine.num_gpus * machine.peak_flops)
    return Candidate(config, stages, time, mfu, sum(lengths) / time.total)


def step_time(
    config: TrainConfig,
    hf_config: Mapping[str, Any],
    machine: Machine,
    row_tokens: int,
    traffic: tuple[float, float],
) -> StepTime:
    """The predicted time of a step.

    Args:
        config: The run's `train`, of a layout that the machine can have.
        hf_config: The model's `config.json`.
        machine: Where it is to run.
        row_tokens: Tokens of a row.
        traffic: Bytes that the busiest process sends once a step, and that its optimizer reads and writes.
    """
    layout, dims, model = Layout.of(config), dims_of(hf_config), ModelFlops.of(hf_config)
    tp, pp, cp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.context_parallel_size
    ep, parts = layout.expert_model_parallel_size, layout.virtual_pipeline_model_parallel_size or 1
    num_micro_batches = (
        config.global_batch_size * layout.model_parallel_size // (config.micro_batch_size * machine.num_gpus)
    )
    lengths = [row_tokens] * config.global_batch_size
    is_frozen = config.tuner_type == "lora"
    flops = model.of_step(lengths, sum(lengths), is_frozen=is_frozen)
    again = {"none": 0.0, "selective": _attention(model, lengths), "full": _forward_of_layers(model, lengths)}
    speed = machine.num_gpus * machine.peak_flops * machine.mfu
    compute = (flops + again[config.recompute_granularity]) / speed
    # All stages wait for the last one, which has the output layer as well, and for the first and last micro-batches.
    output = 6.0 * model.output * sum(lengths) / (flops + again[config.recompute_granularity])
    slowest = compute * (1 + output * (pp - 1))
    bubble = slowest * (1 + (pp - 1) / (parts * num_micro_batches)) - compute

    is_full = config.recompute_granularity == "full"
    item = ITEM_BYTES[config.torch_dtype]
    tokens = config.micro_batch_size * row_tokens / cp
    # Twice each way in attention and in a dense MLP: in front of the first product and behind the second. Backward,
    # what the first product read is gathered again for the gradient of its weight.
    moe_layers = sum(dims.is_moe(layer) for layer in range(dims.num_layers))
    halves = (2 * dims.num_layers - moe_layers) / pp
    tensor = halves * (5 + (2 if is_full else 0)) * _share(tp) * tokens * dims.hidden * item
    layers, of_kv = dims.num_layers / pp, 2 * _kv_width(dims) * item * tokens * cp / tp
    context = layers * (3 + is_full) * _share(cp) * of_kv
    sent = active_experts(hf_config) * tokens / (tp if layout.sequence_parallel else 1) * dims.hidden * item
    expert = moe_layers / pp * (4 + 2 * is_full) * _share(ep) * sent
    passed = 0.0 if pp == 1 else 2 * parts * tokens / tp * dims.hidden * item
    data, optimizer = traffic
    link = machine.link_bytes_per_s
    return StepTime(
        compute=compute,
        bubble=bubble,
        tensor=num_micro_batches * tensor / link,
        context=num_micro_batches * context / link,
        expert=num_micro_batches * expert / link,
        pipeline=num_micro_batches * passed / link,
        data=data / link,
        optimizer=optimizer / machine.memory_bytes_per_s,
    )


def _data_and_optimizer(
    config: TrainConfig, hf_config: Mapping[str, Any], machine: Machine, padded_vocab_size: int
) -> tuple[float, float]:
    """Bytes that the process of the largest stage sends once a step, and that its optimizer reads and writes."""
    layout = Layout.of(config)
    pp = layout.pipeline_model_parallel_size
    gradient, weight = ITEM_BYTES[config.main_grads_dtype], ITEM_BYTES[config.torch_dtype]
    of_number = gradient + weight + 2 * (4 + ITEM_BYTES[config.exp_avg_dtype] + ITEM_BYTES[config.exp_avg_sq_dtype])
    copies = {
        False: machine.num_gpus // (layout.tensor_model_parallel_size * pp),
        True: machine.num_gpus // (layout.expert_tensor_size * layout.expert_model_parallel_size * pp),
    }
    sent, updated = [], []
    for parameters in parameters_of(config, hf_config, padded_vocab_size=padded_vocab_size):
        learning = {
            is_expert: sum(p.numel * p.count for p in parameters if p.learns and p.is_expert == is_expert)
            for is_expert in copies
        }
        sent.append(sum(numel * _share(copies[key]) * (gradient + weight) for key, numel in learning.items()))
        divided = {
            key: numel / (copies[key] if config.use_distributed_optimizer else 1) for key, numel in learning.items()
        }
        updated.append(of_number * sum(divided.values()))
    return max(sent), max(updated)


def _forward_of_layers(model: ModelFlops, lengths: list[int]) -> float:
    return 2.0 * model.products * sum(lengths) + _attention(model, lengths)


def _attention(model: ModelFlops, lengths: list[int]) -> float:
    return 1.0 * model.attention * sum(length * length for length in lengths)


def _kv_width(dims: ModelDims) -> float:
    """Half of the numbers of a token's keys and values, over all heads."""
    if "qk_dim" in dims.more:
        return dims.heads * (dims.size("qk_dim") + dims.size("v_dim")) / 2
    return dims.kv_rows


def _share(size: int) -> float:
    """Of a whole, what a process of so many gets from the others."""
    return (size - 1) / size
