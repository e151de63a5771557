"""The mutants: every mistake in a converter that we know of, each as a wrong conversion of a healthy tiny model.

A mistake sits in one of three places: the weight table (`rows`), the reading of `config.json` (`config`), or the
tensors on their way (`tensors`). Where it can, it sits in the middle of the model: the proof must find it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mcore.bridge.rules import Family
from mcore.verify.mutants import wrong_rows as wrong
from mcore.verify.mutants.wrong_rows import Rows

if TYPE_CHECKING:
    from torch import Tensor

Config = dict[str, Any]
Tensors = dict[str, "Tensor"]
L2 = "model.layers.2."


def nothing(_: Any) -> None:
    """Leave it as it is."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake.

    Args:
        name: Short name, in the order family, part, mistake.
        family: Family of the healthy model (`tiny_models`).
        what: The mistake in words.
        where: The part of the model that the proof must name.
        rows: Makes the wrong weight table of the right one.
        config: Alters `config.json` to what the converter took it for.
        tensors: Alters the Hugging Face tensors to what reached the converter.
        tied: Whether the healthy model's head is its embedding.
    """

    name: str
    family: str
    what: str
    where: str
    rows: Callable[[Rows], Rows] | None = None
    config: Callable[[Config], None] = nothing
    tensors: Callable[[Tensors], None] = nothing
    tied: bool = False

    def table(self, family: Family) -> Family:
        """The family as the wrong converter has it."""
        return replace(family, rules=self.rows(family.rules)) if self.rows else family


def _set(**fields: Any) -> Callable[[Config], None]:
    return lambda config: config.update(fields)


def _set_rope(**fields: Any) -> Callable[[Config], None]:
    return lambda config: config["rope_parameters"].update(fields)


def _plain_rope(config: Config) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}


def _change(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def alter(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name].clone()).contiguous()

    return alter


def _change_each(ending: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def alter(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(ending):
                tensors[name] = change(tensors[name].clone()).contiguous()

    return alter


def _add(row: int, column: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[row, column] += value
        return tensor

    return change


def _zero_row(row: int) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[row] = 0
        return tensor

    return change


def _put(row: int, column: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[row, column] = value
        return tensor

    return change


def _layer_2_repeats_layer_1(tensors: Tensors) -> None:
    for name in tensors:
        if name.startswith(L2):
            tensors[name] = tensors[name.replace(L2, "model.layers.1.")].clone()


def _half_tied(tensors: Tensors) -> None:
    rows = tensors["lm_head.weight"].shape[0] // 2
    tensors["lm_head.weight"][:rows] = tensors["model.embed_tokens.weight"][:rows]


def _head_lost(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


def _through_bfloat16(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16().float()


# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    # What config.json means.
    Mutant("llama_eps", "llama", "norm epsilon 1e-6 for 1e-5", "layers.0.attention", config=_set(rms_norm_eps=1e-6)),
    Mutant("qwen2_eps", "qwen2", "norm epsilon 1e-5 for 1e-6 (megatron's default)", "layers.0.attention",
           config=_set(rms_norm_eps=1e-5)),
    Mutant("qwen3_eps_tied", "qwen3", "norm epsilon 1e-5 for 1e-6, tied model", "layers.0.attention",
           config=_set(rms_norm_eps=1e-5), tied=True),
    Mutant("llama_rope_theta", "llama", "rope theta 10000 for 500000", "layers.0.attention",
           config=_set_rope(rope_theta=10000.0)),
    Mutant("qwen3_rope_theta", "qwen3", "rope theta 10000 for 1000000", "layers.0.attention",
           config=_set_rope(rope_theta=10000.0)),
    Mutant("llama_rope_no_scaling", "llama", "llama3 rope scaling dropped", "layers.0.attention", config=_plain_rope),
    Mutant("llama_rope_factor", "llama", "llama3 rope factor 32 for 8", "layers.0.attention",
           config=_set_rope(factor=32.0)),
    Mutant("llama_rope_high_freq", "llama", "llama3 high_freq_factor 8 for 4", "layers.0.attention",
           config=_set_rope(high_freq_factor=8.0)),
    Mutant("llama_rope_linear", "llama", "linear rope scaling for llama3's", "layers.0.attention",
           config=_set_rope(rope_type="linear")),
    # Rows of the table: all of these pass a bitwise round trip.
    Mutant("llama_qkv_concatenated", "llama", "QKV as [q; k; v], not by group", "layers.0.attention",
           rows=wrong.with_class(wrong.QkvConcatenated, "linear_qkv.weight")),
    Mutant("qwen3_qkv_concatenated", "qwen3", "QKV as [q; k; v], not by group", "layers.0.attention",
           rows=wrong.with_class(wrong.QkvConcatenated, "linear_qkv.weight")),
    Mutant("qwen2_qkv_bias_concatenated", "qwen2", "QKV weight by group, QKV bias as [q; k; v]", "layers.0.attention",
           rows=wrong.with_class(wrong.QkvConcatenated, "linear_qkv.bias")),
    Mutant("llama_qkv_key_first", "llama", "k, v, q in each group", "layers.0.attention",
           rows=wrong.with_class(wrong.QkvKeyFirst, "linear_qkv.weight")),
    Mutant("llama_heads_dealt", "llama", "query heads dealt to the groups in turn", "layers.0.attention",
           rows=wrong.with_class(wrong.QkvDealtHeads, "linear_qkv.weight")),
    Mutant("qwen3_head_swapped", "qwen3", "two query heads change places", "layers.0.attention",
           rows=wrong.with_class(wrong.QkvTwoHeadsSwapped, "linear_qkv.weight")),
    Mutant("llama_rotary_interleaved", "llama", "q and k rows in interleaved rotary order", "layers.0.attention",
           rows=wrong.with_class(wrong.QkvInterleavedRotary, "linear_qkv.weight")),
    Mutant("qwen2_key_value_swapped", "qwen2", "k taken for v", "layers.0.attention",
           rows=wrong.with_hf_names_swapped("{q,k,v}", "{q,v,k}")),
    Mutant("qwen2_gate_up_swapped", "qwen2", "gate taken for up", "layers.0.mlp",
           rows=wrong.with_hf_names_swapped("{gate,up}", "{up,gate}")),
    Mutant("llama_gate_up_interleaved", "llama", "gate and up row by row in turn", "layers.0.mlp",
           rows=wrong.with_class(wrong.GateUpInterleaved, "linear_fc1.weight")),
    Mutant("llama_norms_swapped", "llama", "input norm taken for post-attention norm", "layers.0.attention",
           rows=wrong.with_hf_names_swapped("input_layernorm", "post_attention_layernorm")),
    Mutant("qwen3_qk_norms_swapped", "qwen3", "q_norm taken for k_norm", "layers.0.attention",
           rows=wrong.with_hf_names_swapped("q_norm", "k_norm")),
    Mutant("qwen3_layers_swapped", "qwen3", "layers 1 and 2 change places", "layers.1.attention",
           rows=wrong.with_layers_swapped),
    Mutant("llama_embedding_shifted", "llama", "embedding rows off by one", "embedding",
           rows=wrong.with_class(wrong.VocabRowsShifted, "word_embeddings.weight")),
    Mutant("qwen3_embedding_tail", "qwen3", "the last 15 embedding rows off by one", "embedding",
           rows=wrong.with_class(wrong.VocabTailShifted, "word_embeddings.weight")),
    Mutant("llama_head_tail", "llama", "the last 15 head rows off by one", "head",
           rows=wrong.with_class(wrong.VocabTailShifted, "output_layer.weight")),
    Mutant("qwen2_tied_shifted", "qwen2", "embedding rows off by one, tied model", "embedding",
           rows=wrong.with_class(wrong.VocabRowsShifted, "word_embeddings.weight"), tied=True),
    # Tensors on their way.
    Mutant("qwen2_untied_as_tied", "qwen2", "an untied head is dropped and the embedding used", "head",
           config=_set(tie_word_embeddings=True), tensors=_head_lost),
    Mutant("llama_half_tied", "llama", "half of the head's rows are the embedding's", "head", tensors=_half_tied),
    Mutant("qwen2_qkv_bias_dropped", "qwen2", "QKV bias left at its initial zeros", "layers.0.attention",
           tensors=_change_each("_proj.bias", lambda bias: bias * 0)),
    Mutant("qwen3_q_norm_initial", "qwen3", "q_norm of one layer left at its initial ones", "layers.2.attention",
           tensors=_change(L2 + "self_attn.q_norm.weight", lambda norm: norm * 0 + 1)),
    Mutant("llama_o_proj_transposed", "llama", "square o_proj of one layer transposed", "layers.2.attention",
           tensors=_change(L2 + "self_attn.o_proj.weight", lambda weight: weight.T)),
    Mutant("llama_norm_zero_centred", "llama", "norm weights stored as weight - 1", "layers.0.attention",
           tensors=_change_each("norm.weight", lambda norm: norm - 1)),
    Mutant("qwen3_final_norm_zero_centred", "qwen3", "final norm stored as weight - 1", "final_norm",
           tensors=_change("model.norm.weight", lambda norm: norm - 1)),
    Mutant("llama_layer_repeated", "llama", "layer 2 holds layer 1 again", "layers.2.attention",
           tensors=_layer_2_repeats_layer_1),
    Mutant("qwen2_down_proj_row_lost", "qwen2", "one row of down_proj left at zero", "layers.2.mlp",
           tensors=_change(L2 + "mlp.down_proj.weight", _zero_row(7))),
    Mutant("llama_one_element", "llama", "one element of up_proj is 0.25 off", "layers.2.mlp",
           tensors=_change(L2 + "mlp.up_proj.weight", _add(3, 5, 0.25))),
    Mutant("qwen3_through_bfloat16", "qwen3", "fp32 weights rounded to bfloat16", "embedding",
           tensors=_through_bfloat16),
    Mutant("llama_nan", "llama", "NaN in one element of down_proj", "layers.2.mlp",
           tensors=_change(L2 + "mlp.down_proj.weight", _put(0, 0, float("nan")))),
    Mutant("qwen3_inf_in_head", "qwen3", "infinity in one element of the head", "head",
           tensors=_change("lm_head.weight", _put(100, 9, float("inf")))),
)
# fmt: on
