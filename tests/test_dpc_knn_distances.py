"""The distances of dpc_knn's definition: in blocks, by products or differences, symmetric."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from cases import hard_sample
from comparing import assert_same
from dpc_knn_steps import check_dpc_knn
from torch import Tensor

from hotkernels import dpc_knn
from hotkernels.ops.dpc_knn.distances import Distances


@pytest.mark.parametrize("rows", [1, 7])
def test_rows_are_done_in_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PyTorch's distances; with all rows in one block nothing else is tested."""
    args = hard_sample(39, 5)
    whole = dpc_knn(**args, backend="torch")
    monkeypatch.setattr("hotkernels.ops.dpc_knn.distances._AT_ONCE", rows * 3 * 39)
    out = dpc_knn(**args, backend="torch")
    check_dpc_knn(args, out)
    assert_same(out, whole)


@pytest.mark.parametrize("look", [True, False], ids=["products", "differences"])
@pytest.mark.parametrize("step", [None, 7, 20], ids=["whole", "blocks of 7", "blocks of 20"])
@pytest.mark.parametrize("kind", ["cloud", "copies", "tight groups", "offset", "outlier", "zero"])
def test_distances_of_plain_pytorch(kind: str, step: int | None, look: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both ways that it has: symmetric bit for bit, 0 between equal tokens, as exact as float32."""
    B, N, C = 2, 39, 6
    x, valid = torch.randn(B, N, C), torch.rand(B, N) < 0.8
    if kind == "copies":
        x[:, N // 2 :] = x[:, : N - N // 2]
    elif kind == "tight groups":  # 10 apart, 1e-4 wide
        x = 1e-4 * x + 10 * (torch.rand(B, N, 1) < 0.5)
    elif kind == "offset":
        x += 1e5
    elif kind == "outlier":
        x[:, 3] = 1e9
    elif kind == "zero":
        x.zero_()
    monkeypatch.setattr("hotkernels.ops.dpc_knn.distances.can_look", lambda x: look)
    if step is not None:
        monkeypatch.setattr("hotkernels.ops.dpc_knn.distances._AT_ONCE", step * B * N)
    distances = Distances(x, valid)
    assert distances._by_products == look
    if kind == "offset" and look:  # it takes no bits of the products
        assert (distances._all.norm[valid] < 1e3).all()
    d, again = torch.cat([*distances], 1), torch.cat([*distances], 1)
    assert torch.equal(d, again)
    assert d.isinf()[valid].eq(~valid[:, None].expand(-1, N, -1)[valid]).all()
    both = valid[:, None, :] & valid[:, :, None]
    d = torch.where(both, d, 0.0)
    assert torch.equal(d, d.mT)
    exact = (x.double()[:, :, None] - x.double()[:, None]).square().sum(-1)
    assert torch.equal(d == 0, (exact == 0) | ~both)
    torch.testing.assert_close(d.double(), torch.where(both, exact, 0.0), rtol=1e-6, atol=0)
    index = torch.where(valid, torch.arange(N), -1)[:, [5, 0, 17, 30]]
    expected = torch.where(
        index[:, None] >= 0, exact.gather(2, index.clamp(min=0)[:, None].expand(-1, N, -1)), torch.inf
    )
    to = torch.cat([*distances.to(index)], 1)
    torch.testing.assert_close(to.double()[valid], expected[valid], rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [39, 7])
def test_distances_are_symmetric_whatever_products_are(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product and its transpose are rounded differently, if rarely by as much as float32 can tell."""
    product = torch.baddbmm

    def rounded(add: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        noise = torch.Generator().manual_seed(zlib.crc32(a.numpy().tobytes()))  # the same for the same product
        return product(add, a, b, **kwargs) * (1 + 1e-3 * torch.rand(add.shape, generator=noise))

    monkeypatch.setattr(torch, "baddbmm", rounded)
    monkeypatch.setattr("hotkernels.ops.dpc_knn.distances._AT_ONCE", step * 2 * 39)
    d = torch.cat([*Distances(torch.randn(2, 39, 6), torch.ones(2, 39, dtype=torch.bool))], 1)
    assert torch.equal(d, d.mT)
