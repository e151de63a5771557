"""How a model is divided over processes. No torch, so that a plan can check a layout before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from configs.schema.train import TrainConfig
from mcore.bridge.dims import ModelDims
from mcore.bridge.families import dims_of
from mcore.errors import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Processes that share one copy of a model. Field names are megatron-core's and Megatron-SWIFT's own."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Processes that the layers are divided over (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Parts that each pipeline process has of the layers, taken in turns with the others' (VPP); None for one."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline process; None for as many as the others have."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline process; None for as many as the others have."""
    context_parallel_size: int = 1
    """Processes that the tokens of a sample are divided over, each with all weights (CP)."""
    expert_model_parallel_size: int = 1
    """Processes that the experts of a layer are divided over (EP)."""
    expert_tensor_parallel_size: int | None = None
    """Processes that share each expert's matrices (ETP); None for as many as share the other matrices (TP)."""
    sequence_parallel: bool = False
    """Divide norms and residuals along the sequence over the TP group."""

    @classmethod
    def of(cls, config: TrainConfig) -> Layout:
        """That of a training run."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def model_parallel_size(self) -> int:
        """Processes that one copy of the model takes."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_parallel_size(self) -> int:
        """Processes that one copy of all experts takes."""
        return self.expert_tensor_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def expert_tensor_size(self) -> int:
        """Processes that share each expert's matrices, whether it is said or follows."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def divides_experts_differently(self) -> bool:
        """Whether copies of an expert lie on other processes than copies of the other weights."""
        return self.expert_model_parallel_size > 1 or self.expert_tensor_size != self.tensor_model_parallel_size

    def process_problems(self, num_processes: int) -> list[Problem]:
        """Everything that keeps a number of processes from having this layout; empty if they can."""
        needed = {
            "tensor x pipeline x context parallel size": self.model_parallel_size,
            "expert tensor x expert x pipeline parallel size": self.expert_parallel_size,
        }
        return [
            Problem("processes", f"a multiple of {multiple} ({text})", str(num_processes))
            for text, multiple in needed.items()
            if num_processes % multiple
        ]

    def problems(
        self, hf_config: Mapping[str, Any], *, padded_vocab_size: int, seq_length: int | None = None
    ) -> list[Problem]:
        """Everything that keeps a model from being divided this way; empty if it can be.

        Args:
            hf_config: The model's `config.json`.
            padded_vocab_size: Rows of the embedding in megatron-core.
            seq_length: Tokens a sample has; checked with sequence and context parallelism.

        Raises:
            ConfigError: The model's sizes can't be read.
        """
        dims = dims_of(hf_config)
        return [
            *self._tensor_problems(dims, padded_vocab_size),
            *self._sequence_problems(seq_length),
            *self._pipeline_problems(dims.num_layers),
            *self._expert_problems(dims),
        ]

    def _tensor_problems(self, dims: ModelDims, padded_vocab_size: int) -> list[Problem]:
        divided = {"num_attention_heads": dims.heads, "num_key_value_heads": dims.groups}
        if not all(dims.is_moe(layer) for layer in range(dims.num_layers)):
            divided["intermediate_size"] = dims.ffn
        if "shared_ffn" in dims.more:
            divided["intermediate size of the shared experts"] = dims.size("shared_ffn")
        divided["padded vocabulary size"] = padded_vocab_size
        return _not_divided(divided, "tensor_model_parallel_size", self.tensor_model_parallel_size)

    def _sequence_problems(self, seq_length: int | None) -> list[Problem]:
        problems = []
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        if seq_length is not None and self.sequence_parallel:
            problems += _not_divided({"sequence length": seq_length}, "tensor_model_parallel_size", tp)
        if seq_length is not None and cp > 1:
            # Each process gets a part from the front and one from the back, so that causal attention costs all alike.
            problems += _not_divided({"sequence length": seq_length}, "2 x context_parallel_size", 2 * cp)
        if self.sequence_parallel and tp == 1:
            problems.append(Problem("sequence_parallel", "tensor_model_parallel_size of 2 or more", "1"))
        return problems

    def _pipeline_problems(self, num_layers: int) -> list[Problem]:
        pp, vpp = self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size
        problems = []
        if vpp is not None and vpp < 2:
            problems.append(Problem("virtual_pipeline_model_parallel_size", "null, or 2 or more", str(vpp)))
        ends = {
            name: getattr(self, name)
            for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
            if getattr(self, name) is not None
        }
        if pp == 1:
            given = ends if vpp is None else {"virtual_pipeline_model_parallel_size": vpp, **ends}
            text = "null, as pipeline_model_parallel_size is 1"
            return problems + [Problem(name, text, str(value)) for name, value in given.items()]
        parts = 1 if vpp is None else vpp
        if not ends:
            name = "pipeline_model_parallel_size" if vpp is None else "pipeline x virtual pipeline parallel size"
            return problems + _not_divided({"num_hidden_layers": num_layers}, name, pp * parts)
        problems += [
            Problem(name, f"a multiple of virtual_pipeline_model_parallel_size ({parts}), at least 1 each", str(layers))
            for name, layers in ends.items()
            if layers < 1 or layers % parts
        ]
        left, others = num_layers - sum(ends.values()), pp - len(ends)
        if others == 0 and left:
            text = f"{' and '.join(ends)} to add up to the model's {num_layers}"
            problems.append(Problem("num_hidden_layers", text, str(sum(ends.values()))))
        elif others and (left <= 0 or left % (others * parts)):
            text = f"more than {' and '.join(ends)} take, by a multiple of {others * parts} for the other processes"
            problems.append(Problem("num_hidden_layers", text, f"{num_layers}, of which {left} are left"))
        return problems

    def training_problems(self, hf_config: Mapping[str, Any]) -> list[Problem]:
        """What keeps a model from being trained this way, though it could be run; empty if it can be.

        Raises:
            ConfigError: The model's sizes can't be read.
        """
        has_experts = any(dims_of(hf_config).moe_layers)
        if not has_experts or self.tensor_model_parallel_size == 1 or self.sequence_parallel:
            return []
        text = "true, as megatron-core trains no experts with tensor_model_parallel_size of 2 or more without it"
        return [Problem("sequence_parallel", text, "false")]

    def _expert_problems(self, dims: ModelDims) -> list[Problem]:
        ep, etp = self.expert_model_parallel_size, self.expert_tensor_size
        if not any(dims.moe_layers):
            sizes = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": self.expert_tensor_parallel_size}
            return [
                Problem(name, "1, as the model has no experts", str(size))
                for name, size in sizes.items()
                if size not in (None, 1)
            ]
        problems = _not_divided({"experts of a layer": dims.size("experts")}, "expert_model_parallel_size", ep)
        width = {"intermediate size of the experts": dims.size("moe_ffn")}
        problems += _not_divided(width, "expert_tensor_parallel_size", etp)
        if dims.more.get("expert_bias") and etp != 1:
            text = "1, as the experts have biases, which megatron-core can't divide"
            problems.append(Problem("expert_tensor_parallel_size", text, str(etp)))
        return problems


def _not_divided(sizes: Mapping[str, int], divisor_name: str, divisor: int) -> list[Problem]:
    return [
        Problem(name, f"a multiple of {divisor_name} ({divisor})", str(size))
        for name, size in sizes.items()
        if size % divisor
    ]
