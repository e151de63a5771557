"""Checkpoints written by megatron-core itself, read back strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from mcore.backend.layout import Layout
from mcore.backend.load import load_weights, padded_vocab_size
from mcore.backend.meta import CheckpointContent, sharded_shapes
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.bridge.dist_files import read_dist_tensors
from mcore.errors import CheckpointError
from tests.tiny_models import PADDED_VOCAB_SIZE, fill, mcore_tensors, tiny_hf_model

# In this order: what the first one makes needs process groups of its own.
pytestmark = pytest.mark.usefixtures("checkpoints", "alone")

NAME = "qwen3"
DTYPE = torch.bfloat16


def empty_model(**options: Any) -> GPTModel:
    config = tiny_hf_model(options.pop("name", NAME))[1] | options.pop("change", {})
    arguments = {"params_dtype": DTYPE, "padded_vocab_size": PADDED_VOCAB_SIZE} | options
    return build_model(config, layout=Layout(), backend="torch", **arguments)


def filled_model(name: str = NAME) -> GPTModel:
    hf, config = tiny_hf_model(name)
    model = empty_model(name=name)
    fill(model, mcore_tensors(hf, config, padded_vocab_size=PADDED_VOCAB_SIZE))
    return model


def save(folder: Path, state: dict[str, Any]) -> Path:
    folder.mkdir()
    dist_checkpointing.save(state, str(folder))
    return folder


def optimizer_state(model: GPTModel) -> dict[str, Any]:
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, params_dtype=DTYPE)
    optimizer = get_megatron_optimizer(settings, [wrapped])
    ids = torch.arange(8)[None]
    wrapped(ids, ids, None, labels=ids).sum().backward()
    optimizer.step()
    return optimizer.sharded_state_dict(model.sharded_state_dict())


@pytest.fixture(scope="module")
def told() -> CheckpointContent:
    return sharded_shapes(tiny_hf_model(NAME)[1], padded_vocab_size=PADDED_VOCAB_SIZE, params_dtype=DTYPE)


@pytest.fixture(scope="module")
def checkpoints(told: CheckpointContent, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a base, of a training run, and of a base with every kind of fault."""
    root = tmp_path_factory.mktemp("checkpoints")
    with parallel_processes(Layout()):
        model = filled_model()
        state = model.sharded_state_dict()
        base = save(root / "base", {"model": state})
        rng = ShardedObject("rng_state", [torch.get_rng_state()], (1, 1), (0, 0))
        training = save(
            root / "training", {"model": state, "optimizer": optimizer_state(model), "rng_state": rng, "iteration": 3}
        )
        faulty = filled_model().sharded_state_dict()
        del faulty["decoder.final_layernorm.weight"]
        faulty["surprise"] = ShardedTensor.from_rank_offsets("surprise", torch.ones(3))
        embedding = faulty["embedding.word_embeddings.weight"]
        faulty[embedding.key] = ShardedTensor.from_rank_offsets(embedding.key, torch.ones(256, 64))
        output = faulty["output_layer.weight"]
        faulty[output.key] = ShardedTensor.from_rank_offsets(output.key, torch.ones(384, 64, dtype=torch.int8))
        faults = save(root / "faults", {"model": faulty})
        damaged = {}
        for name, number in (("nan", torch.nan), ("infinity", -torch.inf), ("large", 1e6)):
            with torch.no_grad():
                model.decoder.layers[2].mlp.linear_fc2.weight[1, 1] = number
            damaged[name] = save(root / name, {"model": model.sharded_state_dict()})
    return {"base": base, "training": training, "faults": faults, **damaged}


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    pairs = zip(found.named_parameters(), expected.named_parameters(), strict=True)
    assert [name for (name, a), (_, b) in pairs if not torch.equal(a.float(), b.float())] == []


def test_weights_come_back_to_the_bit(checkpoints: dict[str, Path]) -> None:
    model = empty_model()
    load_weights(model, checkpoints["base"])
    assert_same_weights(model, filled_model())


