"""A LoRA run's model for the proof of its export: the base with the run's adapters, merged by megatron's own layers.

The folder that is proven was merged file by file, along the family's table. Here the adapters are put on a live model
as training puts them, take the checkpoint's matrices, and each layer adds what it would add to its output to its weight
instead, rounded once to the dtype that the folder has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from mcore.bridge.adapters import SavedAdapters
from mcore.errors import CheckpointError, Problem
from mcore.train.tuners.install import install_adapters
from mcore.train.tuners.options import LoraOptions


@dataclass(frozen=True, slots=True)
class Merged:
    """Adapters of a checkpoint, and torch's names of the dtypes that the exported weights have, by name."""

    saved: SavedAdapters
    dtypes: Mapping[str, str]

    @torch.no_grad()
    def into(self, model: GPTModel, hf_config: Mapping[str, Any]) -> None:
        """Merge the adapters into a model with the base's weights; it must hold the whole model.

        Raises:
            CheckpointError: The checkpoint holds adapters of other modules than its config says.
        """
        config = self.saved.config
        options = LoraOptions(
            config.target_modules,
            config.lora_rank,
            config.lora_alpha,
            use_rslora=config.use_rslora,
            modules_to_save=config.modules_to_save,
        )
        adapters = install_adapters([model], hf_config, options, seed=0)
        wanted, found = adapters.shapes(), {name: tensor.shape for name, tensor in self.saved.matrices.items()}
        if problems := [
            Problem(name, str(wanted.get(name, "nothing")), str(found.get(name, "nothing")))
            for name in sorted(wanted.keys() | found.keys())
            if wanted.get(name) != found.get(name)
        ]:
            raise CheckpointError("the checkpoint does not hold the adapters of its config", problems)
        adapters.load_state_dict(self.saved.whole())
        adapters.merge(lambda name: getattr(torch, self.dtypes[name]))
