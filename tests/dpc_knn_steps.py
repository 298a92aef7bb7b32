"""Checks a clustering step by step against float64: each step is held to what the steps before it returned.

Discrete answers may differ wherever the float64 margin is within float32's rounding, and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotkernels import DensityPeaks
from hotkernels.ops.dpc_knn.reference import NORM_LIMIT

EPS = torch.finfo(torch.float32).eps


def check_dpc_knn(args: dict[str, Any], out: DensityPeaks) -> None:
    """Assert that `out` is what dpc_knn(**args) means."""
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
        )


def _check_sample(
    x: Tensor, out: DensityPeaks, k: int, mask: Tensor | None, keep: list[int], noise: Tensor | None, ordered: bool
) -> None:
    valid = x.square().sum(-1) <= NORM_LIMIT
    if mask is not None:
        valid = valid & mask
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
    x = x[valid] - x[valid].mean(0)
    d2 = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() / C
    error2 = 32 * EPS * x.square().sum(-1).max() / C  # of a squared distance in float32
    near, far = (d2 - error2).clamp(min=0).sqrt(), (d2 + error2).sqrt()
    near.fill_diagonal_(0), far.fill_diagonal_(0)

    # Density.
    r = d2.topk(min(k, n), largest=False).values.mean(-1)
    exact = torch.exp(-r)
    error = exact * (torch.expm1(error2.clamp(max=700)) + 4 * EPS * (1 + r)) + 1e-44
    if noise is not None:
        exact = exact + noise[valid]
        error = error + EPS * exact.abs()
    assert ((density - exact).abs() <= error).all(), "density"

    # Delta: the nearest of those that are denser for certain is an upper bound, of those that may be a lower one.
    key, margin = (-r, error2 + 4 * EPS * r) if noise is None else (exact, error)
    lead = key[None, :] - key[:, None]
    slack = margin[None, :] + margin[:, None]
    surely, maybe = lead > slack, (lead >= -slack).fill_diagonal_(False)
    farthest = far.max()
    upper = far.masked_fill(~surely, torch.inf).amin(-1).clamp(max=farthest)
    lower = near.masked_fill(~maybe, torch.inf).amin(-1).clamp(max=near.max())
    assert (delta <= upper * (1 + 4 * EPS)).all(), "delta: there is a nearer denser token"
    assert (delta >= lower * (1 - 4 * EPS)).all(), "delta: no denser token is that near"
    assert near.max() * (1 - 4 * EPS) <= delta.max() <= farthest * (1 + 4 * EPS), "delta of the densest"

    # Score and the choice.
    assert ((score - density * delta).abs() <= 4 * EPS * score.abs() + 1e-44).all(), "score"
    log_density = -r if noise is None else density.clamp(min=0).log()
    log_score = log_density + delta.log()
    slack_of_score = 2 * (margin if noise is None else torch.full_like(r, 4 * EPS)) + 4 * EPS
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
    lowest, highest = log_score - slack_of_score, log_score + slack_of_score
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
