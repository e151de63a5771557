"""`train`: parallel training on megatron-core. Field names are megatron-core's and Megatron-SWIFT's own."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.schema.experts import ExpertFields
from configs.schema.fp8 import Fp8Fields
from configs.schema.learning_rate import LearningRateFields
from configs.schema.long_runs import LongRunFields
from configs.schema.lora import LoraFields
from configs.schema.packing import PackingFields
from configs.schema.speed import SpeedFields

PIPELINE_FIELDS = (
    "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)
"""How layers are divided over several pipeline processes."""


class TrainConfig(LoraFields, ExpertFields, LearningRateFields, PackingFields, LongRunFields, SpeedFields, Fp8Fields):
    """One training run: method, layout, batch, schedule, precision, checkpoints."""

    method: Literal["pt", "sft"] = "sft"
    """`pt`: loss on all tokens of `text`; `sft`: loss on the assistant's tokens of `messages`."""
    backend: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Layer implementation. `auto` takes Transformer Engine where CUDA is there and it imports, else torch (SDPA)."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Processes that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Processes that the layers are divided over (PP)."""
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    """Parts that each pipeline process has of the layers, taken in turns with the others' (VPP); null for one."""
    decoder_first_pipeline_num_layers: int | None = Field(default=None, ge=1)
    """Layers of the first pipeline process; null for as many as the others have."""
    decoder_last_pipeline_num_layers: int | None = Field(default=None, ge=1)
    """Layers of the last pipeline process; null for as many as the others have."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Processes that the tokens of each sample are divided over (CP), padded to a multiple of twice this."""
    sequence_parallel: bool = False
    """Divide norms and residuals along the sequence over the TP group; needs TP of 2 or more (SP)."""
    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Processes that the experts of a layer are divided over (EP). They are data parallel to each other otherwise."""
    expert_tensor_parallel_size: int = Field(default=1, ge=1)
    """Processes that share each expert's matrices (ETP), however many share the other matrices."""
    use_distributed_optimizer: bool = True
    """Divide optimizer state over the data parallel group."""

    micro_batch_size: int = Field(default=1, ge=1)
    """Samples a data parallel rank computes at once; with `packing`, rows of `packing_length`."""
    global_batch_size: int = Field(default=16, ge=1)
    """Samples a step over all data parallel ranks; the rest is gradient accumulation."""
    train_iters: int | None = Field(default=None, ge=1)
    """Steps to train. Give this or `num_train_epochs`."""
    num_train_epochs: float | None = Field(default=None, gt=0)
    """Passes over the training rows. Give this or `train_iters`."""

    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's weight decay (not applied to biases and norms)."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest gradient norm; longer gradients are scaled down. 0 turns clipping off."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of Adam's second moment."""
    adam_eps: float = Field(default=1.0e-8, gt=0)
    """Added to Adam's denominator."""
    seed: int = 42
    """Seed of all random numbers in training but the data's."""

    torch_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of parameters and activations. With bfloat16 the optimizer keeps fp32 main weights."""
    cross_entropy_chunk_tokens: int | None = Field(default=4096, ge=1)
    """Trained tokens whose logits are held at once; null for all of a micro-batch. Changes memory and rounding only."""
    gradient_accumulation_fusion: bool | None = None
    """Add weight gradients to the main gradients inside the matrix product. null: with backend `transformer_engine`,
    which alone can."""
    use_precision_aware_optimizer: bool = False
    """Adam of Transformer Engine on the gradients as they are; of the fp32 main weights it keeps only the half that the
    bfloat16 weights lack. Needs CUDA, bfloat16 and the distributed optimizer."""
    main_grads_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed; bfloat16 with `use_precision_aware_optimizer` only."""
    exp_avg_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of Adam's first moment; bfloat16 with `use_precision_aware_optimizer` only."""
    exp_avg_sq_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of Adam's second moment; bfloat16 with `use_precision_aware_optimizer` only."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Which activations are computed again in the backward pass instead of kept."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With `full`: recompute every `recompute_num_layers` layers (`uniform`) or only the first ones (`block`)."""
    recompute_num_layers: int | None = Field(default=None, ge=1)
    """Layers, see `recompute_method`."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe", "shared_experts", "mla_up_proj"], ...] = Field(
        default=("core_attn",), min_length=1
    )
    """With `selective`: what is recomputed of each layer, which may be attention (`core_attn`), the MLP, routed and
    shared experts (`moe`) or the shared ones alone, and the up-projections of latent attention."""

    load_safetensors: bool = False
    """Take the base's weights straight from the Hugging Face folder, each process its own part, instead of from its
    conversion."""
    save_safetensors: bool = False
    """Write every checkpoint also as a Hugging Face folder, `hf_<iteration>/`, from all processes at once."""
    save_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    save_total_limit: int | None = Field(default=None, ge=2)
    """Complete checkpoints kept, the one with the lowest validation loss among them; none are deleted if unset."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between two validation losses; `save_steps` if unset."""
    logging_steps: int = Field(default=1, ge=1)
    """Steps between two lines in `metrics.jsonl`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if (self.train_iters is None) == (self.num_train_epochs is None):
            problems.append("give exactly one of train_iters and num_train_epochs")
        problems += self.learning_rate_problems(self.train_iters)
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            problems.append("sequence_parallel needs tensor_model_parallel_size of 2 or more")
        problems += self._pipeline_problems()
        problems += self.expert_problems()
        problems += self.long_run_problems()
        problems += self.packing_problems()
        lean_moments = [name for name in ("exp_avg_dtype", "exp_avg_sq_dtype") if getattr(self, name) != "float32"]
        problems += self.speed_problems(
            use_distributed_optimizer=self.use_distributed_optimizer,
            lean_moments=lean_moments if self.use_precision_aware_optimizer else None,
        )
        if self.recompute_granularity == "full" and (not self.recompute_method or not self.recompute_num_layers):
            problems.append("recompute_granularity: full needs recompute_method and recompute_num_layers")
        if self.recompute_granularity != "full" and (self.recompute_method or self.recompute_num_layers):
            problems.append("recompute_method and recompute_num_layers belong to recompute_granularity: full")
        if self.recompute_granularity != "selective" and self.recompute_modules != ("core_attn",):
            problems.append("recompute_modules belongs to recompute_granularity: selective")
        problems += self._precision_problems()
        problems += self.fp8_problems(torch_dtype=self.torch_dtype, backend=self.backend, tuner_type=self.tuner_type)
        problems += self.lora_problems()
        if self.packing and self.moe_router_load_balancing_type == "seq_aux_loss":
            problems.append("moe_router_load_balancing_type: seq_aux_loss needs packing: false; routers see whole rows")
        if self.tuner_type == "lora" and self.save_safetensors:
            problems.append("save_safetensors writes whole weights; tuner_type: lora has adapters only")
        if self.tuner_type == "lora" and self.load_safetensors:
            problems.append("load_safetensors needs tuner_type: full; adapters are merged into the converted base")
        if self.tuner_type == "lora" and self.moe_router_bias_update_rate:
            problems.append("moe_router_bias_update_rate needs tuner_type: full; the base of adapters stays as it is")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _pipeline_problems(self) -> list[str]:
        problems = []
        if self.pipeline_model_parallel_size == 1:
            given = [name for name in PIPELINE_FIELDS if getattr(self, name) is not None]
            problems += [f"{name} needs pipeline_model_parallel_size of 2 or more" for name in given]
        return problems

    def _precision_problems(self) -> list[str]:
        problems = []
        if self.gradient_accumulation_fusion and self.backend == "torch":
            problems.append("gradient_accumulation_fusion needs backend transformer_engine")
        if self.use_precision_aware_optimizer:
            if not self.use_distributed_optimizer:
                problems.append("use_precision_aware_optimizer needs use_distributed_optimizer")
            if self.torch_dtype != "bfloat16":
                problems.append("use_precision_aware_optimizer needs torch_dtype: bfloat16")
        else:
            fields = ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
            low = [name for name in fields if getattr(self, name) != "float32"]
            problems += [f"{name}: bfloat16 needs use_precision_aware_optimizer" for name in low]
        return problems

    @property
    def fields_for_transformer_engine(self) -> tuple[str, ...]:
        """Fields that ask for what only Transformer Engine has, on a CUDA device."""
        asked = {
            "backend": self.backend == "transformer_engine",
            "gradient_accumulation_fusion": bool(self.gradient_accumulation_fusion),
            "use_precision_aware_optimizer": self.use_precision_aware_optimizer,
            "fp8_format": self.fp8_format is not None,
            "optimizer_cpu_offload": self.optimizer_cpu_offload,
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)

    @property
    def model_parallel_size(self) -> int:
        """Processes that one copy of the model takes."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def interleaved_stages(self) -> int:
        """Pipeline processes, whose number micro-batches must divide by if there are virtual stages; else 1."""
        return 1 if self.virtual_pipeline_model_parallel_size is None else self.pipeline_model_parallel_size

    @property
    def expert_parallel_size(self) -> int:
        """Processes that one copy of all experts takes."""
        return self.expert_tensor_parallel_size * self.expert_model_parallel_size * self.pipeline_model_parallel_size
