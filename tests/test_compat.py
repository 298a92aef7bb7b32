"""hotkernels.compat against the published functions: same noise, same clusters, same dicts, same gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

from hotkernels.baselines import cluster_dpc_knn_eager, merge_tokens_eager
from hotkernels.compat import (
    _published,
    chat_univi,
    ermvp,
    flashvid,
    hot,
    prunevid,
    sparsevlm,
    tcformer,
    token_reduction,
)


def seeded(seed: int, function: Callable[[], Any]) -> tuple[Any, Tensor]:
    """What `function` returns after a manual seed, and the state of the global generator that it leaves."""
    torch.manual_seed(seed)
    return function(), torch.get_rng_state()


def published(x: Tensor, cluster_num: int, k: int, seed: int, **kwargs: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The published function on x in its own dtype, drawing its own noise."""
    return seeded(
        seed,
        lambda: cluster_dpc_knn_eager(x, cluster_num, k, torch.rand(x.shape[:2], dtype=x.dtype) * 1e-6, **kwargs),
    )


def noise_after(seed: int, x: Tensor) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(x.shape[:2], dtype=x.dtype) * 1e-6


def overlap(index: Tensor, other: Tensor) -> float:
    """Share of the tokens chosen by one that the other chose too, over the batch."""
    same = [len(set(a) & set(b)) for a, b in zip(index.tolist(), other.tolist(), strict=True)]
    return sum(same) / index.numel()


def tokens(B: int, N: int, C: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, N, C, generator=torch.Generator().manual_seed(seed)).to(dtype)


def smooth(B: int, N: int, C: int, seed: int = 0) -> Tensor:
    """A smooth motion: with k = 2 most densities tie, and the noise decides."""
    walk = tokens(B, N, C, seed).cumsum(1)
    kernel = torch.hann_window(15, periodic=False).reshape(1, 1, -1)
    walk = torch.nn.functional.conv1d(walk.mT.reshape(B * C, 1, N), kernel, padding="same").reshape(B, C, N).mT
    return torch.nn.functional.layer_norm(walk, (C,))


