"""Bytes that a process keeps of a micro-batch's activations for the backward pass. No torch here.

Every term is what a layer's functions save, a token at a time; `a` below is the activations' dtype in bytes. With
backend `torch` it is what `torch.autograd.graph.saved_tensors_hooks` sees (tests/unit/mcore/train/test_memory.py); what
Transformer Engine keeps was concluded from peaks on an H100 (docs/benchmarks/memory.md).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Self

from configs.schema.train import TrainConfig
from mcore.backend.layout import Layout
from mcore.bridge.dims import ModelDims
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.features import Features
from mcore.train.flops import active_experts

FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """What layers keep of each token of a process' micro-batch.

    Attributes:
        dims: The model's sizes.
        features: What else the model has.
        layout: How it is divided.
        topk: Experts that a token goes to.
        item: `a`, bytes of a number.
        engine: Whether the layers are Transformer Engine's.
        qk_norms: Whether query and key are normalised.
        explicit: Whether attention holds the scores of all pairs of tokens.
        longest: Tokens of the longest sample.
        has_shared_gate: Whether what shared experts put out goes through a gate.
        keeps_fp8: Whether linear layers keep their inputs in FP8, for their weights' gradients.
    """

    dims: ModelDims
    features: Features
    layout: Layout
    topk: int
    item: int
    engine: bool
    qk_norms: bool
    explicit: bool
    longest: int
    has_shared_gate: bool
    keeps_fp8: bool

    @classmethod
    def of(cls, config: TrainConfig, hf_config: Mapping[str, Any], *, engine: bool, on_gpu: bool, longest: int) -> Self:
        """Those of a run.

        Raises:
            ConfigError: The model is not known, or its sizes can't be read.
        """
        family, dims = family_of_config(hf_config), dims_of(hf_config)
        features, arguments = family.features(hf_config), family.transformer_config(hf_config)
        scores = features.attention_softcap is not None or features.has_sinks
        # torch's kernel for a CPU takes values of the keys' size only.
        uneven = "qk_dim" in dims.more and dims.size("qk_dim") != dims.size("v_dim") and not on_gpu
        return cls(
            dims=dims,
            features=features,
            layout=Layout.of(config),
            topk=active_experts(hf_config),
            item=2 if config.torch_dtype == "bfloat16" else 4,
            engine=engine,
            qk_norms=features.qk_norm_over == "projection"
            or (bool(arguments.get("qk_layernorm")) and "qk_dim" not in dims.more),
            explicit=not engine and (scores or uneven),
            longest=longest,
            has_shared_gate=bool(arguments.get("moe_shared_expert_gate")),
            # Adapters read their inputs in bf16, and frozen weights get no gradients.
            keeps_fp8=config.fp8_format is not None and config.tuner_type == "full",
        )

    def layer(self, layer: int, recomputed: Container[str] = ()) -> float:
        """Bytes a token of one decoder layer.

        Args:
            layer: Its number.
            recomputed: `recompute_modules` in force. They keep their inputs, which others keep anyhow, and no more:
                attention, MLP, routed and shared experts, the shared ones alone, up-projections of latents.
        """
        num_norms = 4 if self.features.norm_placement == "around" else 2
        is_moe = self.dims.is_moe(layer)
        kept = num_norms * self._norm(self.dims.hidden)
        if not ("qk_dim" in self.dims.more and "mla_up_proj" in recomputed):
            kept += self._projections(explicit=self.explicit and "core_attn" not in recomputed)
        if "core_attn" not in recomputed:
            kept += self.core_attention()
        if is_moe and "moe" not in recomputed:
            kept += self._experts(recomputed)
        if not is_moe and "mlp" not in recomputed:
            kept += self._mlp(self.dims.ffn)
        return kept - (self._saved_by_fp8(is_moe=is_moe, recomputed=recomputed) if self.keeps_fp8 else 0.0)

    def _saved_by_fp8(self, *, is_moe: bool, recomputed: Container[str]) -> float:
        """What is kept in 1 byte instead of `a`: norms' outputs, and inputs of the MLP's output layer.

        The input of attention's output layer is kept by attention as well, so that its copy in FP8 is more (1 * q); so
        is what a router or several projections of latents read. Of experts: both inputs of each token's copies.
        """
        dims, tp, saved = self.dims, self.layout.tensor_model_parallel_size, self.item - 1
        has_latents = "qk_dim" in dims.more
        in_fp8 = 0.0 if has_latents else dims.hidden / self._sequence()
        if not is_moe:
            in_fp8 += dims.hidden / self._sequence() + (dims.ffn / tp if "mlp" not in recomputed else 0)
        elif "moe" not in recomputed:
            copies = self.topk * self.layout.expert_tensor_size / self._sequence()
            in_fp8 += copies * (dims.hidden + dims.size("moe_ffn") / self.layout.expert_tensor_size)
        return saved * in_fp8 - self._attention_width() / tp

    def boundary(self) -> float:
        """Bytes a token of a layer's input, `a * H`: what a recomputed layer keeps."""
        return self.item * self.dims.hidden / self._sequence()

    def final_norm(self) -> float:
        """Bytes a token of the norm behind the last layer, whose output only the loss reads."""
        return self._norm(self.dims.hidden) - self.boundary()

    def gradients(self, layer: int) -> float:
        """Bytes a token of gradients at once in a layer's backward pass: of the MLP, `4a * width + 3a * H`."""
        dims, tp = self.dims, self.layout.tensor_model_parallel_size
        width = dims.size("moe_ffn") * self.topk if dims.is_moe(layer) else dims.ffn
        return self.item * (4 * width / tp + 3 * dims.hidden)

    def core_attention(self) -> float:
        """Output and logarithms of sums, `a * q + 4 * heads`; without a fused kernel the scores of all pairs.

        The scores are held as fp32 numbers: softmax's result (4), with caps those behind tanh and before it too.
        """
        heads = self.dims.heads / self.layout.tensor_model_parallel_size
        if not self.explicit:
            return self.item * self._attention_width() / self.layout.tensor_model_parallel_size + FP32 * heads
        of_score = FP32
        if self.features.attention_softcap is not None or self.features.has_sinks:
            of_score = FP32 + self.item + 1
            of_score += 2 * self.item if self.features.attention_softcap is not None else 0
        return of_score * heads * self.longest

    def _sequence(self) -> int:
        """By how many the tokens outside of attention and MLP are divided."""
        return self.layout.tensor_model_parallel_size if self.layout.sequence_parallel else 1

    def _norm(self, size: int) -> float:
        """Input in fp32 (4), its normalised form (a), the output, which linear layers read (a); engine: in and out."""
        whole = 2 * self.item * size + FP32 if self.engine else (FP32 + 2 * self.item) * size + FP32
        return whole / self._sequence()

    def _attention_width(self) -> int:
        return self.dims.heads * self.dims.size("v_dim") if "v_dim" in self.dims.more else self.dims.q_rows

    def _projections(self, *, explicit: bool) -> float:
        """What attention reads, and the input of its output layer (a * q).

        torch: query and key behind the rotary embedding, and the joint projection, of which values are a part. Norms of
        heads keep fp32 inputs and normalised forms.
        """
        tp, a = self.layout.tensor_model_parallel_size, self.item
        if "qk_dim" in self.dims.more:
            return self._latents(explicit=explicit)
        q, kv = self.dims.q_rows, self.dims.kv_rows
        kept = a * (q + 2 * kv) if self.engine else a * (q + kv) + a * (q + 2 * kv)
        kept += 0 if self.engine else a * q
        if self.qk_norms:
            rows = q + kv if a < FP32 or self.engine else q
            kept += (a if self.engine else FP32) * rows + (0 if self.engine else a * (q + kv))
            kept += FP32 * (self.dims.heads + self.dims.groups)
        return kept / tp

    def _latents(self, *, explicit: bool) -> float:
        """Latents with their norms; queries, keys and values of all heads, in fp32 where scores are held."""
        tp, a, size = self.layout.tensor_model_parallel_size, self.item, self.dims.size
        # The norm's output is read whole by every process: latents are not divided among them.
        norms = self._norm(size("kv_lora")) + (self._norm(size("q_lora")) if size("q_lora") else 0)
        heads = self.dims.heads / tp
        of_head = 2 * size("qk_dim") + size("v_dim")
        return norms + (FP32 if explicit else a) * heads * of_head + a * heads * size("v_dim")

    def _mlp(self, width: int) -> float:
        """Gate and up (2a), activated gate (a), up with its offset (a), product (a); fused: gate and up, product."""
        of_number = 3 if self.engine else 5
        return of_number * self.item * width / self.layout.tensor_model_parallel_size

    def _experts(self, recomputed: Container[str]) -> float:
        """Router, tokens of the experts and what experts keep, if all experts get as many tokens.

        Router: its input, and scores, their softmax and a map of each expert (13). Each of a token's `topk` copies: the
        input (a * H), and what an MLP keeps; torch the product before its weight as well (6a). Shared experts: as an
        MLP, and their output for their gate.
        """
        dims, a = self.dims, self.item
        router = (0 if self.engine or a == FP32 else FP32 * dims.hidden) + 13 * dims.size("experts") + 24 * self.topk
        width = a * dims.size("moe_ffn") / self.layout.expert_tensor_size
        of_copy = a * dims.hidden + (3 if self.engine else 6) * width + FP32
        copies = self.topk * self.layout.expert_tensor_size / self._sequence()
        kept = router / self._sequence() + copies * of_copy
        if dims.more.get("shared_ffn"):
            kept += self._mlp(dims.size("shared_ffn")) if "shared_experts" not in recomputed else 0.0
            kept += a * dims.hidden / self._sequence() if self.has_shared_gate else 0.0
        elif not self.engine and a < FP32:
            kept -= a * dims.hidden / self._sequence()  # nothing reads the norm's output again
        return kept


