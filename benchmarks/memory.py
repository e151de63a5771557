"""Memory of training on a CPU, counted in tensors, beside its estimate (`mcore.train.memory`).

    python -m benchmarks.memory --card card.md

Each case builds what the trainer builds and makes a step of one micro-batch. Weights, gradients, main weights and
moments are the bytes of the tensors that hold them. Activations are what autograd keeps, each storage once. The peak is
the most that all storages held at any time of the step, by a dispatch mode that sees every result of an operation.
"""

from __future__ import annotations

import argparse
import platform
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.train import LEAN, LORA, REMAINDERS
from benchmarks.train_cases import QWEN2, SEQUENCE, SHAPES
from configs.schema.train import TrainConfig
from mcore.backend import parallel
from mcore.backend.layout import Layout
from mcore.bridge.families import dims_of
from mcore.data.template import Sample
from mcore.train.base import Base
from mcore.train.batches import Batching, MicroBatch
from mcore.train.memory import StageMemory, estimate_training
from mcore.train.methods import pt
from mcore.train.model import Training, build_training
from mcore.train.schedule import Schedule

LENGTH, ROWS = 256, 2
SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "use_sliding_window": False,
}
LATENTS = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "dense": QWEN2 | SMALL,
    "experts": QWEN2 | SMALL | EXPERTS,
    "latents": QWEN2 | SMALL | {"tie_word_embeddings": False} | LATENTS,
}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
CASES: Mapping[str, Mapping[str, Any]] = {
    "float32": {"torch_dtype": "float32"},
    "bfloat16": {},
    "bfloat16, whole optimizer": {"use_distributed_optimizer": False},
    "bfloat16, selective": {"recompute_granularity": "selective"},
    "bfloat16, full uniform": FULL | {"recompute_method": "uniform"},
    "bfloat16, full block 1": FULL | {"recompute_method": "block"},
}

