"""ERMVP's clustering and merging of bird's-eye-view features (Zhang et al., CVPR 2024), also in CoLC."""

from __future__ import annotations

from torch import Tensor

from ._published import average, cluster


def cluster_dpc_knn(x: Tensor, cluster_num: int, k: int = 5) -> tuple[Tensor, int]:
    """Cluster the tokens x [B, N, C] by density peaks, in their own dtype.

    Equivalent to ERMVP's function of that name.

    Returns:
        (idx_cluster [B, N] int64 in [0, cluster_num), cluster_num).

    Example::

        >>> import torch
        >>> from hotkernels.compat import ermvp
        >>> x = torch.randn(2, 100, 16)
        >>> idx_cluster, cluster_num = ermvp.cluster_dpc_knn(x, 10, k=5)
        >>> ermvp.merge_tokens(x, idx_cluster, cluster_num)[0].shape
        torch.Size([2, 10, 16])
    """
    return cluster(x, cluster_num, k)[1], cluster_num


def merge_tokens(
    x: Tensor, idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Average the tokens x [B, N, C] of each cluster as `compat.tcformer.merge_tokens` does.

    Returns:
        (x [B, M, C], a copy of idx_cluster).
    """
    return average(x, idx_cluster, cluster_num, token_weight)[0], idx_cluster.clone()
