"""Training in FP8 on a GPU against the same in bf16. Skips by itself where there is no GPU for it.

PYTHONPATH=. python -m pytest tests/gpu/test_fp8_gpu.py
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from mcore.backend.layout import Layout
from mcore.backend.parallel import parallel_processes
from mcore.metrics import read_metrics
from mcore.train import fp8_state
from mcore.train.run import train
from tests.gpu.test_backend_gpu import HAVE_TE
from tests.tiny_runs import make_base, recorded, tiny_run

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAVE_TE or CAPABILITY < (8, 9), reason="needs transformer_engine and a GPU with FP8"),
]

RECIPES = ("delayed", "tensorwise", pytest.param("blockwise", marks=pytest.mark.skipif(CAPABILITY < (9, 0), reason="")))
BF16: dict[str, Any] = {"backend": "transformer_engine", "torch_dtype": "bfloat16"}
LONG = BF16 | {"train_iters": 200, "lr": 1e-4, "min_lr": 1e-5, "eval_steps": 200, "save_steps": 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fp8")
    for name in ("llama", "qwen3_moe"):
        make_base(folder / name, name)
    with parallel_processes(Layout()):
        yield folder


@pytest.fixture(autouse=True)
def _no_scales_of_others() -> Iterator[None]:
    """Transformer Engine remembers a process' layers, also those of runs before."""
    yield
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def losses(folder: Path, name: str, base: str = "llama", **settings: Any) -> list[float]:
    train(tiny_run(folder, **settings), folder / base, folder / name)
    return recorded(read_metrics(folder / name / "metrics.jsonl"), "loss")


@pytest.fixture(scope="module")
def in_bf16(folder: Path) -> list[float]:
    return losses(folder, "bf16", **LONG)


@pytest.mark.parametrize(("fp8_format", "packing"), [("hybrid", True), ("hybrid", False), ("e4m3", True)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_200_steps_learn_what_they_do_in_bf16(
    folder: Path, in_bf16: list[float], recipe: str, fp8_format: str, packing: bool
) -> None:
    name = f"{recipe}-{fp8_format}-{packing}"
    found = losses(folder, name, fp8_format=fp8_format, fp8_recipe=recipe, packing=packing, **LONG)
    assert found != in_bf16, "nothing was multiplied in FP8"
    assert mean(in_bf16[-20:]) < 0.95 * mean(in_bf16[:20]), "nothing is learnt"
    assert mean(found) == pytest.approx(mean(in_bf16), rel=5e-3)
    assert mean(found[-20:]) == pytest.approx(mean(in_bf16[-20:]), rel=1e-2)  # of fewer steps, so with more noise


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_goes_on_with_its_scales(folder: Path, recipe: str) -> None:
    settings = BF16 | {"fp8_format": "hybrid", "fp8_recipe": recipe, "save_steps": 6}
    undisturbed = losses(folder, f"whole-{recipe}", **settings)
    resumed = folder / f"resumed-{recipe}"
    shutil.copytree(folder / f"whole-{recipe}", resumed)
    shutil.rmtree(resumed / "iter_0000012")
    (resumed / "latest_checkpointed_iteration.txt").write_text("6")
    (resumed / "metrics.json").unlink()
    again = losses(folder, resumed.name, **settings)
    # The first step behind the checkpoint is the same product to the bit only if weights and scales are.
    assert again[:7] == undisturbed[:7]
    assert again == pytest.approx(undisturbed, abs=2e-2)


def test_scales_of_earlier_steps_are_in_the_checkpoint(folder: Path) -> None:
    """Control of the test above: without them the step behind it is another one."""
    settings = BF16 | {"fp8_format": "hybrid", "fp8_recipe": "delayed", "save_steps": 6}
    undisturbed = losses(folder, "control", **settings)
    resumed = folder / "control-resumed"
    shutil.copytree(folder / "control", resumed)
    shutil.rmtree(resumed / "iter_0000012")
    (resumed / "latest_checkpointed_iteration.txt").write_text("6")
    (resumed / "metrics.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_state, "SCALES", {})
        again = losses(folder, resumed.name, **settings)
    assert again[:6] == undisturbed[:6] and again[6] != undisturbed[6]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "delayed"])
def test_experts_learn_and_are_saved(folder: Path, recipe: str) -> None:
    settings = BF16 | {"save_steps": 6, "lr": 1e-4}
    plain = losses(folder, f"experts-bf16-{recipe}", "qwen3_moe", **settings)
    found = losses(folder, f"experts-{recipe}", "qwen3_moe", fp8_format="hybrid", fp8_recipe=recipe, **settings)
    assert mean(found) == pytest.approx(mean(plain), rel=2e-2)
    assert (folder / f"experts-{recipe}" / "iter_0000012").is_dir()


def test_adapters_learn_on_a_base_in_fp8(folder: Path) -> None:
    settings = BF16 | {"tuner_type": "lora", "lora_rank": 4, "lora_dropout": 0.0, "lr": 0.01}
    plain = losses(folder, "lora-bf16", **settings)
    found = losses(folder, "lora-fp8", fp8_format="hybrid", fp8_recipe="tensorwise", **settings)
    assert found != plain and mean(found) == pytest.approx(mean(plain), rel=1e-2)
