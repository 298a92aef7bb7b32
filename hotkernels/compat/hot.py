"""HoT's clustering (Li et al., CVPR 2024) of the frames of a pose sequence, also in its MHFormer and MixSTE hosts."""

from __future__ import annotations

from torch import Tensor

from ..errors import fail
from ._published import cluster


def cluster_dpc_knn(x: Tensor, cluster_num: int, k: int, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose `cluster_num` of the N tokens of x by density peaks.

    Equivalent to HoT's function of that name, without its N x N matrices.

    Args:
        x: [B, N, C] floating.
        cluster_num: M, in [1, N].
        k: neighbours per density, the token itself included.
        token_mask: [B, N] float or bool, > 0 = valid. A masked token is in cluster 0; where fewer than M are valid,
            masked ones fill the places left, lowest position first. Samples do not influence each other.

    Returns:
        (index_down [B, M] int64, best first; idx_cluster [B, N] int64 in [0, M)).

    Numerics: draws `torch.rand(B, N)` once, as published: the global generator is left in the same state.

    Example::

        >>> import torch
        >>> from hotkernels.compat.hot import cluster_dpc_knn
        >>> x = torch.tensor([[[0.0], [0.2], [0.5], [9.0], [9.3]]])
        >>> index_down, idx_cluster = cluster_dpc_knn(x, cluster_num=2, k=2)
        >>> idx_cluster[0, :3].unique().numel(), idx_cluster[0, 3:].unique().numel()
        (1, 1)
    """
    return cluster(x, cluster_num, k, token_mask)


def cluster_dpc_knn_center(
    x: Tensor, cluster_num: int, k: int, center: int, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose `cluster_num` tokens other than `center`, which the caller appends to them.

    Equivalent to the function of that name in HoT's MixSTE and MHFormer, which pass one less than the frames they keep.

    Args, Returns: as `cluster_dpc_knn`; `center` is a position in [-N, N). No token is assigned to the centre.

    Example::

        >>> import torch
        >>> from hotkernels.compat.hot import cluster_dpc_knn_center
        >>> index_down, _ = cluster_dpc_knn_center(torch.randn(2, 81, 32), 26, k=2, center=40)
        >>> index_down.shape, bool((index_down == 40).any())
        (torch.Size([2, 26]), False)
    """
    if center is None:
        fail("cluster_dpc_knn_center", "center", "an int", "NoneType", TypeError)
    return cluster(x, cluster_num, k, token_mask, center, op="cluster_dpc_knn_center")
