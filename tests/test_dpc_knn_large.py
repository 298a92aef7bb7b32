"""dpc_knn of many tokens on CUDA: whatever the lists' length, the shares of the columns and the order of the threads.

The data are small integers: rounded tokens, products and sums are exact, so nothing but the check against float64 has a
tolerance, and every way through the kernels must give the same bits.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import emulation
import pytest
import torch
from comparing import assert_same
from dpc_knn_steps import check_dpc_knn, sample
from torch import Tensor

from hotkernels import dpc_knn

pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
emulated = pytest.mark.skipif(
    not os.environ.get("HOTKERNELS_EMULATE_CUDA"),
    reason="only the emulation lets a test choose how kernels work",
)


def exact(x: Tensor, N: int) -> Tensor:
    """[B, N, C] of integers up to 127 in modulus, in any order."""
    x = x[:, :N]
    x = (x / x.abs().amax((1, 2), keepdim=True).clamp(min=1e-6) * 127).round()
    return x[:, torch.randperm(N)]


def small_clusters(B: int, N: int, C: int) -> Tensor:
    """Of about the length of a list: their peaks find nobody denser, nor anybody kept, in it."""
    return 10 * torch.randn(B, N // 16 + 1, 1, C).expand(-1, -1, 16, -1).flatten(1, 2)[:, :N] + torch.randn(B, N, C) / 5


DATA: dict[str, Callable[[int, int, int], Tensor]] = {
    "cloud": lambda B, N, C: torch.randn(B, N, C),
    "walk": lambda B, N, C: torch.randn(B, N, C).cumsum(1),
    "line": lambda B, N, C: torch.arange(1.0, N + 1)[None, :, None].expand(B, N, C),
    "ever denser": lambda B, N, C: (0.99 ** torch.arange(N))[None, :, None].expand(B, N, C),
    "small clusters": small_clusters,
    "few distinct": lambda B, N, C: torch.randint(-1, 2, (B, N, C)).float(),
    "one place": lambda B, N, C: torch.ones(B, N, C),
    "two places": lambda B, N, C: (torch.arange(N) % 2 * 2 - 1.0)[None, :, None].expand(B, N, C),
}


@pytest.fixture
def tune(backend: str) -> Iterator[Callable[[int, int, int], None]]:
    """Sets how long lists are at least and at most, and how many blocks should be at work."""
    set_ = ctypes.CDLL(str(emulation.LIBRARY)).hk_dpc_knn_tune
    yield lambda *values: set_(*map(ctypes.c_int, values))
    set_(16, 64, 0)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    ("B", "N", "C", "k", "M"),
    [(1, 385, 150, 5, 1), (3, 511, 39, 1, 127), (1, 512, 3, 17, 512), (1, 513, 33, 40, 128), (1, 640, 96, 5, 160)],
)
def test_steps(backend: str, data: str, B: int, N: int, C: int, k: int, M: int) -> None:
    x = exact(DATA[data](B, N, C), N)
    check_dpc_knn({"x": x, "num_clusters": M, "k": k}, dpc_knn(x, M, k, backend=backend))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("k", [66, 200, 640])
def test_more_neighbours_than_a_list_holds(backend: str, data: str, k: int) -> None:
    x = exact(DATA[data](1, 640, 16), 640)
    check_dpc_knn({"x": x, "num_clusters": 100, "k": k}, dpc_knn(x, 100, k, backend=backend))


def test_more_kept_tokens_than_a_block_has_threads(backend: str) -> None:
    x, keep = torch.randn(1, 1300, 8), torch.randperm(1300)[:1100].tolist()
    out = dpc_knn(x, 1150, 3, keep=keep, backend=backend)
    check_dpc_knn({"x": x, "num_clusters": 1150, "k": 3, "keep": keep}, out)


@emulated
@pytest.mark.parametrize(
    ("data", "B", "N", "C", "k", "M"),
    [(data, *shape) for data in DATA for shape in ((1, 640, 39, 5, 160), (1, 400, 8, 3, 400))]
    + [(data, 1, 513, 8, 18, 20) for data in ("cloud", "two places", "ever denser")],  # which take seconds each
)
def test_every_way_gives_the_same_bits(
    backend: str,
    gpu: Callable[..., None],
    tune: Callable[[int, int, int], None],
    data: str,
    B: int,
    N: int,
    C: int,
    k: int,
    M: int,
) -> None:
    """Short lists leave nearly all to the searches; one block does them all; the columns are split, evenly or not.

    Where a block has 99 KB of shared memory, lists of 18 do not fit.
    """
    args: dict[str, Any] = {"x": exact(DATA[data](B, N, C), N), "num_clusters": M, "k": k, "keep": [3, N - 1, -1, 3]}
    gpu(compute_capability=90)
    whole = dpc_knn(**args, backend=backend)
    check_dpc_knn(args, whole)
    gpu(compute_capability=86)
    assert_same(dpc_knn(**args, backend=backend), whole)
    for values in ((1, 64, 1), (4, 4, 7), (16, 64, 12), (20, 64, 40), (100, 100, 3)):
        tune(*values)
        assert_same(dpc_knn(**args, backend=backend), whole)


@emulated
@pytest.mark.parametrize(("N", "k", "list_min", "orders"), [(513, 5, 16, 1), (640, 20, 2, 1), (385, 70, 16, 5)])
def test_every_order_of_threads_gives_the_same_bits(
    backend: str, tune: Callable[[int, int, int], None], N: int, k: int, list_min: int, orders: int
) -> None:
    tune(list_min, 64, 9)
    args: dict[str, Any] = {"x": exact(small_clusters(2, N, 33), N), "num_clusters": N // 4, "k": k}
    args["noise"] = torch.rand(2, N) * 1e-6
    outs = []
    for order in emulation.ORDERS[::orders]:
        emulation.configure(order)
        outs.append(dpc_knn(**args, backend=backend))
    emulation.configure()
    check_dpc_knn(args, outs[0])
    for out in outs[1:]:
        assert_same(out, outs[0])


def test_more_samples_than_a_block_looks_at_once(backend: str) -> None:
    """The searches deal out the work of 128 samples at a time. Half of the samples have few valid tokens, or none."""
    x = exact(DATA["small clusters"](130, 390, 4), 390)
    mask = torch.ones(130, 390, dtype=torch.bool)
    mask[1::4] = False
    mask[2::4, 5:] = False
    out = dpc_knn(x, 20, 3, mask=mask, backend=backend)
    check_dpc_knn({"x": x, "num_clusters": 20, "k": 3, "mask": mask}, out)
    for b in (0, 2, 127, 128, 129):
        alone = dpc_knn(x[b : b + 1], 20, 3, mask=mask[b : b + 1], backend=backend)
        assert_same(sample(out, b), alone)


@pytest.mark.parametrize("factor", [1e-15, 1e-7, 1e11])
def test_any_magnitude(backend: str, factor: float) -> None:
    """float16 sees tokens scaled to its range."""
    x = exact(torch.randn(1, 400, 16), 400) * 2.0 ** torch.tensor(factor).log2().round()
    check_dpc_knn({"x": x, "num_clusters": 40}, dpc_knn(x, 40, backend=backend))


def test_an_outlier_takes_no_bits_from_the_others(backend: str) -> None:
    """It is 2**28 of their units away, in a channel where they are 0: they still are distinct, and where they are."""
    x = exact(torch.randn(1, 400, 8), 400)
    x[0, :, 0] = 0
    x[0, 57] = 0
    x[0, 57, 0] = 2.0**28
    out = dpc_knn(x, 40, 2, backend=backend)
    d2 = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square() / 8
    expected = torch.exp(-d2.topk(2, largest=False).values.mean(-1))
    expected[0, 57] = 0
    torch.testing.assert_close(out.density.double(), expected, rtol=1e-5, atol=1e-30)


def test_fewer_valid_tokens_than_places_and_some_of_them_kept(backend: str) -> None:
    """How many are left for the best is known only once every entry of `keep` has been looked at."""
    x = exact(torch.randn(2, 400, 8), 400)
    mask = torch.ones(2, 400, dtype=torch.bool)
    mask[0, ::3] = mask[1, 5:290] = False
    for _ in range(4):  # under emulation, with other threads first each time
        args = {"x": x, "num_clusters": 400, "mask": mask, "keep": [398, 1, 200, 397, 0, 398]}
        check_dpc_knn(args, dpc_knn(**args, backend=backend))