def dict_of(x: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
    B, N, _ = x.shape
    return {
        "x": x,
        "token_num": N,
        "map_size": grid,
        "init_grid_size": grid,
        "idx_token": torch.arange(N).expand(B, -1),
        "agg_weight": x.new_ones(B, N, 1),
    }


@pytest.mark.parametrize(
    ("B", "N", "C", "M", "k"),
    [(2, 243, 512, 81, 5), (3, 196, 384, 49, 5), (1, 16, 4096, 4, 7), (2, 17, 8, 17, 3), (2, 40, 16, 1, 1)],
)
def test_hot_chooses_and_assigns_as_published(B: int, N: int, C: int, M: int, k: int) -> None:
    x = tokens(B, N, C, seed=N)
    (index, idx_cluster), state = seeded(7, lambda: hot.cluster_dpc_knn(x, M, k))
    expected, expected_cluster = cluster_dpc_knn_eager(x.double(), M, k, noise_after(7, x).double())
    assert torch.equal(state, published(x, M, k, seed=7)[1])
    assert index.dtype == idx_cluster.dtype == torch.int64
    assert index.shape == (B, M)
    assert idx_cluster.shape == (B, N)
    if k == 1:  # all densities are 1 + noise: float32 cannot tell them apart as float64 does
        return
    assert overlap(index, expected) == 1
    # Order may differ where two scores agree to rounding; the cluster of a token is compared by its centre.
    same = index.gather(1, idx_cluster) == expected.gather(1, expected_cluster)
    assert same.float().mean() > 0.995
    assert (index == expected).float().mean() > 0.95


def test_hot_ties_of_two_neighbours_no_worse_than_published() -> None:
    """k = 2 on smooth motion: noise near float32's rounding decides, and the published float32 itself errs."""
    x = smooth(4, 243, 128)
    index, _ = seeded(3, lambda: hot.cluster_dpc_knn(x, 81, 2))[0]
    exact, _ = cluster_dpc_knn_eager(x.double(), 81, 2, noise_after(3, x).double())
    theirs, _ = published(x, 81, 2, seed=3)[0]
    assert overlap(index, exact) >= max(0.9, overlap(theirs, exact))


@pytest.mark.parametrize("length", [351, 243])
def test_hot_center_is_left_to_the_caller(length: int) -> None:
    """As MHFormer calls it: one less than it keeps, the centre appended, then sorted."""
    kept, center = {351: 117, 243: 61}[length], (length - 1) // 2
    x = tokens(2, length, 192)
    (index, idx_cluster), state = seeded(5, lambda: hot.cluster_dpc_knn_center(x, kept - 1, 5, center))
    noise = noise_after(5, x).double()
    expected, expected_cluster = cluster_dpc_knn_eager(x.double(), kept - 1, 5, noise, center=center)
    assert torch.equal(state, published(x, kept - 1, 5, seed=5, center=center)[1])
    assert not (index == center).any()
    assert overlap(index, expected) == 1
    same = index.gather(1, idx_cluster) == expected.gather(1, expected_cluster)
    assert same.float().mean() > 0.995
    frames, _ = torch.cat([index, torch.full_like(index[:, :1], center)], 1).sort()
    assert (frames == center).sum(1).tolist() == [1, 1]
    assert (frames.diff(dim=1) > 0).all()


def test_merge_takes_an_idx_token_that_is_on_the_cpu() -> None:
    """As Chat-UniVi makes it, wherever the tokens are; here they are on the meta device."""
    tokens = {
        "x": torch.empty(2, 9, 4, device="meta"),
        "idx_token": torch.arange(9).expand(2, -1),
        "agg_weight": torch.empty(2, 9, 1, device="meta"),
    }
    out = chat_univi.merge_tokens(tokens, torch.empty(2, 9, dtype=torch.int64, device="meta"), 3)
    assert {t.device.type for t in (out["x"], out["idx_token"], out["agg_weight"])} == {"meta"}


@pytest.mark.parametrize("center", [9, -10])
def test_hot_center_is_one_of_the_tokens(center: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^cluster_dpc_knn_center: center must be in \[-9, N - 1 = 8\], got {center}$"
    ):
        hot.cluster_dpc_knn_center(torch.randn(1, 9, 3), 4, 2, center)


def test_hot_center_must_be_given() -> None:
    with pytest.raises(TypeError, match=r"^cluster_dpc_knn_center: center must be an int, got NoneType$"):
        hot.cluster_dpc_knn_center(torch.randn(1, 9, 3), 4, 2, None)


def test_hot_center_leaves_ties_to_the_noise() -> None:
    """Of each token and its copy, the one with more noise."""
    x = tokens(4, 30, 4, dtype=torch.float64).repeat_interleave(2, 1)
    (index, _), _ = seeded(6, lambda: hot.cluster_dpc_knn_center(x, 20, 2, 30))
    expected, _ = cluster_dpc_knn_eager(x, 20, 2, noise_after(6, x), center=30)
    assert overlap(index, expected) == 1


def test_hot_center_with_every_token_wanted_and_from_the_end() -> None:
    x = tokens(2, 9, 4)
    index, idx_cluster = hot.cluster_dpc_knn_center(x, 9, 2, 4)
    assert torch.equal(index.sort(1).values, torch.arange(9).expand(2, -1))
    assert (index[:, -1] == 4).all()
    assert torch.equal(idx_cluster.gather(1, index), torch.arange(9).expand(2, -1))
    last = seeded(0, lambda: hot.cluster_dpc_knn_center(x, 3, 2, -1))[0]
    assert torch.equal(last[0], seeded(0, lambda: hot.cluster_dpc_knn_center(x, 3, 2, 8))[0][0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_hot_center_is_traced() -> None:
    """There, numbers of tokens are tensors."""
    x, call = tokens(2, 9, 4), lambda x: hot.cluster_dpc_knn_center(x, 3, 2, 4)
    traced = torch.jit.trace(call, x, check_trace=False)
    for ours, expected in zip(*(seeded(0, lambda f=f: f(x))[0] for f in (traced, call)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int64])
def test_masked_tokens_are_in_the_first_cluster(kind: torch.dtype) -> None:
    x = tokens(3, 50, 16)
    mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(1)) > 0.3
    (index, idx_cluster), state = seeded(2, lambda: hot.cluster_dpc_knn(x, 12, 5, mask.to(kind)))
    noise = noise_after(2, x).double()
    expected, expected_cluster = cluster_dpc_knn_eager(x.double(), 12, 5, noise, token_mask=mask)
    assert torch.equal(state, published(x, 12, 5, seed=2, token_mask=mask)[1])
    # The published code couples samples in one place, the delta of the densest token, which is chosen either way.
    assert overlap(index, expected) == 1
    assert (idx_cluster[~mask] == 0).all()
    same = index.gather(1, idx_cluster) == expected.gather(1, expected_cluster)
    assert same[mask].all()


def test_too_few_valid_tokens_are_filled_with_masked_ones() -> None:
    x = tokens(3, 12, 4)
    mask = torch.full((3, 12), -1.0)
    mask[0, [3, 7]] = 1
    mask[1] = 1
    index, idx_cluster = hot.cluster_dpc_knn(x, 5, 2, mask)
    assert set(index[0, :2].tolist()) == {3, 7}
    assert index[0, 2:].tolist() == [0, 1, 2]
    assert index[2].tolist() == [0, 1, 2, 3, 4]
    for b in range(3):
        assert len(set(index[b].tolist())) == 5
        assert idx_cluster[b, index[b]].tolist() == list(range(5))
    assert idx_cluster[0, [4, 5, 6, 8, 9, 10, 11]].eq(0).all()
    # The centre variant: the centre is taken by nobody, masked or not.
    for center in (3, 5):
        index, idx_cluster = hot.cluster_dpc_knn_center(x, 5, 2, center, mask)
        assert not (index == center).any()
        assert index.min() >= 0
        assert idx_cluster.min() >= 0
        assert all(len(set(row)) == 5 for row in index.tolist())


def test_token_with_nan_is_masked() -> None:
    x = tokens(1, 20, 8)
    x[0, 4] = torch.nan
    index, idx_cluster = hot.cluster_dpc_knn(x, 6, 3)
    assert 4 not in index[0].tolist()
    assert idx_cluster[0, 4] == 0


def test_no_sample_changes_another() -> None:
    x, mask = tokens(4, 60, 8), torch.ones(4, 60)
    mask[2, 30:] = 0
    whole = seeded(1, lambda: hot.cluster_dpc_knn(x, 10, 4, mask))[0]
    noisy = x.clone()
    noisy[2] *= 1000
    other = seeded(1, lambda: hot.cluster_dpc_knn(noisy, 10, 4, mask))[0]
    for b in (0, 1, 3):
        assert torch.equal(whole[0][b], other[0][b])
        assert torch.equal(whole[1][b], other[1][b])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_draw_is_of_the_dtype_of_the_published_density(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chat-UniVi, PruneVid, FlashVID cluster in float32; others in x's dtype, halves in float32 under autocast."""
    x = tokens(2, 30, 8, dtype=dtype)
    draws = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **how: draws.append((size, how["dtype"])) or rand(*size, **how))
    hot.cluster_dpc_knn(x, 5, 3)
    hot.cluster_dpc_knn_center(x, 5, 3, 2)
    token_reduction.cluster_dpc_knn(x, 5, 3)
    ermvp.cluster_dpc_knn(x, 5, 3)
    tcformer.cluster_dpc_knn({"x": x}, 5, 3)
    chat_univi.cluster_dpc_knn({"x": x}, 5, 3)
    prunevid.cluster_dpc_knn(x, 5, 3)
    flashvid.dpc_knn(x, 5, 3)
    sparsevlm.cluster_and_merge(x, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hot.cluster_dpc_knn(x, 5, 3)
    cast = dtype if dtype == torch.float64 else torch.float32
    assert draws == [((2, 30), drawn) for drawn in [dtype] * 5 + [torch.float32] * 3 + [dtype, cast]]


def test_origins_return_what_theirs_do() -> None:
    x = tokens(2, 32, 16)
    index, idx_cluster = seeded(0, lambda: hot.cluster_dpc_knn(x, 8, 3))[0]
    for function in (
        lambda: tcformer.cluster_dpc_knn({"x": x}, 8, k=3, token_mask=None),
        lambda: tcformer.cluster_dpc_knn(MappingProxyType({"x": x}), 8, 3),
        lambda: chat_univi.cluster_dpc_knn({"x": x, "mask": None}, 8, 3),
        lambda: chat_univi.cluster_dpc_knn({"x": x}, 8, 3),
        lambda: prunevid.cluster_dpc_knn(x, 8, 3),
        lambda: ermvp.cluster_dpc_knn(x, 8, 3),
    ):
        (assigned, cluster_num), _ = seeded(0, function)
        assert torch.equal(assigned, idx_cluster)
        assert cluster_num == 8
    assert torch.equal(idx_cluster.gather(1, index), torch.arange(8).expand(2, -1))
    _, of_five = seeded(0, lambda: hot.cluster_dpc_knn(x, 8, 5))[0]
    assigned, chosen = seeded(0, lambda: token_reduction.cluster_dpc_knn(x, 8, 3, token_mask=None))[0]
    assert torch.equal(assigned, idx_cluster)
    assert torch.equal(chosen, index)
    assigned, chosen = seeded(0, lambda: flashvid.dpc_knn(features=x, num_clusters=8, k=3))[0]
    assert torch.equal(assigned, idx_cluster)
    assert torch.equal(chosen, index)
    of_seven = seeded(0, lambda: hot.cluster_dpc_knn(x, 8, 7))[0]
    assert torch.equal(seeded(0, lambda: flashvid.dpc_knn(x, 8))[0][1], of_seven[0])
    without_dicts = [(origin, x) for origin in (prunevid, ermvp, token_reduction)]
    for function, tokens_of in ((tcformer, {"x": x}), (chat_univi, {"x": x}), *without_dicts):
        assert torch.equal(seeded(0, lambda f=function, t=tokens_of: f.cluster_dpc_knn(t, 8))[0][0], of_five)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparsevlm_clusters_and_merges_as_published(dtype: torch.dtype) -> None:
    x = tokens(2, 60, 16, dtype=dtype).requires_grad_()
    merged, state = seeded(4, lambda: sparsevlm.cluster_and_merge(x, 7))
    exact = x.detach().double().requires_grad_()
    _, assigned = cluster_dpc_knn_eager(exact, 7, 7, noise_after(4, x).double())
    expected = merge_tokens_eager(exact, assigned, 7, exact.new_ones(2, 60, 1))
    assert torch.equal(state, published(x, 7, 7, seed=4)[1])
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(out.square().sum(), t)[0] for out, t in ((merged, x), (expected, exact))]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-6)


def test_chat_univi_leaves_k_and_the_mask_of_the_dict_to_its_caller() -> None:
    x, mask = tokens(2, 16, 8), (torch.arange(16) < 9).float().expand(2, -1)
    for token_mask in (None, mask):
        for cluster_num, k in ((4, 5), (1, 5), (8, 3)):
            ours, plain = (
                seeded(0, lambda f=f, x=x, n=cluster_num, k=k, m=token_mask: f(x, n, k, m))[0][0]
                for f, x in ((chat_univi.cluster_dpc_knn, {"x": x, "mask": mask}), (prunevid.cluster_dpc_knn, x))
            )
            assert torch.equal(ours, plain)


def published_merge(token_dict: dict[str, Any], idx_cluster: Tensor, cluster_num: int, weight: Tensor) -> list[Tensor]:
    """x, idx_token and agg_weight after a published merge, one cluster at a time."""
    x, idx_token = token_dict["x"], token_dict["idx_token"]
    member = torch.nn.functional.one_hot(idx_cluster, cluster_num).to(weight.dtype)
    total = member @ (member.mT @ weight) + 1e-6
    agg_weight = token_dict["agg_weight"] * (weight / total).gather(1, idx_token[..., None])
    return [merge_tokens_eager(x, idx_cluster, cluster_num, weight), idx_cluster.gather(1, idx_token), agg_weight]


@pytest.mark.parametrize("scatters", [("cpu",), ()], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_matches_published_with_gradients(
    dtype: torch.dtype, scatters: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotkernels.compat._published._SCATTERS_IN_ORDER", scatters)
    B, N, C, M = 2, 48, 12, 9
    grid = dict_of(tokens(B, 64, C), (8, 8))
    results = []
    for merge in (lambda d, i, w: tcformer.merge_tokens(d, i, M, w), lambda d, i, w: published_merge(d, i, M, w)):
        g = torch.Generator().manual_seed(3)
        token_dict = copy.copy(grid)
        token_dict["idx_token"] = torch.randint(N, (B, 64), generator=g)
        x = torch.randn(B, N, C, generator=g).to(dtype).requires_grad_()
        score = torch.randn(B, N, 1, generator=g).to(dtype).requires_grad_()
        token_dict["agg_weight"] = torch.rand(B, 64, 1, generator=g).to(dtype).requires_grad_()
        idx_cluster = torch.randint(M - 1, (B, N), generator=g)  # the last cluster is empty
        weight = score.exp() * torch.where(idx_cluster == 0, 1e-6, 1.0)[..., None]  # as much as is added to their sum
        out = merge({**token_dict, "x": x}, idx_cluster, weight)
        if isinstance(out, dict):
            assert list(out) == ["x", "token_num", "idx_token", "agg_weight", "map_size", "init_grid_size"]
            assert (out["token_num"], out["map_size"], out["init_grid_size"]) == (M, (8, 8), (8, 8))
            out = [out["x"], out["idx_token"], out["agg_weight"]]
        loss = (out[0] * torch.randn(out[0].shape, generator=g)).sum() + (out[2] * torch.rand(64, 1, generator=g)).sum()
        results.append([*out, *torch.autograd.grad(loss, [x, score, token_dict["agg_weight"]])])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    assert (results[0][0][:, -1] == 0).all()


@pytest.mark.parametrize("weighted", [True, False])
def test_merges_without_a_dict(weighted: bool) -> None:
    x = tokens(2, 30, 8)
    token_dict = dict_of(x, (5, 6)) | {"agg_weight": torch.rand(2, 30, 1)}
    idx_cluster, weight = torch.randint(9, (2, 30)), torch.rand(2, 30, 1) if weighted else None
    expected = tcformer.merge_tokens(token_dict, idx_cluster, 9, weight)
    entries = {key: token_dict[key] for key in ("x", "idx_token", "agg_weight")}
    merged = token_reduction.merge_tokens(**entries, idx_cluster=idx_cluster, cluster_num=9, token_weight=weight)
    for got, key in zip(merged, entries, strict=True):
        assert torch.equal(got, expected[key])
    merged, index = ermvp.merge_tokens(x, idx_cluster, 9, weight)
    assert torch.equal(merged, expected["x"])
    assert torch.equal(index, idx_cluster)
    assert index is not idx_cluster


def test_merge_of_half_tokens_keeps_wide_weights() -> None:
    """Under autocast the weight, an exp, is float32 and would overflow float16."""
    x = tokens(1, 10, 4, dtype=torch.float16)
    idx_cluster = torch.arange(10)[None] % 3
    weight = torch.linspace(1, 15, 10)[None, :, None].exp()
    out = tcformer.merge_tokens(dict_of(x, (2, 5)), idx_cluster, 3, weight)
    assert out["x"].dtype == torch.float16
    exact = merge_tokens_eager(x.double(), idx_cluster, 3, weight.double())
    torch.testing.assert_close(out["x"].double(), exact, rtol=1e-3, atol=1e-3)
    assert out["agg_weight"].dtype == torch.float32


def test_merge_of_int32_clusters_gives_an_index_that_the_next_merge_takes() -> None:
    x, cells, weight = torch.randn(1, 6, 4), torch.arange(6)[None], torch.ones(1, 6, 1)
    for idx_cluster in (torch.tensor([[0, 0, 1, 2, 2, 1]]), torch.tensor([[0, 1, 1]])):
        x, cells, weight = _published.merge(x, cells, weight, idx_cluster.int(), 3 if x.shape[1] == 6 else 2)
    assert cells.tolist() == [[0, 0, 1, 1, 1, 1]]


def test_merge_leaves_out_tokens_in_no_cluster() -> None:
    """-1, as `dpc_knn` returns it for masked tokens: the others are merged as if alone."""
    x, idx_cluster = tokens(1, 6, 4), torch.tensor([[0, 1, -1, 1, -1, 1]])
    out = tcformer.merge_tokens(dict_of(x, (2, 3)), idx_cluster, 2)
    there = idx_cluster[0] >= 0
    torch.testing.assert_close(out["x"], torch.stack([x[:, 0], x[:, [1, 3, 5]].mean(1)], 1))
    torch.testing.assert_close(out["agg_weight"][0, :, 0], torch.where(there, torch.tensor([1, *[1 / 3] * 5]), 0.0))
    weightless = tcformer.merge_tokens(dict_of(x, (2, 3)), idx_cluster, 2, torch.zeros(1, 6, 1))
    assert not weightless["x"].any()
    assert not weightless["agg_weight"].any()


def test_tcformer_stages() -> None:
    """784 -> 196 -> 49 -> 13 tokens of a 28 x 28 grid, each stage against the published one on the same input."""
    torch.manual_seed(0)
    state = dict_of(tokens(2, 784, 32), (28, 28))
    for _ in range(3):
        x = state["x"]
        N, cluster_num = x.shape[1], math.ceil(x.shape[1] / 4)
        before = torch.get_rng_state()
        weight = x.mean(-1, keepdim=True).exp()
        idx_cluster, returned = tcformer.cluster_dpc_knn(state, cluster_num)
        assert returned == cluster_num
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        noise = torch.rand(2, N) * 1e-6
        assert torch.equal(torch.get_rng_state(), after)
        expected = cluster_dpc_knn_eager(x.double(), cluster_num, 5, noise.double())[1]
        # Cluster numbers follow the order of scores, which rounding may swap: compare who is with whom.
        together = (idx_cluster[:, :, None] == idx_cluster[:, None]) == (expected[:, :, None] == expected[:, None])
        assert together.float().mean() > 0.9999
        out = tcformer.merge_tokens(state, idx_cluster, cluster_num, weight)
        for ours, theirs in zip(
            [out["x"], out["idx_token"], out["agg_weight"]],
            published_merge(state, idx_cluster, cluster_num, weight),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        state = out
    assert state["x"].shape == (2, 13, 32)
    # Over a cluster, the shares of all its grid cells sum to 1.
    shares = torch.zeros(2, 13).scatter_add(1, state["idx_token"], state["agg_weight"][..., 0])
    torch.testing.assert_close(shares, torch.ones(2, 13), rtol=1e-4, atol=1e-4)


def test_chat_univi_stages() -> None:
    """256 -> 64 -> 32 -> 16 bfloat16 tokens, k = 5, 3, 3, as its chain of modules calls them."""
    x = tokens(2, 256, 64, dtype=torch.bfloat16)
    state = {**dict_of(x, (16, 16)), "mask": None}
    for cluster_num, k in [(64, 5), (32, 3), (16, 3)]:
        (idx_cluster, _), rng = seeded(4, lambda d=state, n=cluster_num, k=k: chat_univi.cluster_dpc_knn(d, n, k))
        x32 = state["x"].float()
        assert torch.equal(rng, published(x32, cluster_num, k, seed=4)[1])
        expected = cluster_dpc_knn_eager(x32.double(), cluster_num, k, noise_after(4, x32).double())[1]
        together = (idx_cluster[:, :, None] == idx_cluster[:, None]) == (expected[:, :, None] == expected[:, None])
        assert together.float().mean() > 0.999
        state = chat_univi.merge_tokens(state, idx_cluster, cluster_num)
        assert list(state) == ["x", "token_num", "idx_token", "agg_weight", "mask"]
        assert state["mask"] is None
        assert state["x"].dtype == torch.bfloat16
    assert state["x"].shape == (2, 16, 64)


def test_selection_carries_no_gradient_and_takes_x_that_does() -> None:
    x = tokens(2, 40, 8).requires_grad_()
    index, idx_cluster = hot.cluster_dpc_knn(x, 10, 2)
    assert not index.requires_grad
    out = tcformer.merge_tokens(dict_of(x, (5, 8)), idx_cluster, 10)
    out["x"].sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not tcformer.merge_tokens(dict_of(x, (5, 8)), idx_cluster, 10)["x"].requires_grad


def test_autocast_changes_nothing_but_the_draw() -> None:
    x = tokens(2, 40, 8)
    plain = seeded(0, lambda: hot.cluster_dpc_knn(x, 10, 3))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = seeded(0, lambda: hot.cluster_dpc_knn(x, 10, 3))[0]
        merged = tcformer.merge_tokens(dict_of(x, (5, 8)), cast[1], 10, x.mean(-1, keepdim=True).exp())
    assert torch.equal(plain[0], cast[0])
    assert merged["x"].dtype == torch.float32


def test_whole_step_compiles_without_a_break() -> None:
    def step(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index, _ = hot.cluster_dpc_knn(x, 10, 2)
        center, _ = hot.cluster_dpc_knn_center(x, 9, 2, 20)
        idx_cluster, cluster_num = tcformer.cluster_dpc_knn({"x": x}, 10)
        merged = tcformer.merge_tokens(dict_of(x, (5, 8)), idx_cluster, cluster_num, weight)
        return index, center, merged["x"]

    x, weight = tokens(2, 40, 8), tokens(2, 40, 1).exp().requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (index, center, merged), state = seeded(0, lambda: compiled(x, weight))
    (expected, expected_center, expected_merged), expected_state = seeded(0, lambda: step(x, weight))
    assert torch.equal(index, expected)
    assert torch.equal(center, expected_center)
    torch.testing.assert_close(merged, expected_merged)
    assert torch.equal(state, expected_state)
    merged.sum().backward()
    assert weight.grad is not None


def merge_all(x: Tensor, **given: Any) -> Any:
    token_dict = {"x": x, "idx_token": torch.zeros(2, 32, dtype=torch.int64), "agg_weight": torch.ones(2, 32, 1)}
    token_dict |= {name: given.pop(name) for name in list(given) if name in token_dict}
    args = {"token_dict": token_dict, "idx_cluster": torch.zeros(2, 16, dtype=torch.int64), "cluster_num": 3} | given
    return chat_univi.merge_tokens(**args)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: hot.cluster_dpc_knn(x[0], 3, 2), "cluster_dpc_knn: x must be"),
        (lambda x: hot.cluster_dpc_knn(x.long(), 3, 2), "cluster_dpc_knn: x must be"),
        (lambda x: hot.cluster_dpc_knn(x, 17, 2), "cluster_dpc_knn: cluster_num must be"),
        (lambda x: hot.cluster_dpc_knn_center(x, 3, 2, 16), "cluster_dpc_knn_center: center must be"),
        (lambda x: hot.cluster_dpc_knn(x, 3, 17), "^cluster_dpc_knn: k must be"),
        (lambda x: hot.cluster_dpc_knn(x, 3, 2, torch.ones(2, 5)), "cluster_dpc_knn: token_mask must be"),
        (lambda x: hot.cluster_dpc_knn(x, 3, 2, [[1] * 16] * 2), "cluster_dpc_knn: token_mask must be"),
        (
            lambda x: hot.cluster_dpc_knn(x, 3, 2, torch.ones(2, 16).cfloat()),
            "cluster_dpc_knn: token_mask must be a tensor of float32, .+, got complex64",
        ),
        (lambda x: prunevid.cluster_dpc_knn(x.cfloat(), 3), "cluster_dpc_knn: x must be .+, got complex64"),
        (
            lambda x: merge_all(x, idx_token=torch.full((2, 32), 16)),
            r"^merge_tokens: idx_token must be in \[0, 16\), got 16$",
        ),
        (lambda x: merge_all(x, idx_token=torch.full((2, 32), -1)), r"^merge_tokens: idx_token must be .+, got -1$"),
        (lambda x: tcformer.cluster_dpc_knn({"x": x}, 0), "cluster_dpc_knn: cluster_num must be"),
        (lambda x: tcformer.cluster_dpc_knn(x, 3), "cluster_dpc_knn: token_dict must be a dict with 'x', got Tensor"),
        (lambda x: chat_univi.cluster_dpc_knn({"y": x}, 3), "cluster_dpc_knn: token_dict must be .+, got one with"),
        (lambda x: chat_univi.cluster_dpc_knn({"x": x}, None), "cluster_dpc_knn: cluster_num must be an int"),
        (lambda x: chat_univi.cluster_dpc_knn({"x": x}, 3, "5"), "cluster_dpc_knn: k must be an int"),
        (lambda x: prunevid.cluster_dpc_knn([x], 3), "cluster_dpc_knn: x must be"),
        (lambda x: flashvid.dpc_knn([x], 3), "^dpc_knn: features must be"),
        (lambda x: flashvid.dpc_knn(x[0], 3), "^dpc_knn: features must be"),
        (lambda x: flashvid.dpc_knn(x, 17), "^dpc_knn: num_clusters must be"),
        (lambda x: flashvid.dpc_knn(x, 3, 17), "^dpc_knn: k must be"),
        (lambda x: flashvid.dpc_knn(x, 3, 2, torch.ones(2, 5)), "^dpc_knn: valid_token_mask must be"),
        (lambda x: sparsevlm.cluster_and_merge(x[0], 3), "^cluster_and_merge: x must be"),
        (lambda x: sparsevlm.cluster_and_merge(x, 17), "^cluster_and_merge: cluster_num must be"),
        *(
            (lambda x, change=change: merge_all(**{"x": x} | change(x)), f"merge_tokens: {arg} must be")
            for arg, change in {
                "token_dict": lambda x: {"token_dict": x},
                "x": lambda x: {"x": x[0]},
                "idx_cluster": lambda x: {"idx_cluster": torch.zeros(2, 15, dtype=torch.int64)},
                "idx_token": lambda x: {"idx_token": torch.zeros(2, 32)},
                "agg_weight": lambda x: {"agg_weight": torch.ones(2, 32)},
                "cluster_num": lambda x: {"cluster_num": 0},
                "token_weight": lambda x: {"token_weight": torch.ones(16, 2)},
            }.items()
        ),
    ],
)
def test_wrong_arguments(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(tokens(2, 16, 4))


def test_empty_batch() -> None:
    index, idx_cluster = hot.cluster_dpc_knn(torch.zeros(0, 16, 4), 3, 2)
    assert index.shape == (0, 3)
    assert idx_cluster.shape == (0, 16)
    assert hot.cluster_dpc_knn_center(torch.zeros(0, 16, 4), 3, 2, 8)[0].shape == (0, 3)
