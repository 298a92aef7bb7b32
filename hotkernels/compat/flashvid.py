"""FlashVID's clustering of the visual tokens of video language models (Fan et al., ICLR 2026, arXiv 2602.08024)."""

from __future__ import annotations

from torch import Tensor

from ._published import as_float, cluster

_OP, _NAMES = "dpc_knn", ("features", "num_clusters", "k", "valid_token_mask")


def dpc_knn(
    features: Tensor, num_clusters: int, k: int = 7, valid_token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster the tokens features [B, N, C], in float32 whatever their dtype.

    Equivalent to FlashVID's function of that name. Masks as in `compat.hot`: a masked token belongs to cluster 0, in
    FlashVID's own, which nobody there gives a mask, to the nearest.

    Returns:
        (cluster_indices [B, N] int64 in [0, num_clusters), cluster_center_indices [B, num_clusters] int64, best first).

    Example::

        >>> import torch
        >>> from hotkernels.compat.flashvid import dpc_knn
        >>> cluster_indices, cluster_center_indices = dpc_knn(torch.randn(1, 196, 64).half(), 20)
        >>> cluster_indices.shape, cluster_center_indices.shape
        (torch.Size([1, 196]), torch.Size([1, 20]))
    """
    x = as_float(features, _OP, _NAMES[0])
    index_down, idx_cluster = cluster(x, num_clusters, k, valid_token_mask, op=_OP, names=_NAMES)
    return idx_cluster, index_down
