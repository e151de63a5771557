"""What both models compute, part by part: logits, and the output of embedding, attention, MLP and final norm.

Hooks sit on the same places of both models, where their outputs mean the same: each attention and each MLP before the
residual is added, so that a fault shows at the part that has it and not only behind it.

A sequence classifier's logits are those at every position and, behind them, those that it answers with. Behind the
logits of a model with layers for further tokens (MTP) stand those of each such layer.

Shapes: S positions of one prompt, B = 1, H hidden size, V vocabulary without padding, P with padding, L labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mcore.backend.heads import ClassificationHead, last_token_logits
from mcore.backend.mtp import GPTModelWithMtp
from mcore.bridge.families.classifier import SUFFIX
from mcore.bridge.hf_config import read_hf_config
from mcore.bridge.hf_quantised import quantisation_of
from mcore.errors import ConfigError, Problem
from mcore.verify.dequantise import load_dequantised
from mcore.verify.further_tokens import attach_further_layers, hf_further_logits
from mcore.verify.prompts import Prompt
from mcore.verify.with_peft import put_on

HEAD = "head"


@dataclass(frozen=True, slots=True)
class Trace:
    """One model on one prompt.

    `points` maps a part's name to its output `[S, H]`, in the order of computation; `logits` is `[S, V]` of a Hugging
    Face model, `[S, P]` of a megatron-core one, `[S + 1, L]` of a classifier; S more rows for each further token. All
    fp32, in main memory.
    """

    prompt: Prompt
    points: Mapping[str, Tensor]
    logits: Tensor


def load_hf_model(
    hf: Path, device: torch.device, dtype: torch.dtype = torch.float32, *, adapter: Path | None = None
) -> Any:
    """The transformers model of a folder, with its plainest attention. Quantised weights are dequantised to bfloat16.

    Args:
        hf: Hugging Face folder.
        device: Where to put the model.
        dtype: Of its weights and activations.
        adapter: Folder of an adapter that PEFT puts on it.

    Raises:
        ConfigError: The folder does not load, or some weights would keep their random initial values.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    is_classifier = str((read_hf_config(hf).get("architectures") or [""])[0]).endswith(SUFFIX)
    auto_class: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    options = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}
    quantisation = quantisation_of(read_hf_config(hf))
    try:
        found: Any = (
            auto_class.from_pretrained(hf, local_files_only=True, trust_remote_code=False, **options)
            if quantisation is None
            else load_dequantised(hf, quantisation, **options)
        )
    except Exception as exc:  # transformers raises many kinds for a damaged folder
        raise ConfigError("transformers can't load the model", [Problem(str(hf), "a model folder", repr(exc))]) from exc
    model, loaded = found
    problems = [
        Problem(str(name), "a weight in the folder", kind.replace("_", " "))
        for kind in ("missing_keys", "mismatched_keys")
        for name in sorted(map(str, loaded[kind]))
    ]
    if problems:
        raise ConfigError(f"{hf} is no whole model for transformers", problems)
    attach_further_layers(model, hf)
    if adapter is not None:
        put_on(model, adapter)
    return model.eval().to(device)


def hf_traces(
    model: Any, prompts: Sequence[Prompt], device: torch.device, *, with_points: bool = True
) -> Iterator[Trace]:
    """Run a transformers model on every prompt. `with_points` False keeps the logits only.

    Raises:
        ConfigError: The model can't run.
    """
    base = model.base_model
    modules = {"embedding": base.embed_tokens}
    for number, layer in enumerate(base.layers):
        attention, mlp = _branches(layer)
        modules |= {f"layers.{number}.attention": attention, f"layers.{number}.mlp": mlp}
    modules["final_norm"] = base.norm
    heads = {HEAD: model.score} if hasattr(model, "score") else {}
    rotary = getattr(base, "rotary_emb", None)
    for prompt in prompts:
        # One with frequencies that depend on the length would keep those of the longest prompt so far.
        base.rotary_emb = copy.deepcopy(rotary)
        ids_BS = torch.tensor([prompt.token_ids], device=device)
        with (
            torch.inference_mode(),
            _outputs_of((modules if with_points else {}) | heads, _hf_hidden) as points,
            _outputs_of({"last": base.norm}, _hf_hidden) as hidden,
        ):
            logits = _hf_logits(model, ids_BS)
            hidden_BSH = hidden["last"][None].to(ids_BS.device, logits.dtype)
            further = [_kept(of_depth[0]) for of_depth in hf_further_logits(model, ids_BS, hidden_BSH)]
        if heads:
            yield Trace(prompt, points, torch.cat([points.pop(HEAD), _kept(logits)]))
        else:
            yield Trace(prompt, points, torch.cat([_kept(logits[0]), *further]))


