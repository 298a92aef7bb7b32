"""What is particular to dpc_knn: its order, its two paths, bits that depend on nothing else, and its memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import cloud, layouts, motion
from comparing import assert_same
from conftest import CAPTURED, GPU_BACKENDS, only_cpp
from dpc_knn_steps import check_dpc_knn, rounds_tokens, sample
from torch import Tensor

from hotkernels import dpc_knn
from hotkernels.baselines import cluster_dpc_knn_eager

DENSE = 816  # the C++ kernel holds all distances up to this many valid tokens, if k <= 16, and neighbour lists beyond


def assert_close(delta: Tensor, expected: Tensor) -> None:
    """Equal within the rounding of float32, or of tokens to 11 bits."""
    tolerance = 2e-3 if rounds_tokens(delta) else 1e-4
    torch.testing.assert_close(delta, expected.to(delta), rtol=tolerance, atol=tolerance / 10)


def position_hash(seed: int, n: int) -> list[int]:
    """The documented hash, in Python's own integers."""

    def mix(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    start = mix(seed & 0xFFFFFFFF ^ mix(seed >> 32 & 0xFFFFFFFF))
    return [mix(i + start & 0xFFFFFFFF) for i in range(n)]


# ---- the strict total order ------------------------------------------------------------------------------------------


def delta_of(x: Tensor, order: list[int]) -> Tensor:
    """The distance of each token of `order`, densest first, to the nearest before it; 0 of the others."""
    d = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])
    delta = torch.zeros(len(x), dtype=torch.float64)
    for place, i in enumerate(order):
        delta[i] = d[i, order[:place]].min() if place else d[order][:, order].max()
    return delta


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3])
@pytest.mark.parametrize(("N", "share"), [(63, 1.0), (63, 0.6), (500, 1.0), (600, 0.9)])
def test_equal_densities_are_ordered_by_the_hash(backend: str, N: int, share: float, seed: int) -> None:
    """With k = 1 every density is 1: the order is that of the positions' hashes alone, so delta is known exactly."""
    x, mask = cloud(1, N, 7), torch.rand(1, N) < share
    out = dpc_knn(x, 5, 1, seed=seed, mask=mask, backend=backend)
    assert torch.equal(out.density, mask.float())
    hashes = position_hash(seed, N)
    order = sorted(mask[0].nonzero()[:, 0].tolist(), key=lambda i: (hashes[i], i))
    assert_close(out.delta[0], delta_of(x[0], order))
    check_dpc_knn({"x": x, "num_clusters": 5, "k": 1, "mask": mask}, out)


@pytest.mark.parametrize("N", [243, 500])
@pytest.mark.parametrize("seed", [0, 7])
def test_mutual_nearest_neighbours_tie(backend: str, N: int, seed: int) -> None:
    """With k = 2 they have bitwise the same r. The smaller hash is denser, so the other's delta is their distance."""
    x = motion(2, N, 16)
    out = dpc_knn(x, 81, 2, seed=seed, backend=backend)
    hashes = position_hash(seed, N)
    ties = 0
    for b in range(2):
        d = torch.cdist(x[b], x[b], compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        least, order = d.topk(2, largest=False)
        nearest = torch.where(least[:, 0] < 0.95 * least[:, 1], order[:, 0], -1).tolist()  # -1: two are as near
        for i, j in enumerate(nearest):
            if j >= 0 and nearest[j] == i and hashes[i] < hashes[j]:
                ties += 1
                assert out.density[b, i] == out.density[b, j]
                assert out.delta[b, j] < out.delta[b, i], (i, j)
                assert_close(out.delta[b, j], d[i, j] / 4)
    assert ties > N / 4, "ties are common on smooth data, this test should see them"


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64])
def test_a_seed_of_numpy(backend: str, kind: type) -> None:
    x = motion(1, 39, 8)
    assert_same(dpc_knn(x, 9, 2, seed=kind(3), backend=backend), dpc_knn(x, 9, 2, seed=3, backend=backend))


