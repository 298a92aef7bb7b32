"""Chat-UniVi's clustering and merging of visual tokens (Jin et al., CVPR 2024): TCFormer's, in float32."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._published import as_float, cluster, entry, merge_dict


def cluster_dpc_knn(
    token_dict: dict[str, Any], cluster_num: int, k: int = 5, token_mask: Tensor | None = None
) -> tuple[Tensor, int]:
    """Cluster the tokens token_dict["x"] [B, N, C], in float32 whatever their dtype.

    Equivalent to Chat-UniVi's function of that name; its module CTM clamps k and passes the dict's mask. Masks as in
    `compat.hot`.

    With k = 1, as for up to three clusters, a token's only neighbour is itself and the noise alone orders the tokens.
    Added to 1 in float32, as published, it has some nine values and leaves ties; here it leaves none, and the choices
    differ.

    Returns:
        (idx_cluster [B, N] int64 in [0, cluster_num), cluster_num).

    Example::

        >>> import torch
        >>> from hotkernels.compat import chat_univi
        >>> tokens = {"x": torch.randn(2, 16, 8), "idx_token": torch.arange(16).expand(2, -1)}
        >>> tokens |= {"agg_weight": torch.ones(2, 16, 1)}
        >>> idx_cluster, cluster_num = chat_univi.cluster_dpc_knn(tokens, 4, k=3)
        >>> chat_univi.merge_tokens(tokens, idx_cluster, cluster_num)["x"].shape
        torch.Size([2, 4, 8])
    """
    x = as_float(entry("cluster_dpc_knn", token_dict, "x"))
    return cluster(x, cluster_num, k, token_mask)[1], cluster_num


def merge_tokens(
    token_dict: dict[str, Any], idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None = None
) -> dict[str, Any]:
    """Average the tokens of each cluster as `compat.tcformer.merge_tokens` does.

    Returns:
        A dict with x [B, M, C], token_num, idx_token, agg_weight and mask = None.
    """
    return merge_dict(token_dict, idx_cluster, cluster_num, token_weight) | {"mask": None}
