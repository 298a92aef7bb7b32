"""Gathering chosen tokens, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dtypes import HALF


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
