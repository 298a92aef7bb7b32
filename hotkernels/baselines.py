"""What users run today: the published functions in eager PyTorch. Demo, tests and benchmarks measure against these.

Written from their signatures and behaviour; the definitions that kernels are held against are ops/<op>/reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def cluster_dpc_knn_eager(
    x: Tensor, cluster_num: int, k: int, noise: Tensor, token_mask: Tensor | None = None, center: int | None = None
) -> tuple[Tensor, Tensor]:
    """DPC-kNN as TCFormer and HoT publish it, over an N x N matrix: (index_down [B, M], idx_cluster [B, N]).

    `noise` [B, N] is what they draw as torch.rand(B, N) * 1e-6. `center` is the frame that MHFormer always keeps: it is
    not among the `cluster_num`, its caller appends it.
    """
    B, _, C = x.shape
    d = torch.cdist(x, x) / C**0.5
    if token_mask is not None:
        token_mask = token_mask > 0
        d = d * token_mask[:, None, :] + (d.max() + 1) * ~token_mask[:, None, :]
    nearest = d.topk(k, dim=-1, largest=False).values
    density = (-(nearest**2).mean(-1)).exp() + noise
    if token_mask is not None:
        density = density * token_mask
    denser = (density[:, None, :] > density[:, :, None]).type(x.dtype)
    farthest = d.flatten(1).max(-1).values[:, None, None]
    delta = (d * denser + farthest * (1 - denser)).min(-1).values
    score = delta * density
    if center is not None:
        score[:, center] = -torch.inf
    index_down = score.topk(cluster_num, dim=-1).indices
    batch = torch.arange(B, device=x.device)[:, None]
    idx_cluster = d[batch, index_down].argmin(1)
    idx_cluster[batch, index_down] = torch.arange(cluster_num, device=x.device).expand(B, -1)
    return index_down, idx_cluster


def merge_tokens_eager(x: Tensor, idx_cluster: Tensor, cluster_num: int, weight: Tensor | None = None) -> Tensor:
    """Weighted mean per cluster as TCFormer publishes it: index_add over B * M rows. weight [B, N, 1]."""
    B, N, C = x.shape
    if weight is None:
        weight = x.new_ones(B, N, 1)
    rows = (idx_cluster + torch.arange(B, device=x.device)[:, None] * cluster_num).reshape(-1)
    total = weight.new_zeros(B * cluster_num, 1).index_add(0, rows, weight.reshape(B * N, 1)) + 1e-6
    share = weight / total[rows].reshape(B, N, 1)
    merged = x.new_zeros(B * cluster_num, C).index_add(0, rows, (x * share).reshape(B * N, C).to(x.dtype))
    return merged.reshape(B, cluster_num, C)


def gather_tokens_eager(x: Tensor, index: Tensor, pos: Tensor | None = None) -> Tensor:
    """Pruning as HoT publishes it: an index, then the addition of the position embedding [M, C] or [1, M, C]."""
    pruned = x[torch.arange(x.shape[0], device=x.device)[:, None], index]
    return pruned if pos is None else pruned + pos.reshape(pos.shape[-2], *[1] * (x.dim() - 3), pos.shape[-1])