FP8 = {"fp8_format": "hybrid"}
ON_H100: Sequence[tuple[str, int, bool, Mapping[str, Any], float | None]] = (
    ("1.5b", 2, True, {}, 47.4),
    ("1.5b", 4, True, {}, 63.1),
    ("1.5b", 2, True, LEAN, 35.8),
    ("1.5b", 2, False, {}, 59.6),
    ("3b", 2, True, REMAINDERS, None),
    ("3b", 2, True, LEAN, 60.1),
    ("3b", 4, True, LEAN, None),
    ("3b", 1, False, LEAN, 56.4),
    ("3b", 2, True, LEAN | FP8 | {"fp8_recipe": "delayed"}, 61.8),
    ("3b", 2, True, LEAN | FP8 | {"fp8_recipe": "tensorwise"}, 61.2),
    ("3b", 2, True, LEAN | FP8 | {"fp8_recipe": "blockwise"}, 61.3),
    ("7b", 2, True, LORA, 54.0),
    ("7b", 2, True, LORA | FP8 | {"fp8_recipe": "tensorwise"}, 66.2),
)
"""Shape, micro-batch size, whether Transformer Engine, settings, GiB allocated; None: out of memory.

Source: docs/benchmarks/train_h100.md."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes.

    Attributes:
        weights: Of all parameters, with the buffers that they lie in.
        gradients: Of the buffers that they are summed in.
        main_weights: Of the optimizer's own copies.
        moments: Of Adam's two.
        activations: What autograd keeps of a forward pass, without parameters.
        peak: The most that tensors held in a step.
    """

    weights: int
    gradients: int
    main_weights: int
    moments: int
    activations: int
    peak: int = field(default=0)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most that there were.

    Args:
        held: Tensors that were there before.
    """

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it put out."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if number in self.alive:
            return

        def gone(_: Any) -> None:
            del self.alive[number]
            self.now -= size

        self.alive[number] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class RandomBase(Base):
    """Weights drawn at random."""

    def fill(self, modules: Sequence[GPTModel]) -> None:
        """Draw them."""
        torch.manual_seed(0)
        with torch.no_grad():
            for module in modules:
                for parameter in module.parameters():
                    parameter.normal_(std=0.02)
                for name, buffer in module.named_buffers():
                    if name.endswith("expert_bias"):
                        buffer.zero_()


def configure(**settings: Any) -> TrainConfig:
    """`train` of a case."""
    fixed = {"method": "pt", "packing": False, "train_iters": 9}
    return TrainConfig(**{"micro_batch_size": ROWS, "global_batch_size": ROWS, **fixed, **settings})


def padded_rows(hf_config: Mapping[str, Any]) -> int:
    """Rows of the embedding."""
    return dims_of(hf_config, make_vocab_size_divisible_by=128).padded_vocab


def measure(hf_config: Mapping[str, Any], config: TrainConfig, *, length: int = LENGTH) -> Measured:
    """Memory of a step of one micro-batch in this process."""
    training = build(hf_config, config)
    batches = micro_batches(hf_config, length)
    step(training, batches)
    activations = kept_for_backward(training, batches)
    with LiveBytes(_held(training)) as live:
        step(training, batches)
    return Measured(**static_bytes(training), activations=activations, peak=live.peak)


def build(hf_config: Mapping[str, Any], config: TrainConfig) -> Training:
    """What the trainer builds, with random weights."""
    layout = Layout.of(config)
    parallel.start(layout, seed=1)
    base = RandomBase(hf_config, Path(), Path("random"), padded_rows(hf_config))
    training = build_training(config, Schedule(train_iters=9, lr_warmup_iters=0), base, layout, has_weights=True)
    for module in training.modules:
        pt.prepare(module, config)
    return training


def micro_batches(hf_config: Mapping[str, Any], length: int) -> list[MicroBatch]:
    """One of `ROWS` random samples, all of whose tokens are trained."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(hf_config["vocab_size"], (ROWS, length + 1), generator=draw).tolist()
    samples = [Sample(row, [False, *[True] * length]) for row in ids]
    return Batching(micro_batch_size=ROWS).micro_batches(samples, parallel.device())


def kept_for_backward(training: Training, batches: list[MicroBatch]) -> int:
    """Bytes of the storages that autograd keeps of a forward pass, parameters and the loss's chunks left out."""
    own = {
        tensor.untyped_storage().data_ptr()
        for module in training.modules
        for tensor in (*module.parameters(), *module.buffers())
    }
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    # The loss makes its gradients at once, in graphs of its own, that are no activations.
    behind = training.modules[-1]._postprocess
    training.modules[-1]._postprocess = lambda *, hidden_states, **others: hidden_states
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            pt.forward_step(iter(batches), training.chunks[-1])
    finally:
        training.modules[-1]._postprocess = behind
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def step(training: Training, batches: list[MicroBatch]) -> None:
    """One step of the trainer's, without its batching and records."""
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=pt.forward_step,
        data_iterator=iter(batches),
        model=list(training.chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].tokens_BS.shape[1],
        micro_batch_size=ROWS,
        forward_only=False,
    )
    training.optimizer.step()


def _held(training: Training) -> Iterator[torch.Tensor]:
    """Every tensor that lives from step to step."""
    for module in training.modules:
        yield from module.parameters()
        yield from module.buffers()
    for chunk in training.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield from (tensor for tensor in (buffer.param_data, buffer.grad_data) if tensor is not None)
    yield from _optimizer_tensors(training, ("exp_avg", "exp_avg_sq", "main"))


def _optimizer_tensors(training: Training, names: Sequence[str]) -> Iterator[torch.Tensor]:
    for part in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if "main" in names:
                    yield parameter
                state = part.optimizer.state[parameter]
                yield from (state[name] for name in names if name in state)


