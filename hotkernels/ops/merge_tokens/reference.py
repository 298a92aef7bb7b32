"""Weighted mean of each cluster's tokens, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_tokens_reference(
    x: Tensor, assignment: Tensor, num_clusters: int, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Return sum_i w_i x_i / (sum_i w_i + eps) per cluster, [B, num_clusters, C]; weight is [B, N].

    Computes in float64 if x is float64, else in float32.
    """
    B, N, C = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    w = torch.ones(B, N, dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    # One cluster more takes the tokens of none. On a GPU index_put sums in a fixed order, index_add does not.
    there = (assignment >= 0) & (assignment < num_clusters)
    w = torch.where(there, w, 0.0)  # then gradients, too, see nothing of these
    places = (torch.arange(B, device=x.device)[:, None], torch.where(there, assignment, num_clusters))
    total = w.new_zeros(B, num_clusters + 1).index_put(places, w, accumulate=True) + eps
    empty = total.reciprocal().isinf()  # with eps = 0, or where it is next to nothing
    w = torch.where(empty[places], 0.0, w)
    sums = w.new_zeros(B, num_clusters + 1, C).index_put(places, x.to(dtype) * w[..., None], accumulate=True)
    empty, total, sums = (t[:, :-1] for t in (empty[..., None], total[..., None], sums))
    return torch.where(empty, 0.0, sums / torch.where(empty, 1.0, total)).to(x.dtype)
