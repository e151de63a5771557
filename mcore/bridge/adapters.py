"""LoRA adapters in files: PEFT's folder, and what a checkpoint of a LoRA run holds. No megatron here.

    adapter_config.json           rank, strength and modules, as PEFT has them
    adapter_model.safetensors     `base_model.model.<module>.lora_A.weight` `[r, in]` and `….lora_B.weight` `[out, r]`;
                                  `base_model.model.<tensor>` of modules that learn whole (`modules_to_save`)

A run's folder has the same config file, and its checkpoints the tensors under the same names without the prefix; of
the base they hold nothing. Merged into the base's weights, an adapter is computed in fp64 and rounded once, so that
what comes out does not depend on how the work was divided.

Source: peft 0.21 `utils/save_and_load.py`, `tuners/lora/`.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcore.bridge.dist_files import DistTensor, read_dist_tensors
from mcore.bridge.plan import NO_WEIGHTS, Step
from mcore.errors import ConfigError, Problem, SourceError
from mcore.select import select_checkpoint

CONFIG, WEIGHTS, FOLDER, PREFIX = "adapter_config.json", "adapter_model.safetensors", "adapter", "base_model.model."

MEANING_MORE = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "exclude_modules",
    "trainable_token_indices",
    "fan_in_fan_out",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "velora_config",
)
"""Keys of PEFT's config that make an adapter something else than one `B @ A` of one rank beside each weight."""

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of `init_lora_weights` by name that leave the base's weights alone; other names (PiSSA, OLoRA, LoftQ) stand
for an adapter that belongs to another base."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an `adapter_config.json` says."""

    lora_rank: int
    lora_alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Factor on `B @ A`. Source: rank-stabilised LoRA, arXiv 2312.03732."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)

    def to_json(self, *, lora_dropout: float) -> str:
        """The file's content."""
        content = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": self.lora_rank,
            "lora_alpha": int(self.lora_alpha) if self.lora_alpha == int(self.lora_alpha) else self.lora_alpha,
            "lora_dropout": lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": list(self.target_modules),
            "modules_to_save": list(self.modules_to_save) or None,
            "bias": "none",
        }
        return json.dumps(content, indent=2) + "\n"


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config in a PEFT adapter's folder, or in a LoRA run's.

    Raises:
        SourceError: There is none, or it is no config of an adapter.
        ConfigError: The adapter is of a kind that is not known here; names every key that says so.
    """
    path = folder / CONFIG
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        kind = content.get("peft_type")
        config = AdapterConfig(
            lora_rank=int(content["r"]),
            lora_alpha=float(content["lora_alpha"]),
            use_rslora=bool(content.get("use_rslora", False)),
            target_modules=_names(content.get("target_modules")),
            modules_to_save=_names(content.get("modules_to_save")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise SourceError(f"{folder} holds no LoRA adapter", [Problem(str(path), "PEFT's config", repr(exc))]) from exc
    problems = [Problem(f"{path}: {key}", "nothing", repr(content[key])) for key in MEANING_MORE if content.get(key)]
    if kind != "LORA":
        problems.append(Problem(f"{path}: peft_type", "LORA", repr(kind)))
    start = content.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        problems.append(Problem(f"{path}: init_lora_weights", "true, or a start that changes no weights", repr(start)))
    if content.get("bias", "none") != "none":
        problems.append(Problem(f"{path}: bias", "none", repr(content["bias"])))
    if problems:
        raise ConfigError("the adapter is of a kind that can't be used", problems)
    return config


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def vocabulary_axis(name: str) -> int | None:
    """Axis that is as long as the vocabulary, of a tensor by its name in an adapter; None if there is none."""
    if name.endswith(".lora_embedding_A"):
        return 1
    of_vocabulary = (".embed_tokens.weight", "lm_head.weight")
    return 0 if f".{name}".endswith(of_vocabulary) else None


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter, by name without PEFT's prefix.

    Raises:
        SourceError: The file is missing or damaged.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as exc:
        raise SourceError(f"{folder} holds no LoRA adapter", [Problem(str(path), "safetensors", str(exc))]) from exc


@dataclass(slots=True)
class SavedAdapters:
    """The adapters of a LoRA run's checkpoint, which count on top of the base's weights.

    Attributes:
        config: As in the run's folder.
        config_text: The same, as the file has it.
        matrices: By name; those of modules that learn whole are the module's own.
    """

    config: AdapterConfig
    config_text: str
    matrices: Mapping[str, DistTensor]
    _read: dict[str, Tensor] = field(default_factory=dict)

    def of(self, hf_name: str) -> tuple[str, str] | None:
        """Names of A and B of a weight; None if it has no adapter."""
        module = hf_name.removesuffix(".weight")
        for kinds in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            name_a, name_b = (f"{module}.{kind}" for kind in kinds)
            if name_a in self.matrices:
                return name_a, name_b
        return None

    def touch(self, step: Step) -> bool:
        """Whether any weight of a step has an adapter."""
        return any(name in self.matrices or self.of(name) is not None for name in step.hf_names)

    def merged(self, hf_name: str, rows: slice, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a weight `[rows, in]` with its adapter, if it has one, in a dtype.

        Args:
            hf_name: Name of the whole weight.
            rows: Which of its rows.
            weight: The base's values of them.
            dtype: Of the result.
        """
        if hf_name in self.matrices:
            return self.matrices[hf_name].read_rows((), rows).to(dtype)
        names = self.of(hf_name)
        if names is None:
            return weight.to(dtype)
        whole_a, whole_b = (self._whole(name).double() for name in names)
        if names[0].endswith("lora_embedding_A"):
            whole_a, whole_b = whole_b.T, whole_a.T
        return (weight.double() + self.config.scale * (whole_b[rows] @ whole_a)).to(dtype)

    def whole(self) -> dict[str, Tensor]:
        """All matrices by name."""
        return {name: tensor.read_rows((), slice(0, tensor.shape[0])) for name, tensor in self.matrices.items()}

    def without_padding(self, vocab_size: int) -> dict[str, Tensor]:
        """All matrices as a PEFT adapter has them, which knows no padding of the vocabulary."""
        cut = {}
        for name, tensor in self.whole().items():
            axis = vocabulary_axis(name)
            cut[name] = (tensor if axis is None else tensor.narrow(axis, 0, vocab_size)).contiguous()
        return cut

    def write(self, folder: Path, *, vocab_size: int) -> None:
        """Make a folder a PEFT adapter's; the padding of the vocabulary is left out."""
        folder.mkdir(exist_ok=True)
        (folder / CONFIG).write_text(self.config_text)
        tensors = {PREFIX + name: tensor for name, tensor in self.without_padding(vocab_size).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def _whole(self, name: str) -> Tensor:
        if name not in self._read:
            if len(self._read) >= 8:  # those of the step before
                self._read.clear()
            tensor = self.matrices[name]
            self._read[name] = tensor.read_rows((), slice(0, tensor.shape[0]))
        return self._read[name]


def weights_and_adapters(checkpoint: Path, iteration_dir: Path, base: Path | None) -> tuple[Path, SavedAdapters | None]:
    """Where a checkpoint's weights are, and the adapters that count on top of them; None if it holds whole weights.

    Args:
        checkpoint: The run's folder.
        iteration_dir: The iteration's in it.
        base: Checkpoint folder that a LoRA run started from.

    Raises:
        SourceError: The run's `adapter_config.json` can't be read.
        ConfigError: It is of another kind, or the base is missing, another one, or of no use.
        CheckpointError: A folder holds no complete checkpoint.
    """
    if not (checkpoint / CONFIG).is_file():
        if base is not None:
            problem = Problem("base", "none, as the checkpoint holds whole weights", str(base))
            raise ConfigError("the checkpoint is no LoRA run's", [problem])
        return iteration_dir, None
    if base is None:
        problem = Problem("base", "the checkpoint that the LoRA run started from", "none", "Name it with --base.")
        raise ConfigError(f"{checkpoint} holds adapters only", [problem])
    weights = select_checkpoint(base).path
    _refuse_another_base(checkpoint, weights)
    tensors = read_dist_tensors(iteration_dir)
    others = {name for pattern in NO_WEIGHTS for name in fnmatch.filter(tensors, pattern)}
    matrices = {key: tensor for key, tensor in tensors.items() if key not in others}
    return weights, SavedAdapters(read_adapter_config(checkpoint), (checkpoint / CONFIG).read_text(), matrices)


def _refuse_another_base(checkpoint: Path, weights: Path) -> None:
    from mcore.train.fingerprint import FILE_NAME, weights_digest

    try:
        wanted = json.loads((checkpoint / FILE_NAME).read_text())["base"]["weights"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        problem = Problem(str(checkpoint / FILE_NAME), "what the run started from", repr(exc))
        raise ConfigError("it can't be told what base the adapters are for", [problem]) from exc
    if weights_digest(weights) != wanted:
        problem = Problem(str(weights), "the weights that the LoRA run started from", "others")
        raise ConfigError("the adapters are for another base", [problem])
