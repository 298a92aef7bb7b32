"""What the published functions have in common: their noise, masked tokens that still get an index, token dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dtypes import FLOATING, HALF, INTEGER, REAL
from ..errors import check_index, check_int, check_tensor, fail
from ..ops.dpc_knn import dpc_knn
from ..ops.gather_tokens import gather_tokens
from ..ops.merge_tokens import merge_tokens


def entry(op: str, token_dict: Mapping[str, Any], key: str) -> Any:
    """token_dict[key]."""
    if not isinstance(token_dict, Mapping):
        fail(op, "token_dict", f"a dict with '{key}'", type(token_dict).__name__, TypeError)
    if key not in token_dict:
        fail(op, "token_dict", f"a dict with '{key}'", f"one with {list(token_dict)}")
    return token_dict[key]


def as_float(x: Tensor, op: str = "cluster_dpc_knn", name: str = "x") -> Tensor:
    """Tokens to cluster in float32, whatever their dtype."""
    check_tensor(op, name, x, "[B, N, C]", REAL)
    return x.float()


@torch.no_grad()
def cluster(
    x: Tensor,
    cluster_num: int,
    k: int,
    token_mask: Tensor | None = None,
    center: int | None = None,
    *,
    op: str = "cluster_dpc_knn",
    names: tuple[str, str, str, str] = ("x", "cluster_num", "k", "token_mask"),
) -> tuple[Tensor, Tensor]:
    """Cluster x [B, N, C] as published: (index_down [B, M], idx_cluster [B, N]), both int64 and never negative.

    Draws `torch.rand(B, N)` once from the global generator, in the dtype of the published density.

    `token_mask` [B, N], > 0 = valid. Published callers index with the result, so a masked token (or one with NaN) is in
    cluster 0, and where fewer than M tokens are valid the masked ones fill the places left, lowest position first, each
    a cluster of its own. Unlike the published code, which writes the largest distance of the whole batch into masked
    columns, samples do not influence each other.

    `center` is not chosen, as its caller appends it, but it counts as a neighbour.

    `op` and `names` are what the published function and its first four arguments are called, for errors.
    """
    tokens, count, neighbours, valid = names
    check_tensor(op, tokens, x, "[B, N, C]", FLOATING, shape=(None, None, None))
    B, N, _ = x.shape
    check_int(op, count, cluster_num, 1, N, "N = ")
    check_int(op, neighbours, k, 1, N, "N = ")
    # autocast runs cdist in float32, so the published density is float32 under it.
    half = x.dtype in HALF
    dtype = torch.float32 if half and torch.is_autocast_enabled(x.device.type) else x.dtype
    noise = torch.rand(B, N, device=x.device, dtype=dtype) * 1e-6
    mask = None
    if token_mask is not None:
        check_tensor(op, valid, token_mask, "[B, N]", REAL, shape=(B, N), device=x.device)
        mask = token_mask > 0

    if center is None:
        index, idx_cluster, *_ = dpc_knn(x, cluster_num, k, mask=mask, noise=noise)
    else:
        check_int(op, "center", center, -N, N - 1, "N - 1 = ")
        center = center if center >= 0 else center + N  # not modulo, which torch.jit.trace makes a tensor of
        more = min(cluster_num + 1, N)
        index, *_ = dpc_knn(x, more, k, mask=mask, noise=noise, keep=center, assign=False)
        index = index.masked_fill(index == center, -1)
        index = index.gather(1, (index < 0).byte().argsort(dim=1, stable=True)[:, :cluster_num])
        # Assign to these M alone: with all places taken by `keep`, only the assignment is new.
        _, idx_cluster, *_ = dpc_knn(x, cluster_num, 1, mask=mask, keep=index)

    # Places that no valid token took go to the others, lowest position first, the centre last.
    rest = (idx_cluster >= 0).byte() * 2
    if center is not None:
        rest[:, center] = 1
    place_in_rest = (index < 0).cumsum(1).sub(1).clamp(min=0)
    index = torch.where(index < 0, rest.argsort(dim=1, stable=True).gather(1, place_in_rest), index)
    own = torch.arange(cluster_num, device=x.device).expand(B, -1)
    return index, idx_cluster.clamp(min=0).scatter(1, index, own)


def average(x: Tensor, idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Average the tokens x [B, N, C] of each cluster, weighted: [B, M, C], and the weights [B, N, 1].

    -1 in idx_cluster: that token is merged into no cluster.
    """
    op = "merge_tokens"
    check_tensor(op, "x", x, "[B, N, C]", FLOATING, shape=(None, None, None))
    B, N, _ = x.shape
    check_tensor(op, "idx_cluster", idx_cluster, "[B, N]", INTEGER, shape=(B, N), device=x.device)
    check_int(op, "cluster_num", cluster_num, 1, None)
    if token_weight is None:
        weight = x.new_ones(B, N, 1)
    else:
        check_tensor(op, "token_weight", token_weight, "[B, N, 1]", FLOATING, shape=(B, N, 1), device=x.device)
        weight = token_weight
    return merge_tokens(x, idx_cluster, cluster_num, weight), weight


