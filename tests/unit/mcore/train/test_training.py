"""One process trains: like transformers, however its batches are cut, and never past what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema.data import DataConfig
from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.data.prepare.build import build_datasets
from mcore.errors import CheckpointError, ConfigError, SourceError, TrainingError
from mcore.metrics import read_metrics
from mcore.select import iterations_in
from mcore.train.run import train
from tests.reference_training import train_with_transformers
from tests.tiny_models import PADDED_VOCAB_SIZE, mcore_tensors, tiny_hf_model
from tests.tiny_runs import make_base, recorded, saved_tensors, tiny_run, write_rows

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def trained(folder: Path, base: Path) -> Train:
    """Train once with these settings (a second call finds the run complete); the output folder."""

    def trained(name: str, *, base: Path = base, **settings: Any) -> Path:
        with parallel_processes(Layout()):
            train(tiny_run(folder, **settings), base, folder / name)
        return folder / name

    return trained


def figures(output: Path, name: str = "loss") -> list[float]:
    return recorded(read_metrics(output / "metrics.jsonl"), name)


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    return saved_tensors(output / f"iter_{iterations_in(output)[-1]:07d}")


@pytest.mark.parametrize("name", ["llama_bias", "qwen2", "qwen3_tied"])
def test_training_is_what_transformers_and_torch_do(name: str, folder: Path, trained: Train) -> None:
    model, hf_config = make_base(folder / f"base-{name}", name)
    output = trained(f"hf-{name}", base=folder / f"base-{name}")
    run = tiny_run(folder)
    data, _ = build_datasets(run.data, "sft", folder / f"base-{name}" / "hf")
    assert figures(output) == pytest.approx(train_with_transformers(model, run, data), abs=1e-5)
    weights = final_weights(output)
    for key, expected in mcore_tensors(model, hf_config, padded_vocab_size=PADDED_VOCAB_SIZE).items():
        assert torch.allclose(weights[key], expected, atol=1e-4), key


def test_answers_count_by_their_weights_as_transformers_and_torch_would_have_it(tmp_path: Path) -> None:
    model, _ = make_base(tmp_path / "base", "qwen3_tied")
    write_rows(tmp_path / "train.jsonl", 22, seed=22, weighted=True)
    run = tiny_run(tmp_path, train_iters=6)
    data, _ = build_datasets(run.data, "sft", tmp_path / "base/hf")
    assert len({float(weight) for sample in data for weight in sample.loss_mask}) > 3
    expected = train_with_transformers(model, run, data)
    for name, packing in (("padded", False), ("packed", True)):
        with parallel_processes(Layout()):
            train(tiny_run(tmp_path, train_iters=6, packing=packing), tmp_path / "base", tmp_path / name)
        assert figures(tmp_path / name) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_the_cut_into_micro_batches_does_not_change_what_is_learnt(micro_batch_size: int, trained: Train) -> None:
    reference, output = trained("reference"), trained(f"cut-{micro_batch_size}", micro_batch_size=micro_batch_size)
    for name in ("loss", "validation_loss"):
        assert figures(output, name) == pytest.approx(figures(reference, name), abs=1e-5)
    assert figures(output, "grad_norm") == pytest.approx(figures(reference, "grad_norm"), abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
        {"recompute_granularity": "selective"},
    ],
)
def test_recomputation_changes_nothing(settings: dict[str, Any], trained: Train) -> None:
    name = "-".join(map(str, settings.values()))
    reference, output = trained("reference"), trained(name, **settings)
    assert figures(output) == figures(reference)
    expected, found = final_weights(reference), final_weights(output)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_the_optimizer_may_be_whole(trained: Train) -> None:
    output = trained("whole", use_distributed_optimizer=False)
    assert figures(output) == pytest.approx(figures(trained("reference")), abs=1e-6)


def test_weights_decay_but_norms_and_biases_do_not(folder: Path, trained: Train) -> None:
    base = folder / "base-decay"
    make_base(base, "llama_bias")
    one_step = {"base": base, "train_iters": 1, "lr_warmup_iters": 0}
    without = final_weights(trained("no-decay", weight_decay=0.0, **one_step))
    decayed = final_weights(trained("decay", weight_decay=0.5, **one_step))
    for key, start in saved_tensors(base / "release").items():
        if key.endswith("bias") or "norm" in key:
            assert torch.equal(decayed[key], without[key]), key
        else:
            assert torch.allclose(without[key] - decayed[key], 1e-3 * 0.5 * start, atol=1e-7), key


def test_padding_rows_of_the_vocabulary_learn_nothing(trained: Train, base: Path) -> None:
    config = json.loads((base / "hf" / "config.json").read_text())
    weights = final_weights(trained("reference"))
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert weights[key].shape[0] == PADDED_VOCAB_SIZE
        assert not weights[key][config["vocab_size"] :].any()


def test_bfloat16_training_is_what_transformers_and_fp32_copies_do(folder: Path, base: Path, trained: Train) -> None:
    output = trained("bf16", torch_dtype="bfloat16")
    model, _ = tiny_hf_model("llama", dtype=torch.bfloat16)
    run = tiny_run(folder)
    data, _ = build_datasets(run.data, "sft", base / "hf")
    expected = train_with_transformers(model, run, data)
    assert figures(output) == pytest.approx(expected, rel=0.001)


def test_bfloat16_learns_through_fp32_weights(trained: Train, base: Path) -> None:
    """Steps of 1e-5 are less than half the last bit of most bf16 weights; in the main weights they add up."""
    settings = {"lr": 1e-5, "min_lr": 1e-5, "lr_decay_style": "constant", "lr_warmup_iters": 0, "train_iters": 8}
    coarse, fine = trained("bf16-small", torch_dtype="bfloat16", **settings), trained("fp32-small", **settings)
    key = "decoder.layers.mlp.linear_fc2.weight"
    start, exact = saved_tensors(base / "release")[key], final_weights(fine)[key]
    state = final_weights(coarse)
    model, main = state[key], state[f"optimizer.state.param.{key}"]
    assert (model.dtype, main.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(model, main.bfloat16())
    assert (model == start.bfloat16()).float().mean() > 0.8
    learnt, expected = main - start.bfloat16().float(), exact - start
    assert torch.cosine_similarity(learnt.flatten(), expected.flatten(), dim=0) > 0.95


def test_pt_trains_on_every_token(folder: Path, base: Path) -> None:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {row} of plain text"}) + "\n" for row in range(8)))
    run = tiny_run(folder, method="pt", train_iters=1, lr_warmup_iters=0)
    run = run.model_copy(update={"data": DataConfig(dataset=(str(path),))})
    with parallel_processes(Layout()):
        train(run, base, folder / "pt")
    model, _ = tiny_hf_model("llama")
    data, validation = build_datasets(run.data, "pt", base / "hf")
    losses = []
    for sample in data:
        ids_BS = torch.as_tensor(sample.token_ids).long()[None]
        logits_BSV = model(ids_BS).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits_BSV[0], ids_BS[0, 1:], reduction="none"))
    assert figures(folder / "pt") == pytest.approx([torch.cat(losses).mean().item()], abs=1e-5)
    assert len(validation) == 0 and figures(folder / "pt", "validation_loss") == []


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_samples(folder: Path, base: Path, trained: Train) -> None:
    with pytest.raises(TrainingError, match=r"iteration 2: loss .*(nan|inf)") as caught:
        trained("exploded", lr=1e30, lr_warmup_iters=0, save_steps=1)
    data, _ = build_datasets(tiny_run(folder).data, "sft", base / "hf")
    for place in range(8, 16):
        index = data.sample_index(place)
        assert f"sample {index} ({data[index].place})" in str(caught.value)
    assert iterations_in(folder / "exploded") == [1]


def test_another_run_does_not_go_on_from_these_checkpoints(trained: Train) -> None:
    trained("reference")
    with pytest.raises(ConfigError) as caught:
        trained("reference", lr=2e-3)
    assert [problem.subject for problem in caught.value.problems] == ["train.lr"]


def test_a_damaged_newest_checkpoint_is_not_loaded(folder: Path, trained: Train) -> None:
    reference = trained("scheduled", save_steps=4)
    damaged = folder / "damaged"
    shutil.copytree(reference, damaged)
    (damaged / "metrics.json").unlink()
    shard = max((damaged / "iter_0000012").glob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1000])
    trained("damaged", save_steps=4)
    expected, found = final_weights(reference), final_weights(damaged)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert figures(damaged) == figures(reference)


def test_a_base_of_another_shape_is_refused(folder: Path, base: Path, trained: Train) -> None:
    other = folder / "base-misfit"
    shutil.copytree(base, other)
    config = json.loads((other / "hf" / "config.json").read_text())
    (other / "hf" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError) as caught:
        trained("misfit", base=other)
    assert "decoder.layers.mlp.linear_fc1.weight" in str(caught.value)


def test_a_base_that_is_not_there_is_wrong_input(folder: Path, trained: Train) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        trained("baseless", base=folder / "nowhere")
    assert not (folder / "baseless").exists()
