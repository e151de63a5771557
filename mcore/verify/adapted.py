"""A LoRA run's model for the proof of its export: the base with the run's adapters, merged or beside.

megatron's side puts the adapters on a live model as training puts them, and takes the checkpoint's matrices. A folder
that is proven was merged file by file, along the family's table; against it each layer adds what it would add to its
output to its weight instead, rounded once to the dtype that the folder has. Against an adapter that was not merged the
layers stay as training has them, and transformers' model has the adapter from PEFT (`mcore.verify.with_peft`).
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
class Adapted:
    """Adapters of a checkpoint.

    Attributes:
        saved: The adapters.
        merged_as: torch's names of the dtypes that the merged weights have, by name; None to merge nothing.
    """

    saved: SavedAdapters
    merged_as: Mapping[str, str] | None

    @torch.no_grad()
    def into(self, model: GPTModel, hf_config: Mapping[str, Any]) -> None:
        """Put the adapters on a model with the base's weights, or merge them into it; it must hold the whole model.

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
        if (merged_as := self.merged_as) is not None:
            adapters.merge(lambda name: getattr(torch, merged_as[name]))
