"""The estimate of memory against tensors that are counted, on the CPU and, from its card, on an H100."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.memory import CASES, MODELS, ON_H100, configure, estimated, estimated_on_h100, measure
from mcore.backend.layout import Layout
from mcore.train.memory import StageMemory, estimate_training
from mcore.train.parameters import layers_of_stages, parameters_of


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_what_is_measured(model: str, case: str) -> None:
    config = configure(**CASES[case])
    measured, estimate = measure(MODELS[model], config, length=64), estimated(MODELS[model], config, length=64)
    for part in ("weights", "gradients", "main_weights", "moments"):
        assert getattr(estimate, part) == getattr(measured, part), part
    assert estimate.activations == pytest.approx(measured.activations, rel=0.05)
    assert estimate.tensors == pytest.approx(measured.peak, rel=0.15)


@pytest.mark.parametrize(("shape", "micro_batch_size", "engine", "settings", "gib"), ON_H100)
def test_the_estimate_is_near_what_an_h100_allocated(
    shape: str, micro_batch_size: int, engine: bool, settings: Mapping[str, Any], gib: float | None
) -> None:
    estimate = estimated_on_h100(shape, micro_batch_size, engine, settings)
    if gib is None:
        assert estimate.total / 2**30 > 79.6  # what there is
    else:
        assert estimate.tensors / 2**30 == pytest.approx(gib, rel=0.03)
        assert estimate.total / 2**30 < 79.6


def test_layers_lie_on_stages_as_megatron_puts_them() -> None:
    assert layers_of_stages(Layout(), 3) == [[0, 1, 2]]
    uneven = Layout(pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=1)
    assert layers_of_stages(uneven, 5) == [[0], [1, 2], [3, 4]]
    interleaved = Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert layers_of_stages(interleaved, 8) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def estimate_of(model: str, num_processes: int, **settings: Any) -> list[StageMemory]:
    return estimate_training(
        configure(**settings), MODELS[model], num_processes=num_processes, row_tokens=64, longest=64,
        padded_vocab_size=4096, engine=False, on_gpu=False,
    )  # fmt: skip


def test_parts_of_all_processes_are_the_whole_model() -> None:
    def numel(**settings: Any) -> list[int]:
        stages = parameters_of(configure(**settings), MODELS["dense"], padded_vocab_size=4096)
        return [sum(parameter.numel * parameter.count for parameter in stage) for stage in stages]

    (whole,), norms = numel(), (2 * 4 + 1) * 256
    assert sum(numel(tensor_model_parallel_size=2)) * 2 == whole + norms
    assert sum(numel(pipeline_model_parallel_size=2)) == whole + 4096 * 256  # the embedding is tied


def test_the_first_stage_holds_the_most_micro_batches() -> None:
    first, last = estimate_of("latents", 2, pipeline_model_parallel_size=2, global_batch_size=16)
    (whole,) = estimate_of("latents", 1)
    assert first.activations > 0.9 * whole.activations
    assert last.activations < 0.6 * whole.activations


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_what_is_offloaded_takes_no_memory_of_the_device(fraction: float) -> None:
    lean = {"torch_dtype": "bfloat16", "use_precision_aware_optimizer": True}
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    (plain,), (offloaded,) = estimate_of("dense", 1, **lean), estimate_of("dense", 1, **lean, **offload)
    left = 1 - fraction
    # What stays is updated as whole fp32 weights, not as bf16 weights and remainders.
    assert (offloaded.moments, offloaded.main_weights) == (plain.moments * left, plain.main_weights * 2 * left)
    assert offloaded.gradients == plain.gradients
    lean |= {"main_grads_dtype": "bfloat16"}
    (plain,), (offloaded,) = estimate_of("dense", 1, **lean), estimate_of("dense", 1, **lean, **offload)
    assert offloaded.gradients == plain.gradients + offloaded.main_weights  # fp32 copies of those that stay


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_is_offloaded_is_the_hosts(num_processes: int) -> None:
    lean = {"torch_dtype": "bfloat16", "use_precision_aware_optimizer": True}
    offload = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.25}
    (plain,), (offloaded,) = (estimate_of("dense", num_processes, **settings) for settings in (lean, lean | offload))
    assert plain.host == 0
    assert offloaded.host == (plain.moments - offloaded.moments) * 16 / 8  # weights, gradients and moments in fp32
    assert offloaded.total < plain.total


@pytest.mark.parametrize("model", ["dense", "experts"])
def test_copies_of_matrices_in_fp8_are_counted(model: str) -> None:
    lora = {"tuner_type": "lora", "torch_dtype": "bfloat16"}
    fp8 = {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"}
    hidden, ffn, layers = 256, 768, 4
    matrices = layers * hidden * (256 + 2 * 128 + 256)  # query, key and value, output
    # The first layer's MLP is dense, the others have 8 experts of this width.
    mlps = 3 * hidden * (layers * ffn if model == "dense" else ffn + (layers - 1) * 8 * 256)
    (plain,), (copied,) = estimate_of(model, 1, **lora), estimate_of(model, 1, **lora | fp8)
    assert copied.weights - plain.weights == 2 * (matrices + mlps)
    assert copied.activations == plain.activations  # adapters read inputs in bf16
    (plain,), (copied,) = estimate_of(model, 1), estimate_of(model, 1, **fp8)
    assert copied.weights - plain.weights == 2 * (matrices + mlps)
    assert copied.activations < plain.activations


def test_data_parallel_processes_share_the_optimizer() -> None:
    (one,), (two,) = estimate_of("dense", 1), estimate_of("dense", 2)
    assert (two.moments, two.main_weights) == (one.moments / 2, one.main_weights / 2)
    assert (two.weights, two.gradients) == (one.weights, one.gradients)
    (whole,) = estimate_of("dense", 2, use_distributed_optimizer=False)
    assert whole.moments == one.moments
