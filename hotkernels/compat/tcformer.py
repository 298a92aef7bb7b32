"""TCFormer's clustering and merging of image tokens (Zeng et al., CVPR 2022), also in mmpose."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._published import cluster, entry, merge_dict


def cluster_dpc_knn(
    token_dict: dict[str, Any], cluster_num: int, k: int = 5, token_mask: Tensor | None = None
) -> tuple[Tensor, int]:
    """Cluster the tokens token_dict["x"] [B, N, C] by density peaks.

    Equivalent to TCFormer's function of that name, without its N x N matrices. Masks as in `compat.hot`.

    Returns:
        (idx_cluster [B, N] int64 in [0, cluster_num), cluster_num).

    Example::

        >>> import torch
        >>> from hotkernels.compat import tcformer
        >>> tokens = {"x": torch.randn(2, 16, 8), "idx_token": torch.arange(16).expand(2, -1)}
        >>> tokens |= {"agg_weight": torch.ones(2, 16, 1), "map_size": (4, 4), "init_grid_size": (4, 4)}
        >>> idx_cluster, cluster_num = tcformer.cluster_dpc_knn(tokens, 4, k=3)
        >>> tcformer.merge_tokens(tokens, idx_cluster, cluster_num)["x"].shape
        torch.Size([2, 4, 8])
    """
    return cluster(entry("cluster_dpc_knn", token_dict, "x"), cluster_num, k, token_mask)[1], cluster_num


def merge_tokens(
    token_dict: dict[str, Any], idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None = None
) -> dict[str, Any]:
    """Average the tokens of each cluster, weighted.

    Equivalent to TCFormer's function of that name, deterministic on every device.

    Args:
        token_dict: x [B, N, C], idx_token [B, N_init] int64, agg_weight [B, N_init, 1], map_size, init_grid_size.
        idx_cluster: [B, N] int64, as `cluster_dpc_knn` returns it.
        cluster_num: M.
        token_weight: [B, N, 1]; None = 1.

    Returns:
        A dict with x [B, M, C], token_num, map_size, init_grid_size, idx_token, agg_weight. x and agg_weight are
        differentiable in x, token_weight and the old agg_weight.
    """
    sizes = {key: entry("merge_tokens", token_dict, key) for key in ("map_size", "init_grid_size")}
    return merge_dict(token_dict, idx_cluster, cluster_num, token_weight) | sizes
