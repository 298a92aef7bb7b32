"""TokenReduction's clustering and merging of image tokens (Haurum et al., ICCV Workshops 2023), without dicts."""

from __future__ import annotations

from torch import Tensor

from ._published import cluster, merge


def cluster_dpc_knn(x: Tensor, cluster_num: int, k: int = 5, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster the tokens x [B, N, C] by density peaks.

    Equivalent to TokenReduction's function of that name: HoT's, with its two results in the other order. Masks as in
    `compat.hot`.

    Returns:
        (idx_cluster [B, N] int64 in [0, cluster_num), index_down [B, cluster_num] int64, best first).

    Example::

        >>> import torch
        >>> from hotkernels.compat import token_reduction
        >>> x, idx_token, agg_weight = torch.randn(2, 16, 8), torch.arange(16).expand(2, -1), torch.ones(2, 16, 1)
        >>> idx_cluster, index_down = token_reduction.cluster_dpc_knn(x, 4, k=3)
        >>> token_reduction.merge_tokens(x, idx_token, agg_weight, idx_cluster, 4)[0].shape
        torch.Size([2, 4, 8])
    """
    index_down, idx_cluster = cluster(x, cluster_num, k, token_mask)
    return idx_cluster, index_down


def merge_tokens(
    x: Tensor,
    idx_token: Tensor,
    agg_weight: Tensor,
    idx_cluster: Tensor,
    cluster_num: int,
    token_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the tokens of each cluster as `compat.tcformer.merge_tokens` does, with the entries of its dict given.

    Returns:
        (x [B, M, C], idx_token [B, N_init], agg_weight [B, N_init, 1]).
    """
    return merge(x, idx_token, agg_weight, idx_cluster, cluster_num, token_weight)
