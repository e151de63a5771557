"""Runs under torchrun: models are loaded from safetensors and written back, in every layout of so many processes.

live_cases.py FOLDER NPROC SHARD_GB     FOLDER/<model>/{hf,release} are there, FOLDER/<model>/<layout> is made
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from mcore.backend.layout import Layout
from mcore.backend.load import load_weights, model_tensors
from mcore.backend.model import build_model
from mcore.backend.parallel import start, stop
from mcore.bridge.families import dims_of
from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.live import load_safetensors
from mcore.bridge.live_export import save_safetensors
from tests.tiny_models import PADDED_VOCAB_SIZE

LAYOUTS = {
    2: {
        "tp2": Layout(tensor_model_parallel_size=2),
        "tp2_etp1": Layout(tensor_model_parallel_size=2, expert_tensor_parallel_size=1, sequence_parallel=True),
        "pp2": Layout(pipeline_model_parallel_size=2),
        "vpp2": Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
        "cp2": Layout(context_parallel_size=2),
        "ep2": Layout(expert_model_parallel_size=2),
    },
    4: {
        "tp2_sp_pp2": Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
        "tp2_sp_ep2": Layout(
            tensor_model_parallel_size=2,
            expert_model_parallel_size=2,
            expert_tensor_parallel_size=2,
            sequence_parallel=True,
        ),
    },
}
"""Layouts by number of processes."""


def suits(layout: str, config: Mapping[str, Any]) -> bool:
    """Whether a model is tried in a layout."""
    if config["architectures"] == ["GptOssForCausalLM"] and layout.startswith("tp2"):
        return layout == "tp2_etp1"  # megatron-core can't divide biases of experts
    if config["architectures"][0].endswith("SequenceClassification"):
        return layout in ("tp2", "pp2")  # their layers are those of the language models
    return any(dims_of(config).moe_layers) or not layout.endswith(("ep2", "etp1"))


def build(config: dict[str, Any], layout: Layout, dtype: torch.dtype) -> list[GPTModel]:
    stages = range(layout.virtual_pipeline_model_parallel_size or 1)
    return [
        build_model(
            config,
            padded_vocab_size=PADDED_VOCAB_SIZE,
            layout=layout,
            params_dtype=dtype,
            backend="torch",
            vp_stage=stage if layout.virtual_pipeline_model_parallel_size else None,
        )
        for stage in stages
    ]


def assert_equal(one: list[GPTModel], other: list[GPTModel]) -> None:
    parts, others = ([part for model in models for part in model_tensors(model)] for models in (one, other))
    assert len(parts) == len(others) > 0
    for part, wanted in zip(parts, others, strict=True):
        assert (part.key, part.global_offset) == (wanted.key, wanted.global_offset)
        assert torch.equal(part.data.view(torch.uint8), wanted.data.view(torch.uint8)), part.key


def run(folder: Path, name: str, layout: Layout, shard_gb: float) -> None:
    config = read_hf_config(folder / "hf")
    dtype = getattr(torch, config["dtype"])
    live = build(config, layout, dtype)
    load_safetensors(live, folder / "hf")
    from_file = build(config, layout, dtype)
    load_weights(from_file, folder / "release")
    assert_equal(live, from_file)
    save_safetensors(live, config, folder / name, small_files=folder / "hf", max_shard_size_gb=shard_gb)


def main(folder: Path, num_processes: int, shard_gb: float) -> None:
    logging.disable(logging.WARNING)
    for name, layout in LAYOUTS[num_processes].items():
        start(layout)
        for model in sorted(folder.glob("*/release")):
            if suits(name, read_hf_config(model.with_name("hf"))):
                run(model.parent, name, layout, shard_gb)
    stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