def test_a_bf16_checkpoint_is_exact_in_an_fp32_model(checkpoints: dict[str, Path], capsys) -> None:
    model = empty_model(params_dtype=torch.float32)
    load_weights(model, checkpoints["base"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_weights(model, filled_model())
    assert "rounded" not in capsys.readouterr().err


def test_rounding_to_a_narrower_dtype_is_right_and_told(checkpoints: dict[str, Path], capsys) -> None:
    model = empty_model(params_dtype=torch.float16)
    load_weights(model, checkpoints["base"])
    expected = filled_model()
    assert_same_weights(model, expected.half())
    assert "weights are rounded from bfloat16 to float16" in capsys.readouterr().err


def test_a_training_checkpoint_gives_its_weights_and_keeps_the_rest(checkpoints: dict[str, Path]) -> None:
    keys = read_dist_tensors(checkpoints["training"]).keys()
    assert {"optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"} < keys
    model = empty_model()
    load_weights(model, checkpoints["training"])
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_every_difference_is_named_at_once(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_weights(empty_model(), checkpoints["faults"])
    assert {str(problem) for problem in caught.value.problems} == {
        "decoder.final_layernorm.weight: expected a tensor in the checkpoint, found none",
        "surprise: expected no such tensor in the checkpoint, found one of (3,)",
        "embedding.word_embeddings.weight: expected shape (384, 64), found (256, 64)",
        "output_layer.weight: expected floating-point numbers, found int8",
    }


def test_another_model_is_refused_and_the_weights_stay_untouched(checkpoints: dict[str, Path]) -> None:
    model = empty_model(name="qwen2")
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, checkpoints["base"])
    subjects = {problem.subject for problem in caught.value.problems}
    assert {
        "decoder.layers.self_attention.linear_qkv.bias",
        "decoder.layers.self_attention.q_layernorm.weight",
    } < subjects
    assert all(parameter.isnan().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["nan", "infinity"])
def test_what_is_not_finite_in_a_checkpoint_does_not_pass(checkpoints: dict[str, Path], kind: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_weights(empty_model(), checkpoints[kind])
    assert [str(problem) for problem in caught.value.problems] == [
        "decoder.layers.2.mlp.linear_fc2.weight: expected finite numbers, found NaN or infinity"
    ]


def test_numbers_that_are_too_large_for_the_models_dtype_are_named(checkpoints: dict[str, Path]) -> None:
    load_weights(empty_model(), checkpoints["large"])
    with pytest.raises(CheckpointError, match="too large") as caught:
        load_weights(empty_model(params_dtype=torch.float16), checkpoints["large"])
    assert [str(problem) for problem in caught.value.problems] == [
        "decoder.layers.mlp.linear_fc2.weight, number 2: expected numbers up to 65504, the largest of float16, "
        "found larger ones"
    ]


def test_the_padded_vocabulary_size_is_read_without_loading(checkpoints: dict[str, Path]) -> None:
    assert padded_vocab_size(checkpoints["base"]) == PADDED_VOCAB_SIZE


@pytest.mark.parametrize("lost", [".metadata", "metadata.json", "__0_0.distcp"])
def test_an_incomplete_folder_is_refused(checkpoints: dict[str, Path], tmp_path: Path, lost: str) -> None:
    folder = tmp_path / "release"
    folder.mkdir()
    for file in checkpoints["base"].iterdir():
        if file.name != lost:
            (folder / file.name).hardlink_to(file)
    for read in (padded_vocab_size, lambda path: load_weights(empty_model(), path)):
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            read(folder)


def test_the_content_told_from_the_meta_device_is_what_megatron_writes(
    checkpoints: dict[str, Path], told: CheckpointContent
) -> None:
    written = load_sharded_metadata(str(checkpoints["base"]))
    tensors = {key: (tuple(t.global_shape), t.dtype) for key, t in written.items() if isinstance(t, ShardedTensor)}
    objects = sorted(key for key, entry in written.items() if isinstance(entry, ShardedObject))
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in told.tensors.items()} == tensors
    assert list(told.objects) == objects