def test_seed_breaks_ties_and_nothing_else(backend: str) -> None:
    x = motion(1, 243, 16)
    first, other = (dpc_knn(x, 81, 2, seed=seed, backend=backend) for seed in (0, 1))
    assert_same(first, dpc_knn(x, 81, 2, backend=backend))
    assert torch.equal(first.density, other.density)
    assert not torch.equal(first.delta, other.delta)
    x = cloud(1, 243, 16)
    assert_same(dpc_knn(x, 81, 5, seed=0, backend=backend), dpc_knn(x, 81, 5, seed=1, backend=backend))


@pytest.mark.parametrize(("half", "high", "C"), [(60, 4, 12), (250, 4, 12), (250, 1, 6), (250, 2, 4)])
def test_ties_are_decided_as_documented(backend: str, half: int, high: int, C: int) -> None:
    """Small integers around 0: every squared distance is exact, so every tie is one, here and in float64."""
    x = torch.randint(-high, high + 1, (2, half, C)).float()
    x = torch.cat([x, -x, torch.zeros(2, 3, C)], 1)
    for options in ({}, {"seed": 5, "ordered": True}, {"keep": [half, 3]}):
        ours = dpc_knn(x, 81, 2, backend=backend, **options)
        exact = dpc_knn(x.double(), 81, 2, **options)
        assert torch.equal(ours.index, exact.index)
        assert torch.equal(ours.assignment, exact.assignment)
        torch.testing.assert_close(ours.delta, exact.delta)
        check_dpc_knn({"x": x, "num_clusters": 81, "k": 2, **options}, ours)


@pytest.mark.parametrize(("N", "C", "M", "k"), [(243, 64, 81, 5), (600, 32, 100, 9)])
def test_same_choice_as_the_published_function(backend: str, N: int, C: int, M: int, k: int) -> None:
    """The same noise on both sides, on data that 11 bits hold, and whose margins are wider than float32's rounding."""
    margin = 0.0
    while margin < 4e-6:
        x, noise = (64 * cloud(3, N, C)).round() / 64, torch.rand(3, N) * 1e-6
        score = dpc_knn(x.double(), M, k, noise=noise).score.sort(descending=True).values[:, : M + 1]
        margin = (1 - score[:, 1:] / score[:, :-1]).min().item()
    ours = dpc_knn(x, M, k, noise=noise, backend=backend)
    index, assignment = cluster_dpc_knn_eager(x.double(), M, k, noise.double())
    assert torch.equal(ours.index, index)
    assert torch.equal(ours.assignment, assignment)


@pytest.mark.parametrize("N", [243, 500])
def test_noise_orders_where_float32_would_round_it_away(backend: str, N: int) -> None:
    """With k = 1 every density is 1 + noise, of which float32 knows a step of 1e-7. The noise has steps of 1e-9."""
    x, order = cloud(1, N, 7), torch.randperm(N)
    noise = torch.empty(1, N).scatter(1, order[None], -1e-9 * torch.arange(N)[None])
    out = dpc_knn(x, 5, 1, noise=noise, backend=backend)
    assert len(out.density.unique()) < 10
    assert_close(out.delta[0], delta_of(x[0], order.tolist()))


