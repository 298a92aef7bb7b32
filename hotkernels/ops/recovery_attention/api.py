"""Recovery cross-attention: L learned queries bring M kept tokens back to full length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import TRITON_DEVICE, Kernel, choose_attention, register
from ...dtypes import FLOATING, FUSED
from ...operators import composite, differentiable_once, fake, implement_in_triton, wants_grad
from ..gathered_attention.api import (
    check_scale,
    checked_heads,
    checked_per_key,
    common_batch,
    distinct,
)
from ..gathered_attention.reference import mask_bias
from .reference import recovery_attention_reference

_OP = "recovery_attention"
register(
    _OP,
    triton=Kernel(FUSED, device=TRITON_DEVICE, library="triton"),
    cpp=Kernel(FLOATING, device="cpu", library="_C_cpu"),
    torch=Kernel(FLOATING),
)
implement_in_triton("recovery_attention_fwd", module="hotkernels.ops.gathered_attention.launches")
implement_in_triton("recovery_attention_bwd", module="hotkernels.ops.gathered_attention.launches_backward")


class RecoveryAttention(torch.autograd.Function):
    """recovery_attention over the raw operators: forward(query, key, value, key_bias, scale)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
        """Attend; keep the log sum exp of the logits for the backward pass."""
        out, lse = torch.ops.hotkernels.recovery_attention_fwd(query, key, value, key_bias, scale)
        ctx.save_for_backward(query, key, value, out, lse, key_bias)
        ctx.scale = scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute the probabilities from lse; a query without batch gets the sum over it, in a fixed order."""
        query, key, value, out, lse, key_bias = saved
        grad_query, grad_key, grad_value = torch.ops.hotkernels.recovery_attention_bwd(
            grad_out, query, key, value, out, lse, key_bias, ctx.scale
        )
        return grad_query.to(query.dtype), grad_key, grad_value, None, None


def recovery_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Let L queries, usually the same for every sample, attend to the M kept tokens.

    Equivalent to::

        logits = scale * query @ key.mT                # [H, L, D] broadcasts over the batch
        out = torch.softmax(logits.masked_fill(~key_mask[..., None, None, :], -torch.inf), -1) @ value

    Args:
        query: [H, L, D], shared by the whole batch, or [*batch, H, L, D] with as many batch dims as key, each whole or
            1; float32, float16, bfloat16 or float64.
        key, value: [*batch, H, M, D], one or two batch dims, any strides with a contiguous last dim. D from 1 to 256.
            Batch dims of query, key and value broadcast.
        key_mask: [*batch, M] bool, each dim whole or 1, True = attend; None = all. What is in a masked key or its value
            does not matter. (gathered_attention takes such a mask, or a bias, as `key_bias`.)
        scale: of the logits; None = 1 / sqrt(D).
        dropout_p: dropout on the probabilities, always applied if > 0 (on the torch backend).
        backend: "torch", "cpp", "triton", or None for the fastest that can serve the call.

    Returns:
        [*batch, H, L, D] of query's dtype, stored token by token as `gathered_attention` does; 0 where nothing may be
        attended to. Differentiable once in query, key and value; the gradient of a shared query is its sum over the
        batch.

    Raises:
        ValueError, TypeError: ``recovery_attention: <arg> must be <expected>, got <actual>``.

    Numerics: softmax and sums in float32 (float64 for float64); deterministic, forward and backward. On GPUs, and in
    bfloat16, as `gathered_attention`.

    Cost: a shared query is read, scaled and packed once per thread, or on a GPU once per program that serves several
    sequences; no [L, M] tensor is kept.

    Source: the Token Recovering Attention of HoT (Li et al., CVPR 2024, section 3.3).

    Example::

        >>> import torch, hotkernels
        >>> kept = torch.randn(2, 17, 8, 81, 64)  # B, J, H, M, D
        >>> hotkernels.recovery_attention(torch.randn(8, 243, 64), kept, kept).shape
        torch.Size([2, 17, 8, 243, 64])
    """
    query, key, value = checked_heads(_OP, query, key, value, (3,))
    scale = check_scale(_OP, scale, query.shape[-1])
    batch: tuple[int, ...] = key.shape[:-3]
    if value.shape != key.shape or query.shape[:-3] not in (batch, ()):
        batch = common_batch(_OP, query, key, value)
        key, value = (t.expand(*batch, *t.shape[-3:]) for t in (key, value))
        if all(size == 1 for size in query.shape[:-3]):
            query = query[(0,) * (query.dim() - 3)]
        else:
            query = query.expand(*batch, *query.shape[-3:])
    if key_mask is not None:
        full = (*batch, key.shape[-2])
        key_mask = checked_per_key(_OP, "key_mask", key_mask, "[*batch, M]", (torch.bool,), full, key.device)
    if choose_attention(_OP, query, dropout_p, backend) == "torch":
        return recovery_attention_reference(query, key, value, key_mask, scale, dropout_p)
    return _fused(query, key, value, None if key_mask is None else mask_bias(key_mask, key), scale)


@composite("recovery_attention(Tensor query, Tensor key, Tensor value, Tensor? key_bias, float scale) -> Tensor")
def _fused(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    if not wants_grad(query, key, value):
        return torch.ops.hotkernels.recovery_attention_fwd(query, key, value, key_bias, scale)[0]
    return RecoveryAttention.apply(*distinct(query, key, value), key_bias, scale)


@fake("recovery_attention_fwd")
def _recovery_attention_fwd_fake(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.hotkernels.gathered_attention_fwd(query, key, value, None, None, key_bias, scale)


@fake("recovery_attention_bwd")
def _recovery_attention_bwd_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.hotkernels.gathered_attention_bwd(
        grad_out, None, query, key, value, out, lse, None, None, None, None, key_bias, scale, False, False
    )[:3]
