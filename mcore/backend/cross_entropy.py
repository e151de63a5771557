"""Losses of chosen tokens that never hold all logits: the vocabulary dominates what a small model keeps otherwise.

Tokens are taken in chunks. Logits of a chunk are computed, become losses and at once gradients (of the hidden states,
and of the output weight, summed in fp32 over the chunks), and are gone before the next chunk's are made. So nothing is
computed twice, and the backward pass has only to scale what is there by the one number that all losses count with.
Logits, their caps, masks, division over TP ranks and the cross entropy itself stay megatron-core's and the model's own.

Source: that gradients can be made in the forward pass is known from Liger Kernel's fused linear cross entropy.

Shape suffixes: S sequence, B batch, H hidden, V vocabulary rows of this rank, T chosen tokens, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

OfChunk = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ChosenTokenLosses:
    """Takes the place of what a model does behind its decoder: with labels it gives losses of chosen tokens only.

    Which tokens is said by `places_T`, places in sequence-first order (`s * B + b`), before the model is called with
    their labels `[1, T]`; it then returns losses `[1, T]`, each times its part of `weights_1T` where that is given.
    Without labels the model is what it was.

    Args:
        model: The part of it that a process has; one without an output layer is left alone.
        chunk_tokens: Tokens whose logits are held at once; None for all.
    """

    def __init__(self, model: GPTModel, chunk_tokens: int | None) -> None:
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.places_T: Tensor | None = None
        self.weights_1T: Tensor | None = None
        self.behind_decoder = model._postprocess
        if not model.post_process:
            return
        model._postprocess = self
        layer = model.output_layer
        # Which rows are chosen can only be said of the whole sequence, so it is gathered before the layer, not in it.
        self.divided_sequence = layer.sequence_parallel

    def __call__(self, *, hidden_states: Tensor, labels: Tensor | None, **others: Any) -> Tensor:
        """Losses `[1, T]`, or what the model gives without labels."""
        if labels is None:
            result: Tensor = self.behind_decoder(hidden_states=hidden_states, labels=None, **others)
            return result
        assert self.places_T is not None, "nobody said which tokens the labels are of"
        hidden_SBH = hidden_states
        if self.divided_sequence:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)
        hidden_TH = hidden_SBH.flatten(0, 1).index_select(0, self.places_T)
        shared = self.model.share_embeddings_and_output_weights
        weight_VH = self.model.shared_embedding_or_output_weight() if shared else self.model.output_layer.weight
        chunk_tokens = self.chunk_tokens or max(1, len(hidden_TH))
        # Here and not behind: gradients of tokens are summed as soon as they are made.
        weights_T = None if self.weights_1T is None else self.weights_1T[0]
        losses_T: Tensor = _ChunkedLosses.apply(  # type: ignore[no-untyped-call]
            hidden_TH, weight_VH, labels[0], weights_T, self._of_chunk, chunk_tokens, torch.is_grad_enabled()
        )
        return losses_T[None]

    def _of_chunk(self, hidden_CH: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of some tokens, `[C]`, and the logits that the output weight made for them, `[C, 1, V]`."""
        layer = self.model.output_layer
        shared = self.model.share_embeddings_and_output_weights
        weight_VH = self.model.shared_embedding_or_output_weight() if shared else layer.weight
        products: list[Tensor] = []
        # Of all hooks the first: what others do to the logits is no part of the product with the weight.
        handle = layer.register_forward_hook(lambda _, inputs, output: products.append(output[0]), prepend=True)
        before = layer.sequence_parallel, layer.allreduce_dgrad
        if self.divided_sequence:
            layer.sequence_parallel, layer.allreduce_dgrad = False, True
        try:
            # Detached, so that the layer computes no gradient of its own for the weight.
            logits_C1V, _ = layer(hidden_CH.unsqueeze(1), weight=weight_VH.detach())
        finally:
            handle.remove()
            layer.sequence_parallel, layer.allreduce_dgrad = before
        losses_1C = self.model.compute_language_model_loss(labels_C[None], logits_C1V)
        return losses_1C[0], products[0]


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        weights_T: Tensor | None,
        of_chunk: OfChunk,
        chunk_tokens: int,
        is_training: bool,
    ) -> Tensor:
        wants_hidden, wants_weight = (is_training and wanted for wanted in ctx.needs_input_grad[:2])
        losses_T = torch.empty(len(hidden_TH), dtype=torch.float32, device=hidden_TH.device)
        ctx.hidden_grad_TH = torch.empty_like(hidden_TH) if wants_hidden else None
        ctx.weight_grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        ctx.weight_dtype = weight_VH.dtype
        for start in range(0, len(hidden_TH), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden_CH = hidden_TH[chunk].detach().requires_grad_(wants_hidden or wants_weight)
            with torch.set_grad_enabled(hidden_CH.requires_grad):
                losses_C, product_C1V = of_chunk(hidden_CH, labels_T[chunk])
            weights_C = torch.ones_like(losses_C) if weights_T is None else weights_T[chunk]
            losses_T[chunk] = losses_C.detach() if weights_T is None else losses_C.detach() * weights_C
            if not hidden_CH.requires_grad:
                continue
            hidden_grad_CH, product_grad_C1V = torch.autograd.grad(losses_C, (hidden_CH, product_C1V), weights_C)
            if wants_hidden:
                ctx.hidden_grad_TH[chunk] = hidden_grad_CH
            if wants_weight:
                _add_product(ctx.weight_grad_VH, product_grad_C1V[:, 0], hidden_CH.detach())
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_T[:1].sum()
        if any(grad_T.stride()):
            # The gradients are sums over tokens already. Not an if: that would wait for the device.
            torch._assert_async((grad_T == scale).all(), "all losses of a micro-batch must count alike")
        hidden_grad_TH, weight_grad_VH = ctx.hidden_grad_TH, ctx.weight_grad_VH
        del ctx.hidden_grad_TH, ctx.weight_grad_VH
        # A plain product with a number that lies on the device takes a kernel of a sixth of the speed.
        torch._foreach_mul_([grad for grad in (hidden_grad_TH, weight_grad_VH) if grad is not None], scale)
        weight_grad_VH = None if weight_grad_VH is None else weight_grad_VH.to(ctx.weight_dtype)
        return hidden_grad_TH, weight_grad_VH, *(None,) * 5


def _add_product(total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """`total += grad.T @ hidden` in fp32, whatever the factors' dtype is."""
    if grad_CV.dtype == torch.float32:
        total_VH.addmm_(grad_CV.t(), hidden_CH)
    elif grad_CV.is_cuda:
        torch.ops.aten.addmm.dtype_out(total_VH, grad_CV.t(), hidden_CH, torch.float32, out=total_VH)
    else:
        total_VH.add_(grad_CV.t() @ hidden_CH)
