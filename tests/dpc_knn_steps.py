"""Checks a clustering step by step against float64: each step is held to what the steps before it returned.

Discrete answers may differ wherever the float64 margin is within rounding, and nowhere else: float32's, and where a
GPU kernel computes (a GPU tensor, or an emulated GPU) that of rounding tokens to 11 bits. What is rounded may be as
long as a token is away from where most are, whichever point among those a kernel counts from, or from the pivot that
ours count from: outliers change nothing.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hotkernels import DensityPeaks
from hotkernels.ops.dpc_knn.reference import NORM_LIMIT

EPS = torch.finfo(torch.float32).eps


def rounds_tokens(x: Tensor) -> bool:
    """Whether the kernel that clusters x may round tokens to 11 bits."""
    return x.is_cuda or bool(os.environ.get("HOTKERNELS_EMULATE_CUDA"))


def sample(peaks: DensityPeaks, b: int) -> DensityPeaks:
    """The clustering of one sample of the batch."""
    return DensityPeaks(*(t if t is None else t[b : b + 1] for t in peaks))


def check_dpc_knn(args: dict[str, Any], out: DensityPeaks) -> None:
    """Assert that `out` is what dpc_knn(**args) means; on the CPU: there are many small steps, each looked at."""
    coarse = rounds_tokens(out.density)
    args, out = pytree.tree_map_only(Tensor, Tensor.cpu, (args, out))
    with torch.device("cpu"):
        _check(args, out, coarse)


def _check(args: dict[str, Any], out: DensityPeaks, coarse: bool) -> None:
    x, M, k = args["x"], args["num_clusters"], args.get("k", 5)
    B, N, _ = x.shape
    shapes = {"index": (B, M), "assignment": (B, N), "density": (B, N), "delta": (B, N), "score": (B, N)}
    for name, shape in shapes.items():
        value = getattr(out, name)
        if name == "assignment" and not args.get("assign", True):
            assert value is None
            continue
        assert value.shape == shape, name
        assert value.dtype == (torch.int64 if name in ("index", "assignment") else torch.float32), name
    keep = args.get("keep")
    if keep is not None:
        keep = torch.as_tensor(keep)
        keep = keep.reshape(1, -1).expand(B, -1) if keep.dim() < 2 else keep.expand(B, -1)
    for b in range(B):
        _check_sample(
            x[b].double(),
            DensityPeaks(*(None if value is None else value[b] for value in out)),
            k,
            None if args.get("mask") is None else args["mask"][b],
            [] if keep is None else keep[b].tolist(),
            None if args.get("noise") is None else args["noise"][b].float().double(),
            args.get("ordered", False),
            coarse,
        )


def _check_sample(
    x: Tensor, out: DensityPeaks, k: int, mask: Tensor | None, keep: list[int], noise: Tensor | None, ordered: bool,
    coarse: bool,
) -> None:  # fmt: skip
    valid = x.square().sum(-1) <= NORM_LIMIT
    if mask is not None:
        valid = valid & mask
    if noise is not None:
        valid = valid & ~noise.isnan()
    for name in ("density", "delta", "score"):
        assert (getattr(out, name)[~valid] == 0).all(), f"{name} of an invalid token"
    if out.assignment is not None:
        assert (out.assignment[~valid] == -1).all()
    positions = valid.nonzero()[:, 0]
    n, C = len(positions), x.shape[-1]
    if n == 0:
        assert (out.index == -1).all()
        return
    density, delta, score = (t[valid].double() for t in (out.density, out.delta, out.score))
    tokens = x[valid]
    x = tokens - tokens.median(0).values
    d2 = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() / C
    # Each squared distance lies in [near2, far2]: moved by as much as its two tokens were, then rounded. To 11 bits: by
    # up to 2^-11 of a coordinate. To float32: a tensor core may cut off, not round, after every 16 channels.
    length = x.norm(dim=-1) / C**0.5
    length = length + length.quantile(0.75)  # from any point among most of the tokens
    pivot = tokens[[n // 6 + i * (n // 3) for i in range(3)]].median(0).values  # ours, which may lie further out
    from_pivot = (tokens - pivot).norm(dim=-1) / C**0.5
    length = torch.maximum(length, from_pivot)
    moved = 2**-11 * length if coarse else x.new_zeros(n)
    moved = moved[:, None] + moved[None, :]
    relative = (8 + C / 8) * EPS
    error2 = relative * (length[:, None].square() + length[None, :].square())
    if not coarse:  # where that would be much of a distance, it is summed from differences
        near_each_other = d2 < (from_pivot[:, None].square() + from_pivot[None, :].square()) / 300
        error2 = torch.where(near_each_other, torch.minimum(error2, relative * d2), error2)
    near2 = ((d2.sqrt() - moved).clamp(min=0).square() - error2).clamp(min=0).fill_diagonal_(0)
    far2 = ((d2.sqrt() + moved).square() + error2).fill_diagonal_(0)
    near, far = near2.sqrt(), far2.sqrt()

    # Density, and the key that tokens are ordered by: each in [least, most].
    def exponent(d2: Tensor) -> Tensor:
        return d2.topk(min(k, n), largest=False).values.mean(-1)

    r_least, r_most = (1 - 4 * EPS) * exponent(near2), (1 + 4 * EPS) * exponent(far2)
    least, most = torch.exp(-r_most) * (1 - 4 * EPS), torch.exp(-r_least) * (1 + 4 * EPS)
    rounding = 1e-44
    if noise is not None:  # the sum is rounded where it is returned, but orders as it was
        least, most = torch.exp(-r_most) + noise[valid], torch.exp(-r_least) + noise[valid]
        rounding = 1e-44 + EPS * (torch.exp(-r_least) + noise[valid].abs())
    assert ((least - rounding <= density) & (density <= most + rounding)).all(), "density"
    if noise is None:
        least, most = -r_most, -r_least

    # Delta: the nearest of those that are denser for certain is an upper bound, of those that may be a lower one.
    surely = least[None, :] > most[:, None]
    maybe = (most[None, :] >= least[:, None]).fill_diagonal_(False)
    farthest = far.max()
    upper = far.masked_fill(~surely, torch.inf).amin(-1).clamp(max=farthest)
    lower = near.masked_fill(~maybe, torch.inf).amin(-1).clamp(max=near.max())
    assert (delta <= upper * (1 + 4 * EPS)).all(), "delta: there is a nearer denser token"
    assert (delta >= lower * (1 - 4 * EPS)).all(), "delta: no denser token is that near"
    assert near.max() * (1 - 4 * EPS) <= delta.max() <= farthest * (1 + 4 * EPS), "delta of the densest"

    # Score and the choice.
    assert ((score - density * delta).abs() <= 4 * EPS * score.abs() + 1e-44).all(), "score"
    if noise is not None:
        least, most = least.clamp(min=0).log(), most.clamp(min=0).log()
    lowest, highest = least + delta.log() - 8 * EPS, most + delta.log() + 8 * EPS
    place_of = {int(position): token for token, position in enumerate(positions)}
    tail = [place_of[position] for position in dict.fromkeys(keep) if position in place_of]
    count = min(len(out.index) - len(keep), n - len(tail)) + len(tail)
    assert (out.index[count:] == -1).all(), "-1 comes last"
    assert (out.index[:count] >= 0).all(), "valid tokens are left, but places are empty"
    kept = [place_of[int(position)] for position in out.index[:count]]  # a KeyError here: an invalid token was chosen
    assert len(set(kept)) == count, "a token was chosen twice"
    assert set(tail) <= set(kept), "keep"
    if ordered:
        assert kept == sorted(kept)
    else:
        assert kept[count - len(tail) :] == tail, "keep comes after the best"
    best = torch.tensor([token for token in kept if token not in tail], dtype=torch.int64)
    rest = torch.tensor([token for token in range(n) if token not in set(kept)], dtype=torch.int64)
    if len(best) and len(rest):
        assert lowest[rest].max() <= highest[best].min(), "a better token was left out"
    if len(best) and not ordered:
        assert (lowest[best][1:] <= highest[best][:-1]).all(), "best first"

    # Assignment.
    if out.assignment is None:
        return
    if count == 0:
        assert (out.assignment == -1).all()
        return
    own = out.assignment[valid]
    assert ((own >= 0) & (own < count)).all(), "a valid token without a cluster"
    assert (own[kept] == torch.arange(count)).all(), "a kept token is its own"
    others = torch.ones(n, dtype=torch.bool)
    others[kept] = False
    chosen = torch.tensor(kept)[own]
    nearest = near[chosen, torch.arange(n)]
    assert (nearest <= far[kept].amin(0))[others].all(), "a nearer kept token exists"
    same = (x[kept][None] == x[chosen][:, None]).all(-1)  # exact copies of the one chosen: the first place wins
    assert (same.byte().argmax(-1) == own)[others].all(), "ties go to the smaller place"
