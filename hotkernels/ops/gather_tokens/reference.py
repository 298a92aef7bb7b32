"""Gathering chosen tokens, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dtypes import HALF, accumulator


def gather_tokens_reference(x: Tensor, index: Tensor, pos: Tensor | None = None) -> Tensor:
    """Return x[b, index[b, m]] (+ pos[m]); an index outside [0, N) gathers zeros.

    Where a gradient will be asked for, half types are gathered in float32, in which the gradient is then summed.
    """
    B, N = x.shape[:2]
    dtype = x.dtype
    if dtype in HALF and x.requires_grad and torch.is_grad_enabled():
        x = x.float()
    there = ((index >= 0) & (index < N)).reshape(*index.shape, *[1] * (x.dim() - 2))
    if N == 0:
        out = x.sum(1, keepdim=True).expand(-1, index.shape[1], *x.shape[2:])  # zeros, with a gradient for x
    else:
        out = torch.where(there, x[torch.arange(B, device=x.device)[:, None], index.clamp(0, N - 1)], 0)
    if pos is not None:
        out = out + pos.reshape(pos.shape[0], *[1] * (x.dim() - 3), pos.shape[1])
    return out.to(dtype).contiguous()


def gather_tokens_bwd_reference(grad_out: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Return, per token, the sum of the rows [b, m] that name it; an index outside [0, num_tokens) names none."""
    there = (index >= 0) & (index < num_tokens)
    sums = grad_out.new_zeros(len(index), num_tokens + 1, *grad_out.shape[2:], dtype=accumulator(grad_out.dtype))
    sample = torch.arange(len(index), device=index.device)[:, None]
    sums.index_put_((sample, index.where(there, num_tokens)), grad_out.to(sums.dtype), accumulate=True)
    return sums[:, :num_tokens].to(grad_out.dtype).contiguous()
