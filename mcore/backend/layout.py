"""How a model is divided over processes. No torch, so that a plan can check a layout before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcore.errors import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Processes that share one copy of a model. Field names are megatron-core's."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Processes that the layers are divided over (PP)."""
    sequence_parallel: bool = False
    """Divide norms and residuals along the sequence over the TP group."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that one copy of the model takes."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def problems(
        self, hf_config: Mapping[str, Any], *, padded_vocab_size: int, seq_length: int | None = None
    ) -> list[Problem]:
        """Everything that keeps a model from being divided this way; empty if it can be.

        Args:
            hf_config: The model's `config.json`.
            padded_vocab_size: Rows of the embedding in megatron-core.
            seq_length: Tokens a sample has; checked with sequence parallelism.
        """
        heads = hf_config["num_attention_heads"]
        divided_by_tp = [
            ("num_attention_heads", heads),
            ("num_key_value_heads", hf_config.get("num_key_value_heads") or heads),
            ("intermediate_size", hf_config["intermediate_size"]),
            ("padded vocabulary size", padded_vocab_size),
        ]
        if self.sequence_parallel and seq_length is not None:
            divided_by_tp.append(("sequence length", seq_length))
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        problems = [
            Problem(name, f"a multiple of tensor_model_parallel_size ({tp})", str(size))
            for name, size in divided_by_tp
            if size % tp
        ]
        if hf_config["num_hidden_layers"] % pp:
            layers = str(hf_config["num_hidden_layers"])
            problems.append(Problem("num_hidden_layers", f"a multiple of pipeline_model_parallel_size ({pp})", layers))
        if self.sequence_parallel and tp == 1:
            problems.append(Problem("sequence_parallel", "tensor_model_parallel_size of 2 or more", "1"))
        return problems