def static_bytes(training: Training) -> dict[str, int]:
    """What lives from step to step, by the names of `Measured`."""
    weights = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in training.modules
        for tensor in module.parameters()
    }
    main = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _optimizer_tensors(training, ("main",))
    }
    buffers = [buffer for chunk in training.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "weights": sum(weights.values()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "main_weights": sum(size for place, size in main.items() if place not in weights),
        "moments": sum(tensor.nbytes for tensor in _optimizer_tensors(training, ("exp_avg", "exp_avg_sq"))),
    }


def estimated(
    hf_config: Mapping[str, Any], config: TrainConfig, *, length: int = LENGTH, num_processes: int = 1, stage: int = 0
) -> StageMemory:
    """The estimate of what `measure` measures."""
    return estimate_training(
        config,
        hf_config,
        num_processes=num_processes,
        row_tokens=length,
        longest=length,
        padded_vocab_size=padded_rows(hf_config),
        engine=False,
        on_gpu=False,
    )[stage]


def estimated_on_h100(shape: str, micro_batch_size: int, engine: bool, settings: Mapping[str, Any]) -> StageMemory:
    """The estimate of a case of `ON_H100`."""
    config = configure(**settings, micro_batch_size=micro_batch_size, global_batch_size=micro_batch_size)
    return estimate_training(
        config,
        SHAPES[shape],
        num_processes=1,
        row_tokens=SEQUENCE,
        longest=SEQUENCE,
        padded_vocab_size=padded_rows(SHAPES[shape]),
        engine=engine,
        on_gpu=True,
    )[0]


def main() -> None:
    """Measure all cases and write the card's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=Path, help="write the table as Markdown")
    options = parser.parse_args()
    lines = [
        "| model | case | weights | gradients | main weights | moments | activations | peak |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for model, hf_config in MODELS.items():
        for name, settings in CASES.items():
            config = configure(**settings)
            lines.append(_row(model, name, measure(hf_config, config), estimated(hf_config, config)))
            sys.stderr.write(f"{lines[-1]}\n")
    lines += [
        "",
        f"MB measured (deviation of the estimate). `python -m benchmarks.memory`, Python {platform.python_version()}, "
        f"torch {torch.__version__}, megatron-core {version('megatron-core')}.",
        "",
        "| shape | layers | micro-batch | settings | GiB allocated | in tensors | deviation | with the rest |",
        "|---|---|--:|---|--:|--:|--:|--:|",
        *(_gpu_row(*case) for case in ON_H100),
        "",
    ]
    sys.stdout.write("\n".join(lines))
    if options.card:
        options.card.write_text("\n".join(lines))


def _row(model: str, name: str, measured: Measured, estimate: StageMemory) -> str:
    pairs = [
        (getattr(measured, part), getattr(estimate, part))
        for part in ("weights", "gradients", "main_weights", "moments", "activations")
    ]
    pairs.append((measured.peak, estimate.tensors))
    cells = [f"{was / 1e6:.3f} ({of / was - 1:+.1%})" if was else "0" for was, of in pairs]
    return f"| {model} | {name} | {' | '.join(cells)} |"


def _gpu_row(shape: str, micro_batch_size: int, engine: bool, settings: Mapping[str, Any], gib: float | None) -> str:
    estimate = estimated_on_h100(shape, micro_batch_size, engine, settings)
    tensors, total = estimate.tensors / 2**30, estimate.total / 2**30
    was, deviation = ("out of memory", "") if gib is None else (f"{gib:.1f}", f"{tensors / gib - 1:+.1%}")
    words = ["LoRA"] if "tuner_type" in settings else []
    if settings.get("use_precision_aware_optimizer"):
        words.append("bf16 gradients and moments" if "main_grads_dtype" in settings else "remainders")
    if settings.get("fp8_format"):
        words.append(f"FP8, {settings['fp8_recipe']} scales")
    what = ", ".join(words)
    layers = "transformer_engine" if engine else "torch"
    return f"| {shape} | {layers} | {micro_batch_size} | {what} | {was} | {tensors:.1f} | {deviation} | {total:.1f} |"


if __name__ == "__main__":
    main()