def test_noise_orders_first(backend: str) -> None:
    x = cloud(1, 63, 8)
    noise = -torch.arange(63.0)[None]  # far more than any density
    out = dpc_knn(x, 9, noise=noise, backend=backend)
    d = torch.cdist(x[0], x[0], compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(8)
    expected = torch.stack([d[i, :i].min() if i else d.max() for i in range(63)])
    assert_close(out.delta[0], expected)
    check_dpc_knn({"x": x, "num_clusters": 9, "noise": noise}, out)


def test_infinite_noise_on_copies_leaves_the_others_in_order(backend: str) -> None:
    """Infinity times distance 0 is NaN; it comes first."""
    x, noise = torch.randn(99, 20, 2).repeat(1, 2, 1), torch.rand(99, 40)
    noise[:, ::13] = torch.inf
    noise[:, 20] = torch.inf  # the copy of token 0
    out = dpc_knn(x, 40, 2, noise=noise, backend=backend)
    log_score = (out.density.log() + out.delta.log()).gather(1, out.index)
    assert log_score.isnan().any()
    log_score = log_score.nan_to_num(1e9, 1e9, -1e9)
    assert (log_score.diff() <= 1e-5).all()


# ---- duplicates and adversarial data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [63, 243, 500])
def test_duplicates_are_at_distance_zero(backend: str, N: int) -> None:
    """Exactly: the later in the order of two copies has delta 0, however large their offset."""
    x = 1000 + torch.randn(2, N, 33)
    x[:, N // 2 : N // 2 * 2] = x[:, : N // 2]
    out = dpc_knn(x, N // 2, 2, backend=backend)
    assert (out.density[:, : N // 2 * 2] == 1).all()
    assert ((out.delta == 0).sum(1) == N // 2).all()
    check_dpc_knn({"x": x, "num_clusters": N // 2, "k": 2}, out)


@pytest.mark.parametrize("N", [63, 500])
def test_all_tokens_the_same(backend: str, N: int) -> None:
    """Every score is 0: the first M win, and all belong to the first place."""
    x = torch.randn(1, 1, 9).expand(2, N, 9)
    out = dpc_knn(x, 7, backend=backend)
    assert torch.equal(out.index, torch.arange(7).expand(2, 7))
    assert not out.delta.any()
    assert not out.assignment[:, 7:].any()
    check_dpc_knn({"x": x, "num_clusters": 7}, out)


def two_far_clusters(N: int) -> Tensor:
    """Hardly anyone's list holds a token of the other cluster, and each has a peak that must look there."""
    return torch.randn(1, N, 5) + 100 * (torch.arange(N) % 2)[None, :, None]


def many_small_clusters(N: int) -> Tensor:
    """Clusters of about the length of a list: their peaks find nobody denser in it."""
    return (
        torch.randn(1, N, 3) * 0.01 + 10 * torch.randn(1, N // 16 + 1, 1, 3).expand(1, -1, 16, 3).flatten(1, 2)[:, :N]
    )


ADVERSARIAL: dict[str, Callable[[int], Tensor]] = {
    "along a line": lambda n: torch.arange(n)[None, :, None] * torch.ones(1, 1, 3),  # equal distances everywhere
    "ever denser": lambda n: (0.99 ** torch.arange(n))[None, :, None] * torch.ones(1, 1, 3),  # all insertions are worst
    "ever sparser": lambda n: (1.01 ** torch.arange(n))[None, :, None] * torch.ones(1, 1, 3),
    "two far clusters": two_far_clusters,
    "many small clusters": many_small_clusters,
    "grid": lambda n: torch.stack([torch.arange(n) % 23, torch.arange(n) // 23], -1)[None].float(),
    "few distinct": lambda n: torch.randint(0, 3, (1, n, 3)).float(),
    "one outlier": lambda n: torch.cat([torch.randn(1, n - 1, 3), torch.full((1, 1, 3), 1e3)], 1),
    "sphere": lambda n: torch.nn.functional.normalize(torch.randn(1, n, 64), dim=-1),
}


@pytest.mark.parametrize("data", ADVERSARIAL)
@pytest.mark.parametrize(("N", "M", "k"), [(243, 61, 2), (840, 3, 2), (601, 300, 5), (450, 9, 17), (450, 9, 40)])
def test_adversarial_data(backend: str, data: str, N: int, M: int, k: int) -> None:
    x = ADVERSARIAL[data](N)
    check_dpc_knn({"x": x, "num_clusters": M, "k": k}, dpc_knn(x, M, k, backend=backend))


@pytest.mark.parametrize("N", [48, DENSE - 1, DENSE, DENSE + 1, 1152])
@pytest.mark.parametrize("k", [1, 2, 4, 6, 7, 8, 9, 12, 15, 16, 17, 18, 33])  # 3 and 5 are in cases.py
def test_every_length_of_list(backend: str, N: int, k: int) -> None:
    N = (N + 48) // 2 if backend == "cuda" else N  # its bounds are others, and emulated it takes long
    x = cloud(1, N, 6)
    check_dpc_knn({"x": x, "num_clusters": N // 4, "k": k}, dpc_knn(x, N // 4, k, backend=backend))


@pytest.mark.parametrize("N", [330, 700])
def test_density_over_all_tokens(backend: str, N: int) -> None:
    """With k = N as many terms are summed, half of them equal: one by one in float32 they lose a digit."""
    x = 1.1 * (torch.arange(N) % 2)[None, :, None].expand(2, N, 3)
    density = dpc_knn(x, 3, N, backend=backend).density.double()
    r = torch.cdist(x.double(), x.double()).square().mean(-1) / 3
    assert ((-density.log() - r).abs() <= (2.0**-9 if rounds_tokens(x) else 3e-7) * r).all()


@pytest.mark.parametrize("C", [1, 3, 127, 128, 129, 300, 1100])
def test_every_number_of_channels(backend: str, C: int) -> None:
    for N in (47, 49, 400):
        x = cloud(1, N, C)
        check_dpc_knn({"x": x, "num_clusters": 9}, dpc_knn(x, 9, backend=backend))


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("channels", [slice(None), 3], ids=["everywhere", "in one channel"])
@pytest.mark.parametrize("data", [cloud, motion])
@pytest.mark.parametrize("N", [243, 498])
def test_an_outlier_takes_no_bits(
    backend: str, N: int, data: Callable[..., Tensor], channels: slice | int, ratio: float
) -> None:
    """A token far longer than the others, be it one of the three that a kernel looks at: the others stay distinct."""
    x = data(1, N, 24)
    far = torch.randn(24)[channels]
    x[0, N // 2] = 0
    x[0, N // 2, channels] = far / far.norm() * ratio * x.norm(dim=-1).mean()
    for k in (2, 5):
        check_dpc_knn({"x": x, "num_clusters": N // 3, "k": k}, dpc_knn(x, N // 3, k, backend=backend))


def test_tokens_far_from_the_origin(backend: str) -> None:
    """Centring keeps float32 accurate where the tokens' offset is a thousand times their spread."""
    x = 1000 + torch.randn(2, 243, 64)
    check_dpc_knn({"x": x, "num_clusters": 81}, dpc_knn(x, 81, backend=backend))


@pytest.mark.parametrize("factor", [1e-15, 1e-3, 1.0, 1e5, 1e12])
@pytest.mark.parametrize("first", [0.0, 1e-6, 1.0, 1e4])
def test_channels_of_any_magnitude(backend: str, factor: float, first: float) -> None:
    x = factor * torch.randn(1, 100, 150)
    x[..., :16] *= first
    check_dpc_knn({"x": x, "num_clusters": 33, "k": 2}, dpc_knn(x, 33, 2, backend=backend))


@pytest.mark.parametrize("factor", [1e-15, 1.0, 1e12])
@pytest.mark.parametrize("those", [0.0, 1e-6, 1e4, 2e6])
@pytest.mark.parametrize("tokens", [[16], [16, 49, 82]], ids=["one", "all"])
def test_tokens_of_any_magnitude(backend: str, factor: float, those: float, tokens: list[int]) -> None:
    """Whatever the three tokens, from which the CUDA kernel takes a pivot and a scale, say about the others."""
    for C in (20, 150):
        x = factor * torch.randn(1, 100, C)
        x[:, tokens] *= those
        check_dpc_knn({"x": x, "num_clusters": 33, "k": 2}, dpc_knn(x, 33, 2, backend=backend))


# ---- invalid tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["mask", "noise", torch.nan, torch.inf, -torch.inf, 1e30, 1.1e14])
@pytest.mark.parametrize("N", [63, 900])  # half of them valid: alone, they take the same path
def test_invalid_tokens_change_nothing_for_the_others(backend: str, N: int, bad: str | float) -> None:
    """The valid tokens alone, compacted, give the same numbers: the same bits from a kernel."""
    x, mask = cloud(1, N, 9), torch.zeros(1, N, dtype=torch.bool)
    mask[0, 1 + torch.randperm(N - 2)[: N // 2]] = True
    there = mask[0].nonzero()[:, 0]
    given = x.clone()
    args: dict[str, Any] = {"num_clusters": 21}
    if bad == "mask":
        args["mask"] = mask
    elif bad == "noise":
        args["noise"] = torch.where(mask, 0.0, torch.nan)
    else:
        given[0, ~mask[0], 4] = float(bad)
    ours = dpc_knn(given, **args, backend=backend)
    alone = dpc_knn(x[:, there], 21, noise=torch.zeros(1, len(there)) if bad == "noise" else None, backend=backend)
    assert torch.equal(ours.index, there[alone.index])
    assert torch.equal(ours.assignment[:, there], alone.assignment)
    for name in ("density", "delta", "score"):
        a, b = getattr(ours, name)[:, there], getattr(alone, name)
        assert torch.equal(a, b) if backend != "torch" else torch.allclose(a, b, rtol=1e-5), name
    check_dpc_knn({"x": given} | args, ours)


@pytest.mark.parametrize("N", [63, 500])
def test_fewer_valid_tokens_than_places_or_neighbours(backend: str, N: int) -> None:
    x, mask = cloud(3, N, 5), torch.zeros(3, N, dtype=torch.bool)
    mask[0, [3, 7, 8]] = True
    mask[1, N - 1] = True
    args = {"x": x, "num_clusters": 6, "k": 5, "mask": mask}
    out = dpc_knn(**args, backend=backend)
    assert sorted(out.index[0].tolist()) == [-1, -1, -1, 3, 7, 8]
    assert out.index[1].tolist() == [N - 1, -1, -1, -1, -1, -1]
    assert (out.density[1, N - 1], out.delta[1, N - 1]) == (1, 0)
    assert (out.index[2] == -1).all()
    check_dpc_knn(args, out)
    ordered = dpc_knn(**args, ordered=True, backend=backend)
    assert ordered.index[0].tolist() == [3, 7, 8, -1, -1, -1]


@pytest.mark.parametrize("k", [2, 40])
def test_largest_tokens_that_count(backend: str, k: int) -> None:
    """Norms just under the limit of 1e14: neither distances nor their sums overflow."""
    x = torch.randn(1, 63, 4)
    x = (x / x.norm(dim=-1, keepdim=True) * 720).round() * 2.0**37  # 11 bits hold the difference of any two
    out = dpc_knn(x, 9, k, backend=backend)
    assert out.delta.isfinite().all()
    assert (out.assignment >= 0).all()
    check_dpc_knn({"x": x, "num_clusters": 9, "k": k}, out)
    assert torch.equal(out.index, dpc_knn(x.double(), 9, k).index)


@pytest.mark.parametrize("N", [63, 500])
def test_ranking_survives_where_exp_underflows(backend: str, N: int) -> None:
    x = (200 * torch.randn(1, N, 16)).round()
    out = dpc_knn(x, 9, backend=backend)
    assert not out.density.any(), "this test wants densities that underflow"
    check_dpc_knn({"x": x, "num_clusters": 9}, out)
    exact = dpc_knn(x.double(), 9)
    assert torch.equal(out.index, exact.index)


def test_a_default_that_does_not_fit_is_called_one(backend: str) -> None:
    for options, got in (({}, r"5 \(the default\)"), ({"k": 6}, "6")):
        with pytest.raises(ValueError, match=rf"^dpc_knn: k must be in \[1, N = 4\], got {got}$"):
            dpc_knn(torch.zeros(1, 4, 3), 2, **options, backend=backend)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [63, 500])
def test_keep(backend: str, N: int) -> None:
    x = cloud(2, N, 7)
    free = dpc_knn(x, 9, backend=backend)
    worst = free.score[0].argmin().item()
    forms = [worst, [worst], np.int64(worst), torch.tensor([worst]), torch.tensor([[worst]] * 2, dtype=torch.int32)]
    outs = [dpc_knn(x, 9, keep=keep, backend=backend) for keep in forms]
    for out in outs:
        assert_same(out, outs[0])
    assert outs[0].index[0].tolist() == [*free.index[0, :8].tolist(), worst]
    assert_same(outs[0][2:], free[2:])
    best = free.index[0, 0].item()
    moved = dpc_knn(x[:1], 9, keep=[best, -1, best], backend=backend)  # -1 and the second time are lost places
    assert moved.index[0].tolist() == [*free.index[0, 1:7].tolist(), best, -1, -1]
    check_dpc_knn({"x": x[:1], "num_clusters": 9, "keep": [best, -1, best]}, moved)
    mask = torch.ones(1, N, dtype=torch.bool)
    mask[0, worst] = False
    gone = dpc_knn(x[:1], 9, keep=worst, mask=mask, backend=backend)
    assert gone.index[0, -1] == -1
    assert (gone.index[0, :-1] >= 0).all()
    none = dpc_knn(x, 9, keep=[], backend=backend)
    assert_same(none, free)
    few = torch.arange(N)[None] < 6
    all_of_them = dpc_knn(x[:1], 9, keep=3, mask=few, backend=backend)  # it is right behind the other five
    assert all_of_them.index[0, 5:].tolist() == [3, -1, -1, -1]
    assert set(all_of_them.index[0, :5].tolist()) == {0, 1, 2, 4, 5}


@pytest.mark.parametrize("N", [63, 500])
def test_ordered_is_the_same_set(backend: str, N: int) -> None:
    x = cloud(2, N, 7)
    best, ordered = (dpc_knn(x, 21, ordered=flag, keep=[5], backend=backend) for flag in (False, True))
    assert torch.equal(best.index.sort(1).values, ordered.index)
    assert torch.equal(best.index.gather(1, best.assignment), ordered.index.gather(1, ordered.assignment))
    assert_same(best[2:], ordered[2:])


def test_without_assignment(backend: str) -> None:
    x = cloud(2, 500, 7)
    whole, without = (dpc_knn(x, 21, assign=flag, backend=backend) for flag in (True, False))
    assert without.assignment is None
    assert_same(whole._replace(assignment=None), without)


# ---- bits that depend on nothing else --------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [243, 500])
@pytest.mark.parametrize("data", [motion, cloud])
def test_the_order_of_tokens_moves_no_bit(backend: str, N: int, data: Callable[..., Tensor]) -> None:
    """The distance of two tokens is the same bits wherever they stand, and whichever of them comes first."""
    x, order = data(2, N, 130), torch.randperm(N)
    for token in (N // 6, N // 6 + N // 3, N // 6 + 2 * (N // 3)):  # what is subtracted is made of these: they stay
        order[order == token], order[token] = order[token].clone(), token
    out, moved = (dpc_knn(t, N, 5, backend=backend) for t in (x, x[:, order]))
    assert torch.equal(moved.density, out.density[:, order])
    farthest = [peaks.delta.amax(1) for peaks in (out, moved)]
    assert torch.equal(*farthest)


@pytest.mark.parametrize("N", [243, 700])
def test_any_batch_gives_the_same_bits(backend: str, N: int) -> None:
    """Whatever the rest of the batch: a copy, other samples, NaN."""
    x = torch.cat([motion(3, N, 33), torch.full((1, N, 33), torch.nan)])
    whole = dpc_knn(x, 81, 2, backend=backend)
    assert_same(whole, dpc_knn(x, 81, 2, backend=backend))
    for b in range(4):
        assert_same(dpc_knn(x[b : b + 1], 81, 2, backend=backend), sample(whole, b))
    swapped = dpc_knn(x.flip(0), 81, 2, backend=backend)
    for b in range(4):
        assert_same(sample(swapped, 3 - b), sample(whole, b))


@pytest.mark.parametrize("N", [63, 500])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_types_are_upcast(backend: str, N: int, dtype: torch.dtype) -> None:
    x = cloud(2, N, 33).to(dtype)
    assert_same(dpc_knn(x, 21, backend=backend), dpc_knn(x.float(), 21, backend=backend))


@pytest.mark.parametrize(("N", "C"), [(63, 131), (64, 132), (385, 36)])  # of 132 and 36, four at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["cloud", "tight groups"])  # of which one takes distances by differences
def test_any_strides_give_the_same_bits(backend: str, kind: str, N: int, C: int, dtype: torch.dtype) -> None:
    if backend == "torch":
        pytest.skip("PyTorch's own sums depend on strides")
    x = cloud(2, N, C)
    x = (x if kind == "cloud" else 1e-3 * x + 10 * torch.randn(2, 5, C)[:, torch.arange(N) % 5]).to(dtype)
    whole = dpc_knn(x, 21, backend=backend)
    for layout, view in layouts(x).items():
        plain = whole if torch.equal(view, x) else dpc_knn(view.contiguous(), 21, backend=backend)
        assert plain.index.any(), layout
        assert_same(dpc_knn(view, 21, backend=backend), plain)


# ---- real data, memory -----------------------------------------------------------------------------------------------


def test_captured_motion(backend: str) -> None:
    """Windows of a captured walk, embedded as MixSTE's first layer does it: a linear layer over the joints."""
    if not CAPTURED.exists():
        pytest.skip(f"no captured motion at {CAPTURED}")
    with np.load(CAPTURED) as arrays:
        poses = torch.as_tensor(arrays["keypoints_2d" if "keypoints_2d" in arrays else arrays.files[0]]).float()
    frames = poses.reshape(len(poses), -1)
    frames = (frames - frames.mean(0)) / frames.std(0).clamp(min=1e-6)
    x = torch.stack([frames[start : start + 243] for start in range(0, len(frames) - 243, 81)][:6])
    x = x @ torch.randn(x.shape[-1], 64) / 6
    for k in (2, 5):
        check_dpc_knn({"x": x, "num_clusters": 81, "k": k}, dpc_knn(x, 81, k, backend=backend))
    longest = (frames[:1500] @ torch.randn(frames.shape[-1], 64) / 6)[None]
    check_dpc_knn({"x": longest, "num_clusters": 500, "k": 2}, dpc_knn(longest, 500, 2, backend=backend))


# Not getrusage: its peak is inherited from the parent process.
MEASURE = """
import contextlib, re, sys, torch, hotkernels
threads, N, C, M, k = map(int, sys.argv[1:])
torch.set_num_threads(threads)
def kilobytes(what): return int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
x = torch.randn(1, N, C)
hotkernels.dpc_knn(x[:, :20], 5, backend="cpp")
with contextlib.suppress(OSError): open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = kilobytes("VmRSS")
hotkernels.dpc_knn(x, M, k, backend="cpp")
print((kilobytes("VmHWM") - before) / 1024)
"""


@only_cpp
@pytest.mark.parametrize(
    ("threads", "N", "C", "M", "k", "limit"),
    [
        (1, 8192, 256, 2048, 5, 64),  # the matrix of distances alone would be 256 MiB
        (32, 900, 8, 100, 400, 40),  # 5 blocks of tokens: lists of neighbours in every thread would be 88 MiB
    ],
)
def test_memory_is_not_quadratic(backend: str, threads: int, N: int, C: int, M: int, k: int, limit: int) -> None:
    """Nor does it grow with threads that have nothing to do. In MiB beyond the input."""
    if sys.platform != "linux":
        pytest.skip("peak memory is read as Linux counts it")
    command = [sys.executable, "-c", MEASURE, *map(str, (threads, N, C, M, k))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < limit


@pytest.mark.parametrize("M", [10, 100])
def test_equally_near_kept_tokens(backend: str, M: int) -> None:
    """A token is assigned to that of the smaller place, also where lists of neighbours end among them."""
    x = torch.randint(0, 12, (1, 900, 2)).float()
    out = dpc_knn(x, M, 3, backend=backend)
    expected = torch.cdist(x[0].double(), x[0, out.index[0]].double()).square().round().argmin(1)
    expected[out.index[0]] = torch.arange(M)
    assert torch.equal(out.assignment[0], expected)


@pytest.mark.parametrize("denser", [[0, 3], [1, 2]])
def test_noise_of_float64_orders_tokens_of_float64(denser: list[int]) -> None:
    x = torch.tensor([[[0.0], [1.0], [4.0], [5.0]]], dtype=torch.float64)
    noise = torch.full((1, 4), 0.5, dtype=torch.float64)
    noise[0, denser] += 1e-10  # less than float32 tells apart
    assert dpc_knn(x, 2, 2, noise=noise, ordered=True).index.tolist() == [denser]


@pytest.mark.parametrize("N", [40, 600])
@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_tight_groups_far_apart(N: int, spread: float, backend: str) -> None:
    """What cancels in a product is summed from differences: choices are those of float64."""
    if backend in GPU_BACKENDS:
        pytest.skip("a GPU rounds tokens to 11 bits")
    x = torch.randn(3, N, 8) * spread
    x[:, N // 2 :] += 10
    out = dpc_knn(x, N // 4, 5, ordered=True, backend=backend)
    check_dpc_knn({"x": x, "num_clusters": N // 4, "ordered": True}, out)
    assert (out.delta > 0).all()
    assert torch.equal(out.index, dpc_knn(x.double(), N // 4, 5, ordered=True).index)
