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


def test_importing_it_leaves_torch_unloaded() -> None:
    code = "import sys, mcore.backend.layout; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
