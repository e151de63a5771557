from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from mcore.backend.layout import Layout

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "vocab_size": 250,
}


def subjects(layout: Layout, padded_vocab_size: int = 256, seq_length: int | None = None, **changes: Any) -> list[str]:
    problems = layout.problems(MODEL | changes, padded_vocab_size=padded_vocab_size, seq_length=seq_length)
    return [problem.subject for problem in problems]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tensor_model_parallel_size=2),
        Layout(pipeline_model_parallel_size=3),
        Layout(pipeline_model_parallel_size=3, virtual_pipeline_model_parallel_size=2),
        Layout(context_parallel_size=4),
        Layout(expert_tensor_parallel_size=1),
        Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
    ],
)
def test_a_layout_that_divides_has_no_problems(layout: Layout) -> None:
    assert subjects(layout, seq_length=32) == []


def test_every_size_that_does_not_divide_is_named_at_once() -> None:
    layout = Layout(tensor_model_parallel_size=5, pipeline_model_parallel_size=4, sequence_parallel=True)
    assert subjects(layout, padded_vocab_size=256, seq_length=33) == [
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "padded vocabulary size",
        "sequence length",
        "num_hidden_layers",
    ]


def test_key_value_heads_are_the_query_heads_where_the_config_has_none() -> None:
    model = {key: value for key, value in MODEL.items() if key != "num_key_value_heads"}
    assert Layout(tensor_model_parallel_size=8).problems(model, padded_vocab_size=256) == []


def test_sequence_parallelism_needs_tensor_parallelism() -> None:
    assert subjects(Layout(sequence_parallel=True)) == ["sequence_parallel"]


MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(expert_model_parallel_size=3),
        Layout(expert_model_parallel_size=2, expert_tensor_parallel_size=4),
        Layout(tensor_model_parallel_size=2, expert_model_parallel_size=6, pipeline_model_parallel_size=2),
    ],
)
def test_a_layout_that_divides_experts_has_no_problems(layout: Layout) -> None:
    assert subjects(layout, **MOE) == []


def test_every_size_of_experts_that_does_not_divide_is_named_at_once() -> None:
    layout = Layout(tensor_model_parallel_size=8, expert_model_parallel_size=4)
    assert subjects(layout, **MOE) == [
        "num_key_value_heads",
        "intermediate size of the shared experts",
        "experts of a layer",
        "intermediate size of the experts",
    ]
    assert "intermediate_size" in subjects(Layout(tensor_model_parallel_size=5), **MOE, decoder_sparse_step=2)


def test_experts_with_biases_are_not_divided_themselves() -> None:
    biased = {"architectures": ["GptOssForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    assert subjects(Layout(tensor_model_parallel_size=2), **biased) == ["expert_tensor_parallel_size"]
    assert subjects(Layout(tensor_model_parallel_size=2, expert_tensor_parallel_size=1), **biased) == []


def test_a_dense_model_has_no_experts_to_divide() -> None:
    layout = Layout(expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    assert subjects(layout) == ["expert_model_parallel_size", "expert_tensor_parallel_size"]


def test_virtual_stages_need_stages_and_layers_for_all() -> None:
    name = "virtual_pipeline_model_parallel_size"
    assert subjects(Layout(virtual_pipeline_model_parallel_size=2)) == [name]
    assert subjects(Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=1)) == [name]
    layout = Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert subjects(layout) == ["num_hidden_layers"]


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ({"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 2}, True),
        ({"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 5}, True),
        ({"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 2}, True),
        ({"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 1}, False),
        ({"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 6}, False),
    ],
)
def test_the_ends_of_a_pipeline_may_have_other_numbers_of_layers(sizes: dict[str, int], fits: bool) -> None:
    assert subjects(Layout(**sizes)) == ([] if fits else ["num_hidden_layers"])


def test_both_ends_of_a_pipeline_and_what_is_between_have_all_layers() -> None:
    ends = {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2}
    assert subjects(Layout(pipeline_model_parallel_size=3, **ends)) == []
    assert subjects(Layout(pipeline_model_parallel_size=4, **ends)) == ["num_hidden_layers"]
    assert subjects(Layout(pipeline_model_parallel_size=2, **ends)) == ["num_hidden_layers"]
    assert subjects(Layout(**ends)) == list(ends)


def test_virtual_stages_divide_the_ends_too() -> None:
    vpp = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    assert subjects(Layout(**vpp, decoder_first_pipeline_num_layers=2)) == []
    assert subjects(Layout(**vpp, decoder_first_pipeline_num_layers=3)) == [
        "decoder_first_pipeline_num_layers",
        "num_hidden_layers",
    ]


def test_a_sequence_is_divided_from_both_ends() -> None:
    layout = Layout(context_parallel_size=4)
    assert subjects(layout, seq_length=20) == ["sequence length"]
    assert subjects(layout, seq_length=24) == []


@pytest.mark.parametrize(
    ("layout", "num_processes", "multiples"),
    [
        (Layout(), 1, []),
        (Layout(tensor_model_parallel_size=2, context_parallel_size=2), 4, []),
        (Layout(tensor_model_parallel_size=2, context_parallel_size=2), 6, [4]),
        (Layout(pipeline_model_parallel_size=2, expert_model_parallel_size=4), 8, []),
        (Layout(pipeline_model_parallel_size=2, expert_model_parallel_size=4), 4, [8]),
        (Layout(tensor_model_parallel_size=4, expert_model_parallel_size=2), 4, [8]),
        (Layout(tensor_model_parallel_size=4, expert_model_parallel_size=2, expert_tensor_parallel_size=1), 4, []),
        (Layout(tensor_model_parallel_size=2, expert_model_parallel_size=3), 5, [2, 6]),
    ],
)
def test_a_number_of_processes_must_hold_whole_models_and_whole_layers_of_experts(
    layout: Layout, num_processes: int, multiples: list[int]
) -> None:
    problems = layout.process_problems(num_processes)
    assert [problem.expected.split(" (")[0] for problem in problems] == [f"a multiple of {n}" for n in multiples]


def test_importing_it_leaves_torch_unloaded() -> None:
    code = "import sys, mcore.backend.layout; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
