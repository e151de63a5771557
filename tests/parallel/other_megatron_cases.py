"""Runs under torchrun, with whichever megatron-core is first on the path: it reads what we convert, and saves its own.

other_megatron_cases.py FOLDER     FOLDER/<model>/{config.json,expected.pt,release} are there,
                                   FOLDER/<model>/<version>-<layout>-<spelling>/iter_0000005 is made

The models are megatron-core's own, of its own local layer spec: nothing of our backend but the bridges to a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

if importlib.util.find_spec("triton") is None:
    # megatron-core 0.19 imports these kernels whether they are used or not; they move activations of experts on a GPU.
    kernels = ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    kernels.GLOBAL_BLOCK_SIZE = kernels.paged_stash_copy_kernel = kernels.paged_stash_pop_kernel = None  # type: ignore[attr-defined]
    sys.modules[kernels.__name__] = kernels

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from mcore.backend.cpu import install_cpu_backend
from mcore.bridge.families import dims_of, family_of_config

LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
}
SPELLINGS = {"engine": None, "local": None, "single": {"singleton_local_shards": True}}
"""Metadata that megatron saves with. `engine` has the names of Transformer Engine's spec, which can't be built here."""


def build(hf_config: Mapping[str, Any], layout: Mapping[str, int], *, vocab: int, dtype: torch.dtype) -> GPTModel:
    arguments = dict(family_of_config(hf_config).transformer_config(hf_config))
    assert arguments.pop("activation_func") == "silu"
    config_class = MLATransformerConfig if arguments.get("multi_latent_attention") else TransformerConfig
    config = config_class(
        **arguments,
        **layout,
        activation_func=torch.nn.functional.silu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        moe_token_dispatcher_type="alltoall",
        transformer_impl="local",
    )
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if config.multi_latent_attention:
        multi_latent_attention.HAVE_TE = False  # 0.16 asks layers whether they are of a package that is not there
        for layer in block.layer_specs:
            parts = layer.submodules.self_attention.submodules
            parts.core_attention = IdentityOp  # the local one can't be built with MLA; none has weights
            if config.q_lora_rank is None:
                parts.q_layernorm = IdentityOp  # as 0.19 demands
    further = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False) if config.mtp_num_layers else None
    model = GPTModel(
        config,
        block,
        vocab_size=vocab,
        max_sequence_length=128,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=dims_of(hf_config).tied,
        position_embedding_type="rope",
        mtp_block_spec=further,
    ).to(dtype)
    for module in model.modules():
        if isinstance(module, TopKRouter) and module.expert_bias is not None:
            module.expert_bias = module.expert_bias.float()  # as its forward keeps it
    return model


def name_as_engine(model: torch.nn.Module) -> None:
    """Give the layers the names that Transformer Engine's spec saves under.

    Source: `remap_te_layernorm` in megatron-core 0.19.2 `post_training/modelopt/gpt/model_specs.py`.
    """
    for layer in model.modules():
        if type(layer).__name__ != "TransformerLayer":
            continue
        names = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"} if type(layer.mlp).__name__ == "MLP" else {}
        if layer.config.multi_latent_attention:
            attention = "self_attention."
            names |= {f"{attention}{x}_layernorm.": f"{attention}linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")}
        else:
            names |= {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        layer.submodules_config.sharded_state_dict_keys_map = names


def state_of(model: GPTModel, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the model saves and loads. There always is metadata, as in Megatron-LM: last stages of 0.16 need it."""
    return model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(dict(metadata or {})))


def compare(model: GPTModel, expected: Mapping[str, Tensor]) -> None:
    """Every shard is, bit for bit, what the family's table says."""
    state = state_of(model)
    apply_factories(state)
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    assert parts
    for part in parts:
        wanted = expected[part.key][part.global_slice()].reshape(part.data.shape)
        assert part.data.dtype == wanted.dtype, (part.key, part.data.dtype, wanted.dtype)
        assert torch.equal(part.data, wanted), part.key


def save(model: GPTModel, folder: Path, metadata: Mapping[str, Any] | None) -> None:
    """Save as Megatron-LM does, its arguments and generators included."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    rng = ShardedObject("rng_state", [{"torch": torch.get_rng_state()}], (dist.get_world_size(),), (dist.get_rank(),))
    state = {
        "model": state_of(model, metadata),
        "rng_state": rng,
        "iteration": 5,
        "checkpoint_version": 3.0,
        "args": argparse.Namespace(num_layers=model.config.num_layers),
    }
    dist_checkpointing.save(state, str(folder))


def run(folder: Path, layout_name: str) -> None:
    hf_config = json.loads((folder / "config.json").read_text())
    expected = torch.load(folder / "expected.pt")
    embedding = expected["embedding.word_embeddings.weight"]
    model = build(hf_config, LAYOUTS[layout_name], vocab=embedding.shape[0], dtype=embedding.dtype)
    local_names = [getattr(layer, "submodules_config", None) for layer in model.modules()]
    before = [dict(spec.sharded_state_dict_keys_map) if spec else None for spec in local_names]
    name_as_engine(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    loaded = dist_checkpointing.load({"model": state_of(model)}, str(folder / "release"), strict="raise_all")
    model.load_state_dict(loaded["model"])
    compare(model, expected)
    version = ".".join(megatron.core.__version__.split(".")[:2])
    for spelling, metadata in SPELLINGS.items():
        if spelling != "engine":
            for spec, names in zip(local_names, before, strict=True):
                if spec is not None:
                    spec.sharded_state_dict_keys_map = names
        save(model, folder / f"{version}-{layout_name}-{spelling}" / "iter_0000005", metadata)


def main(folder: Path) -> None:
    install_cpu_backend()
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    for layout_name, layout in LAYOUTS.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**layout)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        for case in sorted(folder.glob("*/expected.pt")):
            hf_config = json.loads(case.with_name("config.json").read_text())
            if layout_name != "ep2" or dims_of(hf_config).moe_layers:
                run(case.parent, layout_name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