def in_flight(layout: Layout, stage: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, as multiples of all its layers.

    1F1B: the stages behind it and itself. With virtual stages, parts of a micro-batch: twice the stages behind, the
    other parts of as many micro-batches as there are stages, and one.
    """
    pp, parts = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    if parts is None:
        return min(pp - stage, num_micro_batches)
    held = (pp - stage - 1) * 2 + (parts - 1) * pp + 1
    return min(held, num_micro_batches * parts) / parts


def kept_of_layers(layers: LayerBytes, config: TrainConfig, numbers: list[int]) -> tuple[float, float]:
    """Bytes a token that layers keep until their backward pass, and what is computed again at once during it."""
    own = [layers.layer(number) for number in numbers]
    if config.recompute_granularity == "none" or not own:
        return sum(own), 0.0
    if config.recompute_granularity == "selective":
        kept = [layers.layer(number, config.recompute_modules) for number in numbers]
        return sum(kept), max(whole - rest for whole, rest in zip(own, kept, strict=True))
    num = config.recompute_num_layers or 1
    if config.recompute_method == "uniform":
        groups = [own[start : start + num] for start in range(0, len(own), num)]
        return ceil(len(own) / num) * layers.boundary(), max(sum(group) for group in groups)
    return min(num, len(own)) * layers.boundary() + sum(own[num:]), max(own[:num])
