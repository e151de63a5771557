"""What a run starts from: a converted checkpoint, or a Hugging Face folder whose weights go straight into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

from configs.schema.run import RunConfig
from mcore.backend.load import load_weights, padded_vocab_size
from mcore.bridge.families import dims_of
from mcore.bridge.further_tokens import config_of_files
from mcore.bridge.hf_config import CONFIG_FILE, HF_FOLDER, read_hf_config
from mcore.bridge.hf_headers import scan_headers
from mcore.bridge.live import load_safetensors
from mcore.errors import ConfigError, Problem
from mcore.select import select_checkpoint


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a run starts from.

    Attributes:
        hf_config: Mapping of its `config.json`.
        hf: Folder of its small files: config, tokenizer, chat template.
        weights: Folder of its weights: that of an iteration, or `hf`.
        padded_vocab_size: Rows of the embedding in megatron-core.
    """

    hf_config: Mapping[str, Any]
    hf: Path
    weights: Path
    padded_vocab_size: int

    @property
    def is_safetensors(self) -> bool:
        """Whether the weights are a Hugging Face folder's own."""
        return self.weights == self.hf

    def fill(self, modules: Sequence[GPTModel]) -> None:
        """Load the weights into this rank's parts of the model; all ranks call it.

        Raises:
            InputError: The folder does not hold this model.
            CheckpointError: The checkpoint can't be read or does not hold this model, or weights are NaN.
        """
        if self.is_safetensors:
            load_safetensors(modules, self.hf)
        else:
            load_weights(modules, self.weights)


def open_base(folder: Path, run: RunConfig) -> Base:
    """The base in a folder, of the kind that `train.load_safetensors` says. No weights are read.

    Args:
        folder: A checkpoint with `release/` and `hf/` as `mcore.bridge convert` makes it; with `load_safetensors` a
            Hugging Face folder.
        run: Tells also what the vocabulary is padded to, if no conversion has done so.

    Raises:
        ConfigError: The folder is of the other kind.
        SourceError: It has no config of a model.
        CheckpointError: There is no complete checkpoint in it.
    """
    if run.train.load_safetensors != (folder / CONFIG_FILE).is_file() and folder.is_dir():
        kinds = ("a converted checkpoint", "a Hugging Face folder, with config.json in it")
        expected, other = kinds if not run.train.load_safetensors else kinds[::-1]
        value = str(not run.train.load_safetensors).lower()
        raise ConfigError(
            "the run can't start from this",
            [Problem(str(folder), expected, fix=f"Or set train.load_safetensors: {value} to start from {other}.")],
        )
    if not run.train.load_safetensors:
        hf = folder / HF_FOLDER
        config = read_hf_config(hf)
        weights = select_checkpoint(folder).path
        return Base(config, hf, weights, padded_vocab_size(weights))
    config = config_of_files(read_hf_config(folder), scan_headers(folder).tensors)
    dims = dims_of(config, make_vocab_size_divisible_by=run.convert.make_vocab_size_divisible_by)
    return Base(config, folder, folder, dims.padded_vocab)
