"""Density-peak clustering, step by step, in plain PyTorch: the definition that every kernel is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from .distances import Distances

# A token counts only if its squared norm is at most this: then no sum of its squared distances overflows in float32.
NORM_LIMIT = 2.0**93


def position_hash(seed: int, n: int, device: torch.device) -> Tensor:
    """Hash the positions 0 .. n-1 with a seed to 32 bits each (MurmurHash3's finaliser), as int64 [n]."""

    def mix(h: Tensor) -> Tensor:
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ (h >> 16)

    low, high = (torch.full((), v & 0xFFFFFFFF, device=device, dtype=torch.int64) for v in (seed, seed >> 32))
    return mix((torch.arange(n, device=device) + mix(low ^ mix(high))) & 0xFFFFFFFF)


def dpc_knn_reference(
    x: Tensor,
    num_clusters: int,
    k: int = 5,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    assign: bool = True,
    ordered: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Return (index, assignment, density, delta, score) as `hotkernels.dpc_knn` defines them.

    Computes in float64 if x is float64, else in float32. `keep` is [B or 1, K].
    """
    B, N, C = x.shape
    x = x if x.dtype == torch.float64 else x.float()
    infinity = x.new_full((), torch.inf)

    # 1. Valid tokens; 0 where there is none.
    valid = (x * x).sum(-1) <= NORM_LIMIT  # false for NaN and inf
    if mask is not None:
        valid = valid & mask
    if noise is not None:
        valid = valid & ~noise.isnan()
    count = valid.sum(1, keepdim=True)
    x = torch.where(valid[..., None], x, 0.0)

    distances = Distances(x, valid)

    # 2. r: mean of the k smallest squared distances, the token itself included.
    def density_exponent(d: Tensor) -> Tensor:
        nearest = d.topk(k, largest=False).values / C
        return torch.where(nearest.isinf(), 0.0, nearest).sum(-1) / count.clamp(1, k)

    r = torch.cat([density_exponent(d) for d in distances], 1)
    density = torch.exp(-r)
    if noise is not None:  # in float64: float32 would round noise of 1e-6 to a few steps
        noisy = torch.exp(-r.double()) + noise.double()
        density = noisy.to(r.dtype)

    # 3. The strict total order, by stable sorts from the last key to the first: position, hash, r, density, validity.
    order = position_hash(seed, N, x.device).argsort(stable=True).expand(B, N)
    for key in [r, *([] if noise is None else [-noisy]), ~valid]:
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    rank = order.argsort(1)

    # 4. delta: distance to the nearest denser token; for the densest, the largest distance of all.
    delta2, farthest = [], x.new_zeros(B)
    for d, own, there in zip(distances, *(t.split(distances.step, 1) for t in (rank, valid)), strict=True):
        denser = rank[:, None, :] < own[:, :, None]
        delta2.append(torch.where(denser, d, infinity).amin(-1))
        seen = torch.where(there[:, :, None] & valid[:, None, :], d, 0.0)
        farthest = torch.maximum(farthest, seen.flatten(1).amax(1))
    delta = torch.where(rank == 0, farthest[:, None], torch.cat(delta2, 1)).div(C).sqrt()

    # 5. Score, and the M best: in float64 and logarithms, where nothing underflows.
    log_density = -r.double() if noise is None else noisy.clamp(min=0).log()
    log_score = log_density + delta.double().log()
    log_score = log_score.nan_to_num(torch.inf, torch.inf, -torch.inf)  # infinite noise on a token at distance 0
    density, delta = (torch.where(valid, t, 0.0) for t in (density, delta))
    score = density * delta

    excluded = ~valid
    kept = torch.full((B, 0), -1, dtype=torch.int64, device=x.device)
    if keep is not None:
        kept = keep.expand(B, -1).long()
        there = (kept >= 0) & (kept < N)
        twice = (kept[:, :, None] == kept[:, None, :]).tril(-1).any(-1)
        kept = torch.where(there & ~twice & valid.gather(1, kept.clamp(0, N - 1)), kept, -1)
        taken = torch.zeros(B, N + 1, dtype=torch.bool, device=x.device)
        excluded = excluded | taken.scatter(1, torch.where(kept < 0, N, kept), True)[:, :N]
    best = torch.where(excluded, -torch.inf, log_score).argsort(dim=1, descending=True, stable=True)
    # A valid token of score 0 still comes before an excluded one.
    best = best.gather(1, excluded.gather(1, best).byte().argsort(dim=1, stable=True))
    best = best[:, : num_clusters - kept.shape[1]]
    index = torch.cat([torch.where(excluded.gather(1, best), -1, best), kept], 1)
    order_by = torch.where(index < 0, N, index) if ordered else (index < 0).long()
    index = index.gather(1, order_by.argsort(dim=1, stable=True))

    # 6. Nearest kept token; a kept token is its own, an invalid one nobody's.
    assignment = None
    if assign:
        nearest = [d.argmin(-1) for d in distances.to(index)]
        own = torch.cat([torch.cat(nearest, 1), index.new_zeros(B, 1)], 1)
        places = torch.arange(num_clusters, device=x.device).expand(B, -1)
        own = own.scatter(1, torch.where(index < 0, N, index), places)[:, :N]
        assignment = torch.where(valid & (index >= 0).any(1, keepdim=True), own, -1)
    return index, assignment, density, delta, score
