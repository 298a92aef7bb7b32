"""dpc_knn by a cluster of blocks per sample, and by the launches of a chip without clusters."""

from __future__ import annotations

from collections.abc import Callable

import emulation
import pytest
import torch
from cases import cloud, hard_sample, layouts
from comparing import assert_same
from dpc_knn_steps import check_dpc_knn, sample

from hotkernels import dpc_knn

pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
SMALL = 352  # tokens that the CUDA kernel takes in one go, in tiles of 32


@pytest.mark.parametrize("C", [1, 3, 39, 130])
@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 243, 320, 321, 351, SMALL])
def test_both_forms_at_every_edge(backend: str, gpu: Callable[..., None], N: int, C: int) -> None:
    """A cluster per sample, and the launches of a chip without clusters."""
    for args in (hard_sample(N, C), {"x": cloud(1, N, C), "num_clusters": N, "k": N, "ordered": True, "seed": 3}):
        for capability in (90, 80):
            gpu(compute_capability=capability)
            check_dpc_knn(args, dpc_knn(**args, backend=backend))


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(("N", "C"), [(67, 130), (161, 17), (35, 1001), (18, 1536), (40, 4500)])
def test_any_order_of_threads_gives_the_same_bits(
    backend: str, gpu: Callable[..., None], N: int, C: int, capability: int
) -> None:
    args, outs = hard_sample(N, C), []
    for order in emulation.ORDERS:
        gpu(order, capability)
        outs.append(dpc_knn(**args, backend=backend))
        assert_same(outs[-1], outs[0])
    check_dpc_knn(args, outs[0])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
def test_without_clusters_any_strides_and_dtype(backend: str, gpu: Callable[..., None], dtype: torch.dtype) -> None:
    gpu(compute_capability=80)
    x = cloud(2, 64, 132).to(dtype)
    for view in layouts(x).values():
        plain = dpc_knn(view.float().contiguous(), 21, backend=backend)
        assert_same(dpc_knn(view, 21, backend=backend), plain)


def test_without_clusters_many_samples(backend: str, gpu: Callable[..., None]) -> None:
    """More than one round of launches takes."""
    gpu(compute_capability=80)
    x = cloud(150, 9, 5)
    whole = dpc_knn(x, 3, backend=backend)
    for b in (0, 63, 64, 149):
        assert_same(dpc_knn(x[b : b + 1], 3, backend=backend), sample(whole, b))
    check_dpc_knn({"x": x, "num_clusters": 3}, whole)
