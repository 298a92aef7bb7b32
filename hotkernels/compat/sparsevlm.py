"""SparseVLM's recycling of pruned visual tokens (Zhang et al., ICML 2025): clustering and averaging in one."""

from __future__ import annotations

from torch import Tensor

from ._published import average, cluster

_OP = "cluster_and_merge"


def cluster_and_merge(x: Tensor, cluster_num: int) -> Tensor:
    """Average the tokens x [B, N, C] of each of `cluster_num` clusters, found by density peaks with k = cluster_num.

    Equivalent to SparseVLM's function of that name, without its N x N x C differences, which it takes in x's dtype:
    in half precision it rounds distances and densities to that, where this computes them as `hotkernels.dpc_knn`.

    Returns:
        [B, cluster_num, C], the best cluster first. Differentiable once in x.

    Example::

        >>> import torch
        >>> from hotkernels.compat.sparsevlm import cluster_and_merge
        >>> cluster_and_merge(torch.randn(1, 100, 64), 11).shape
        torch.Size([1, 11, 64])
    """
    _, idx_cluster = cluster(x, cluster_num, cluster_num, op=_OP, names=("x", "cluster_num", "cluster_num", ""))
    return average(x, idx_cluster, cluster_num, None)[0]
