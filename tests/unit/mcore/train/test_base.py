from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore.backend.layout import Layout
from mcore.backend.model import build_model
from mcore.backend.parallel import parallel_processes
from mcore.bridge.convert import convert
from mcore.errors import ConfigError, SourceError, WeightPlanError
from mcore.train.base import open_base
from tests.hf_folders import write_hf_folder
from tests.tiny_runs import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    write_hf_folder(folder / "hf", "qwen2")
    write_hf_folder(folder / "other", "qwen3")
    convert(folder / "hf", folder / "mcore", make_vocab_size_divisible_by=128)
    return folder


def test_both_kinds_give_the_same_model(folder: Path) -> None:
    bases = [
        open_base(folder / "mcore", tiny_run(folder)),
        open_base(folder / "hf", tiny_run(folder, load_safetensors=True)),
    ]
    assert bases[0].hf_config == bases[1].hf_config and bases[0].padded_vocab_size == bases[1].padded_vocab_size == 256
    models = []
    with parallel_processes(Layout()):
        for base in bases:
            models.append(
                build_model(
                    base.hf_config,
                    padded_vocab_size=base.padded_vocab_size,
                    layout=Layout(),
                    params_dtype=torch.float32,
                    backend="torch",
                )
            )
            base.fill([models[-1]])
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("name", "load_safetensors"), [("mcore", True), ("hf", False)])
def test_a_folder_of_the_other_kind_is_refused_with_the_way_out(
    folder: Path, name: str, load_safetensors: bool
) -> None:
    run = tiny_run(folder, load_safetensors=load_safetensors)
    with pytest.raises(ConfigError, match=f"train.load_safetensors: {str(not load_safetensors).lower()}"):
        open_base(folder / name, run)


@pytest.mark.parametrize("load_safetensors", [True, False])
def test_no_folder_at_all(folder: Path, load_safetensors: bool) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        open_base(folder / "nowhere", tiny_run(folder, load_safetensors=load_safetensors))


def test_weights_of_another_model_are_named(folder: Path) -> None:
    base = open_base(folder / "other", tiny_run(folder, load_safetensors=True))
    (folder / "other" / "model.safetensors").write_bytes((folder / "hf" / "model.safetensors").read_bytes())
    with parallel_processes(Layout()):
        model = build_model(
            base.hf_config,
            padded_vocab_size=base.padded_vocab_size,
            layout=Layout(),
            params_dtype=torch.float32,
            backend="torch",
        )
        with pytest.raises(WeightPlanError, match=r"q_norm\.weight"):
            base.fill([model])
