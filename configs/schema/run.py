"""A run: one YAML file, one frozen model. It is also the parameter of the Prefect flow, so the UI draws its form."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from configs.schema.base import StrictModel
from configs.schema.convert import ConvertConfig, VerifyConfig
from configs.schema.data import DataConfig
from configs.schema.evaluate import EvaluateConfig
from configs.schema.export import ExportConfig
from configs.schema.launch import LaunchConfig
from configs.schema.model import ModelConfig
from configs.schema.promote import PromoteConfig
from configs.schema.select import SelectConfig
from configs.schema.train import TrainConfig


class RunConfig(StrictModel):
    """Everything that one run needs: a base model, data, and what to do with them."""

    # Digits first: Prefect's command line shows what its server says with rich, which takes `[a-z…]` for a style.
    name: str = Field(pattern=r"^[0-9a-z][0-9a-z_.-]{0,63}$")
    """Name of the run: lowercase letters, digits, `_`, `.`, `-`. Its report and result live under it in the store."""
    model: ModelConfig
    """The base model."""
    convert: ConvertConfig = ConvertConfig()
    """Hugging Face to megatron-core."""
    verify: VerifyConfig = VerifyConfig()
    """The proof behind convert and export."""
    data: DataConfig
    """Training and validation data."""
    train: TrainConfig
    """Training."""
    select: SelectConfig = SelectConfig()
    """Choice of the checkpoint."""
    export: ExportConfig = ExportConfig()
    """megatron-core to Hugging Face."""
    evaluate: EvaluateConfig | None = None
    """Evaluation in vLLM; left out if unset."""
    promote: PromoteConfig | None = None
    """What an alias of the registry moves to when every gate has said yes; no alias moves if unset."""
    launch: LaunchConfig = LaunchConfig()
    """Where and how child processes run."""

    @model_validator(mode="after")
    def _layout_divides(self) -> Self:
        problems = layout_problems(
            self.launch.num_processes,
            self.train.model_parallel_size,
            self.train.micro_batch_size,
            self.train.global_batch_size,
            expert_parallel_size=self.train.expert_parallel_size,
            interleaved_stages=self.train.interleaved_stages,
            nnodes=self.launch.nnodes,
        )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _samples_fit_rows(self) -> Self:
        length, longest = self.train.packing_length, self.data.max_length
        if length is not None and length < longest:
            raise ValueError(f"train.packing_length ({length}) must be at least data.max_length ({longest})")
        return self

    @property
    def packing_length(self) -> int | None:
        """Tokens of a row that samples are packed into; None if they are padded."""
        return (self.train.packing_length or self.data.max_length) if self.train.packing else None

    @model_validator(mode="after")
    def _adapter_is_exported(self) -> Self:
        problems = []
        if not self.export.merge_lora and self.train.tuner_type != "lora":
            problems.append("export.merge_lora: false needs train.tuner_type: lora")
        if not self.export.merge_lora and self.export.torch_dtype != "auto":
            problems.append("export.torch_dtype needs export.merge_lora: true; an adapter is written as it was trained")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _promotion_has_a_gate(self) -> Self:
        gated = self.evaluate is not None and (
            self.evaluate.min_pass_rate is not None or self.evaluate.max_regression is not None
        )
        if self.promote is not None and not gated:
            raise ValueError(
                "promote needs evaluate, with evaluate.min_pass_rate or evaluate.max_regression: without a gate on its "
                "answers nothing says that a model is good enough"
            )
        return self

    @property
    def promoted_as(self) -> str:
        """Name that the registry knows the model by."""
        return (self.promote and self.promote.model) or self.name

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model that train on different samples."""
        return self.launch.num_processes // self.train.model_parallel_size


def layout_problems(
    num_processes: int,
    model_parallel_size: int,
    micro_batch_size: int | None,
    global_batch_size: int | None,
    *,
    expert_parallel_size: int = 1,
    interleaved_stages: int = 1,
    nnodes: int = 1,
) -> list[str]:
    """What is wrong between the number of processes, the layout and the batch sizes.

    Args:
        num_processes: Processes on all machines.
        model_parallel_size: Those of them that one copy of the model takes.
        micro_batch_size: Samples a process computes at once; None if that is not known.
        global_batch_size: Samples a step; None if that is not known.
        expert_parallel_size: Processes that one copy of all experts takes.
        interleaved_stages: Pipeline processes, if they have virtual stages; else 1.
        nnodes: Machines.
    """
    problems = []
    data_parallel_size, rest = divmod(num_processes, model_parallel_size)
    subject = f"launch.nproc_per_node ({num_processes})"
    if nnodes > 1:
        subject = f"launch.nnodes x nproc_per_node ({nnodes} x {num_processes // nnodes} = {num_processes})"
    if rest:
        problems.append(
            f"{subject} must be a multiple of tensor_model_parallel_size x "
            f"pipeline_model_parallel_size x context_parallel_size ({model_parallel_size})"
        )
    if num_processes % expert_parallel_size:
        problems.append(
            f"{subject} must be a multiple of expert_tensor_parallel_size x "
            f"expert_model_parallel_size x pipeline_model_parallel_size ({expert_parallel_size})"
        )
    if micro_batch_size is None or global_batch_size is None:
        return problems
    if rest:
        if global_batch_size % micro_batch_size:  # wrong with any number of processes
            problems.append(
                f"train.global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size "
                f"({micro_batch_size})"
            )
    elif global_batch_size % (samples := micro_batch_size * data_parallel_size):
        problems.append(
            f"train.global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size x "
            f"data parallel size ({micro_batch_size} x {data_parallel_size} = {samples})"
        )
    elif global_batch_size // samples % interleaved_stages:
        problems.append(
            f"train.global_batch_size ({global_batch_size}) must be a multiple of micro_batch_size x data parallel "
            f"size x pipeline_model_parallel_size ({samples} x {interleaved_stages} = {samples * interleaved_stages}), "
            "as virtual_pipeline_model_parallel_size is set"
        )
    return problems
