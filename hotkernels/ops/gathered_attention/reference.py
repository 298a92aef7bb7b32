"""Attention over gathered keys, in plain PyTorch: softmax(scale * q k^T + bias) v over each query's slots."""

from __future__ import annotations

import torch
from torch import Tensor


def gathered_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (out [*batch, H, Nq, D] of query's dtype, lse [*batch, H, Nq]), computed in float64 or else float32.

    All tensors have the same batch dims; index is [B, M], [*batch, Nq, K] or [*batch, H, Nq, K].
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (t.to(dtype) for t in (query, key, value))
    batch, H, Nk = key.shape[:-3], key.shape[-3], key.shape[-2]
    extra = torch.zeros((), dtype=dtype, device=query.device) if key_bias is None else key_bias.to(dtype)[..., None, :]
    there = torch.ones((), dtype=torch.bool, device=query.device)

    if index is not None:
        if index.dim() == 2:  # one set per sample: [B, M] -> [*batch, H, M]
            index = index.reshape(index.shape[0], *[1] * len(batch), index.shape[1])
        elif index.dim() == len(batch) + 2:  # per query, for all heads
            index = index.unsqueeze(-3)
        per_query = index.dim() == len(batch) + 3
        index = index.expand(*batch, H, *index.shape[len(batch) + 1 :])
        there = (index >= 0) & (index < Nk)
        slots = index.clamp(0, Nk - 1)

        def gather(x: Tensor) -> Tensor:  # [*batch, H, Nk, D] -> [*batch, H, (Nq,) slots, D], 0 in absent slots
            flat = slots.flatten(-2) if per_query else slots
            rows = x.gather(-2, flat[..., None].expand(*flat.shape, x.shape[-1]))
            return torch.where(there[..., None], rows.unflatten(-2, slots.shape[-2:]) if per_query else rows, 0.0)

        k, v = gather(k), gather(v)
        if key_bias is not None:
            extra = gather(extra.expand(*batch, H, Nk)[..., None])[..., 0]
        if per_query:
            logits = (q[..., None, :] @ k.mT)[..., 0, :]
        else:
            logits, there, extra = q @ k.mT, there[..., None, :], extra[..., None, :] if key_bias is not None else extra
    else:
        per_query = False
        logits = q @ k.mT
        extra = extra[..., None, :] if key_bias is not None else extra
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale) + extra
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = torch.where(there & (extra != -torch.inf), logits, -torch.inf)  # masks NaN, too

    top = logits.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    lse = torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, total).log())[..., 0]
    weights = torch.nn.functional.dropout(weights / torch.where(empty, 1.0, total), dropout_p)
    out = (weights[..., None, :] @ v)[..., 0, :] if per_query else weights @ v
    return out.to(query.dtype), lse
