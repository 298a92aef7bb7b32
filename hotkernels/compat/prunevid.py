"""PruneVid's clustering of video tokens (Huang et al., 2024): over frames, then over the patches of a segment."""

from __future__ import annotations

from torch import Tensor

from ._published import as_float, cluster


def cluster_dpc_knn(x: Tensor, cluster_num: int, k: int = 5, token_mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Cluster the tokens x [B, N, C], in float32 whatever their dtype.

    Equivalent to PruneVid's function of that name. Masks as in `compat.hot`.

    Returns:
        (idx_cluster [B, N] int64 in [0, cluster_num), cluster_num).

    Example::

        >>> import torch
        >>> from hotkernels.compat.prunevid import cluster_dpc_knn
        >>> idx_cluster, cluster_num = cluster_dpc_knn(torch.randn(1, 16, 64).half(), 4, k=7)
        >>> idx_cluster.shape, cluster_num
        (torch.Size([1, 16]), 4)
    """
    return cluster(as_float(x), cluster_num, k, token_mask)[1], cluster_num
