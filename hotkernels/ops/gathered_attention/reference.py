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
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (out [*batch, H, Nq, D] of query's dtype, lse [*batch, H, Nq]), computed in float64 or else float32.

    All tensors have the same batch dims; index is [B, M], [*batch, Nq, K] or [*batch, H, Nq, K]. lse is empty unless
    return_lse.
    """
    kind = query.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):  # which would multiply in a half type
        with torch.autocast(kind, enabled=False):
            return gathered_attention_reference(query, key, value, index, bias, key_bias, scale, dropout_p, return_lse)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (t.to(dtype) for t in (query, key, value))
    batch, H, Nk = key.shape[:-3], key.shape[-3], key.shape[-2]
    group = -2 if index is not None and index.dim() > 2 else -3  # queries that share slots: one alone, or all Nq
    there = extra = None  # whether slots are there, and their key_bias: broadcastable to [*batch, H, Nq or 1, slots]
    if key_bias is not None:
        extra = key_bias.to(dtype).unsqueeze(-2)

    # k, v: [*batch, H, Nq or 1, slots, D]
    if index is None:
        k, v = k.unsqueeze(-3), v.unsqueeze(-3)
        extra = None if extra is None else extra.unsqueeze(-2)
    else:
        if index.dim() == 2:  # one set per sample
            index = index.reshape(index.shape[0], *[1] * (len(batch) + 1), index.shape[1])
        elif index.dim() == len(batch) + 2:  # per query, for all heads
            index = index.unsqueeze(-3)
        index = index.expand(*batch, H, *index.shape[-2:])
        there = named = (index >= 0) & (index < Nk)
        slots = index.clamp(0, Nk - 1)

        def gather(x: Tensor) -> Tensor:  # [*batch, H, Nk, D] -> [*batch, H, Nq or 1, slots, D], 0 in absent slots
            flat = slots.flatten(-2)[..., None]
            rows = x.gather(-2, flat.expand(*flat.shape[:-1], x.shape[-1]))
            return torch.where(named[..., None], rows.unflatten(-2, slots.shape[-2:]), 0.0)

        k, v = gather(k), gather(v)
        if extra is not None:
            extra = gather(extra.expand(*batch, H, Nk)[..., None])[..., 0]

    if extra is not None:  # a masked key is as absent: NaN in it, or in its value, comes nowhere
        unmasked = extra != -torch.inf
        k, v = (torch.where(unmasked[..., None], x, 0.0) for x in (k, v))
        there = unmasked if there is None else there & unmasked
    q = q * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = (q.unsqueeze(group) @ k.mT).flatten(-3, -2)
    for addend in (extra, bias):
        logits = logits if addend is None else logits + addend.to(dtype)
    if there is not None:
        logits = torch.where(there, logits, -torch.inf)  # masks NaN of a bias, too
    with torch.no_grad():  # no gradient comes back to these rows
        empty = logits.amax(-1, keepdim=True) == -torch.inf  # queries that attend to nothing
        logits.masked_fill_(empty, 0.0)
    lse = logits.logsumexp(-1) if return_lse else logits.new_empty(0)
    weights = torch.nn.functional.dropout(logits.softmax(-1), float(dropout_p))
    out = (weights.unsqueeze(group) @ v).flatten(-3, -2)
    out = torch.where(empty, 0.0, out)
    if return_lse:
        lse = torch.where(empty[..., 0], -torch.inf, lse)
    return out.to(query.dtype).movedim(-2, 1).contiguous().movedim(1, -2), lse  # stored token by token


def mask_bias(mask: Tensor, like: Tensor) -> Tensor:
    """A mask, True = attend, as what is added to the logits of `like`: 0 or -inf."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(mask.shape, dtype=dtype, device=like.device).masked_fill(~mask, -torch.inf)