def merge(
    x: Tensor,
    idx_token: Tensor,
    agg_weight: Tensor,
    idx_cluster: Tensor,
    cluster_num: int,
    token_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge as published: (x [B, M, C], idx_token [B, N_init], agg_weight [B, N_init, 1])."""
    merged, weight = average(x, idx_cluster, cluster_num, token_weight)
    check_tensor("merge_tokens", "idx_token", idx_token, "[B, N_init]", (torch.int64,), shape=(x.shape[0], None))
    full = (*idx_token.shape, 1)
    check_tensor("merge_tokens", "agg_weight", agg_weight, "[B, N_init, 1]", FLOATING, shape=full, device=x.device)
    check_index("merge_tokens", "idx_token", idx_token, x.shape[1], "torch", least=0)
    idx_token = idx_token.to(x.device)  # Chat-UniVi makes it on the CPU, wherever the tokens are

    # Each token's share of its cluster, and the product of shares from an initial grid cell up to its cluster. A token
    # in no cluster weighs nothing.
    weight = weight * (idx_cluster >= 0)[..., None]
    owner = idx_cluster.clamp(min=0).long()
    share = weight / _take(_sum(weight, owner, cluster_num) + 1e-6, owner)
    return merged, idx_cluster.long().gather(1, idx_token), agg_weight * _take(share, idx_token)


_SCATTERS_IN_ORDER = ("cpu",)  # elsewhere scatter_add, and the gradient of gather, sum in no fixed order


def _sum(weight: Tensor, owner: Tensor, M: int) -> Tensor:
    """[B, M, 1]: the weights [B, N, 1] of each owner [B, N], in a fixed order."""
    total = weight.new_zeros(weight.shape[0], M, 1)
    if weight.device.type in _SCATTERS_IN_ORDER:
        return total.scatter_add(1, owner[..., None], weight)
    return total.index_put((torch.arange(owner.shape[0], device=owner.device)[:, None], owner), weight, accumulate=True)


def _take(weight: Tensor, index: Tensor) -> Tensor:
    """[B, K, 1]: the weights [B, N, 1] at index [B, K], with a gradient that sums in a fixed order."""
    if weight.device.type in _SCATTERS_IN_ORDER:
        return weight.gather(1, index[..., None])
    return gather_tokens(weight, index)


def merge_dict(
    token_dict: dict[str, Any], idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None = None
) -> dict[str, Any]:
    """Merge the tokens of a dict, without the entries that only some origins have."""
    x, idx_token, agg_weight = (entry("merge_tokens", token_dict, key) for key in ("x", "idx_token", "agg_weight"))
    merged, idx_token, agg_weight = merge(x, idx_token, agg_weight, idx_cluster, cluster_num, token_weight)
    return {"x": merged, "token_num": cluster_num, "idx_token": idx_token, "agg_weight": agg_weight}