def _hf_logits(model: Any, ids_BS: Tensor) -> Tensor:
    try:
        logits: Tensor = model(input_ids=ids_BS, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as exc:  # a config that loads may still make a model that can't run
        text = f"{type(exc).__name__}: {exc}"[:500]
        problem = Problem(f"transformers' {type(model).__name__}", "logits of a prompt", text)
        raise ConfigError("transformers can't run the model", [problem]) from exc
    return logits


def mcore_traces(
    model: Any,
    prompts: Sequence[Prompt],
    device: torch.device,
    *,
    with_points: bool = True,
    pad_token_id: int | None = None,
) -> Iterator[Trace]:
    """Run a megatron-core `GPTModel` that holds all layers and rows (TP and PP of 1) on every prompt.

    `pad_token_id` is the transformers model's: a classifier answers at the last token that is another one.
    """
    modules = {"embedding": model.embedding}
    for number, layer in enumerate(model.decoder.layers):
        modules |= {f"layers.{number}.attention": layer.self_attention, f"layers.{number}.mlp": layer.mlp}
    modules["final_norm"] = model.decoder.final_layernorm
    for prompt in prompts:
        ids_BS = torch.tensor([prompt.token_ids], device=device)
        positions_BS = torch.arange(ids_BS.shape[1], device=device)[None]
        with (
            torch.inference_mode(),
            _outputs_of(modules if with_points else {}, _mcore_hidden) as points,
            _outputs_of({"last": modules["final_norm"]}, _mcore_hidden) as hidden,
        ):
            logits_BSP = model(ids_BS, positions_BS, None)
            logits_SP = _kept(logits_BSP[0])
            if isinstance(model, GPTModelWithMtp):
                hidden_SBH = hidden["last"][:, None].to(ids_BS.device, logits_BSP.dtype)
                further = model.further_logits(ids_BS, positions_BS, hidden_SBH)
                logits_SP = torch.cat([logits_SP, *(_kept(of_depth[0]) for of_depth in further)])
        if isinstance(model.output_layer, ClassificationHead):
            logits_SP = torch.cat([logits_SP, _kept(last_token_logits(logits_BSP, ids_BS, pad_token_id))])
        yield Trace(prompt, points, logits_SP)


def _branches(layer: Any) -> tuple[nn.Module, nn.Module]:
    """The modules of a transformers layer whose outputs are added to the residual: attention and MLP, or norms behind.

    `post_attention_layernorm` says little: beside a norm behind the MLP it stands behind the attention, else before
    the MLP.
    """
    if hasattr(layer, "post_feedforward_layernorm"):  # Gemma 2 and 3, OLMo-2
        return layer.post_attention_layernorm, layer.post_feedforward_layernorm
    if hasattr(layer, "post_mlp_layernorm"):  # GLM-4
        return layer.post_self_attn_layernorm, layer.post_mlp_layernorm
    return layer.self_attn, layer.mlp


@contextmanager
def _outputs_of(modules: Mapping[str, nn.Module], hidden: Callable[[Any], Tensor]) -> Iterator[dict[str, Tensor]]:
    """Collect `hidden` of each module's output while the block runs, by name, in the order of computation."""
    points: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            points[name] = _kept(hidden(output))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield points
    finally:
        for handle in handles:
            handle.remove()


def _hf_hidden(output: Any) -> Tensor:
    """`[S, H]` of a transformers module's output: `[1, S, H]`, alone or first of several."""
    hidden_BSH: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_BSH[0]


def _mcore_hidden(output: Any) -> Tensor:
    """`[S, H]` of a megatron-core module's output: `[S, 1, H]`, alone or with a bias that is to be added later."""
    hidden_SBH, bias_H = output if isinstance(output, tuple) else (output, None)
    summed_SBH: Tensor = hidden_SBH if bias_H is None else hidden_SBH + bias_H
    return summed_SBH[:, 0]


def _kept(tensor: Tensor) -> Tensor:
    """A copy in main memory: megatron-core adds residuals in place, right into what a hook has seen."""
    return tensor.detach().to("cpu", torch.float32, copy=True)
