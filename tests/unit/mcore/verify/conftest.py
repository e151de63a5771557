from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mcore.bridge.convert import convert
from mcore.bridge.dist_files import read_dist_tensors
from mcore.bridge.dist_writer import DistWriter
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_config import read_hf_config
from mcore.verify.mutants.tiny_models import write_tiny_model
from mcore.verify.structural import compare_on_disk


@dataclass(frozen=True)
class Pair:
    """The same model on both sides."""

    hf: Path
    mcore: Path

    @property
    def release(self) -> Path:
        return self.mcore / "release"

    def compare_on_disk(self, hf: Path | None = None, release: Path | None = None):
        config = read_hf_config(self.hf)
        return compare_on_disk(
            hf or self.hf,
            release or self.release,
            family=family_of_config(config),
            dims=dims_of(config),
        )

    def changed_hf(self, folder: Path, change) -> Path:
        """A copy of the Hugging Face side with other tensors."""
        folder.mkdir()
        (folder / "config.json").write_bytes((self.hf / "config.json").read_bytes())
        tensors = load_file(self.hf / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def changed_release(self, folder: Path, change, *, num_column_chunks: int = 1) -> Path:
        """A copy of the checkpoint's iteration with other tensors, each in a number of chunks along its last axis."""
        folder.mkdir(parents=True)
        tensors = {
            key: stored.read_rows((), slice(0, stored.shape[0]))
            for key, stored in read_dist_tensors(self.release).items()
        }
        change(tensors)
        writer = DistWriter(folder)
        for key, tensor in tensors.items():
            column = 0
            for chunk in tensor.chunk(num_column_chunks, dim=-1):
                writer.write_chunk(key, tuple(tensor.shape), (*(0,) * (tensor.dim() - 1), column), chunk.contiguous())
                column += chunk.shape[-1]
        writer.finish({"iteration": 0})
        return folder


def _pair(folder: Path, family: str, **changes) -> Pair:
    hf = write_tiny_model(folder / "hf", family, 0, num_hidden_layers=2, **changes)
    convert(hf, folder / "mcore")
    return Pair(hf, folder / "mcore")


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory) -> Pair:
    return _pair(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="session")
def llama_tied(tmp_path_factory) -> Pair:
    return _pair(tmp_path_factory.mktemp("llama_tied"), "llama", tie_word_embeddings=True)
