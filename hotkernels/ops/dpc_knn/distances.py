"""Squared distances between tokens in plain PyTorch, for the definition of dpc_knn: some rows of them at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ...errors import can_look

_AT_ONCE = 1 << 22  # held at a time, or one row of every sample: more rows are done in blocks
_COMPILED_AT_ONCE = 2048  # but of so few tokens in compiled code, which could not serve another N if it had blocks
# Where a squared distance is less than this much of a squared norm, products in float64 leave it too few bits.
_CANCELLED = 1e-7


class Distances:
    """|x_i - x_j|^2 of tokens [B, N, C], in float32 or x's float64: inf to a j that is not valid, those from it any.

    Symmetric bit for bit, and exactly 0 between equal tokens; no offset that all tokens have takes bits.
    """

    def __init__(self, x: Tensor, valid: Tensor) -> None:
        B, N, _ = x.shape
        self.step = max(1, _AT_ONCE // max(1, B * N))
        if torch.compiler.is_compiling() and N <= _COMPILED_AT_ONCE:
            self.step = N
        may_look = x.device.type == "cpu" and can_look(x) and not is_functorch_wrapped_tensor(x)
        self._by_products = x.dtype == torch.float32 and may_look
        self._all = _Tokens(x.double() - _pivots(x, valid) if self._by_products else x, valid)
        self._blocks = self._all.split(self.step)
        self._only = self._from(0) if len(self._blocks) == 1 else None

    def __iter__(self) -> Iterator[Tensor]:
        """[B, rows, N] for each `step` rows, the same bits every time."""
        if self._only is not None:
            yield self._only
        else:
            yield from map(self._from, range(len(self._blocks)))

    def to(self, index: Tensor) -> Iterator[Tensor]:
        """[B, rows, M] for each `step` rows, to the tokens at index [B, M]; -1 is infinitely far."""
        if self._only is not None:
            d = self._only.gather(2, index.clamp(min=0)[:, None].expand(-1, self._only.shape[1], -1))
            yield torch.where(index[:, None] >= 0, d, torch.inf)
        else:
            chosen = self._all.at(index)
            yield from (self._between(block, chosen) for block in self._blocks)

    def _from(self, i: int) -> Tensor:
        block = self._blocks[i]
        if not self._by_products:
            return self._between(block, self._all)
        # Products of (j, i) need not have the bits of those of (i, j): both are those of the first with the second.
        tiles = [self._between(block, b) if i <= j else self._between(b, block).mT for j, b in enumerate(self._blocks)]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, -1)

    def _between(self, a: _Tokens, b: _Tokens) -> Tensor:
        return _by_products(a, b) if self._by_products else _by_differences(a, b)


class _Tokens:
    """Tokens [B, n, C], and which of them are there."""

    def __init__(self, x: Tensor, there: Tensor) -> None:
        self.x, self.there = x, there

    @functools.cached_property
    def norm(self) -> Tensor:
        """Their squared norms [B, n, 1], infinite for those that are not there."""
        return torch.where(self.there, self.x.square().sum(-1), torch.inf)[..., None]

    def split(self, size: int) -> list[_Tokens]:
        """So many at a time."""
        return [_Tokens(*part) for part in zip(self.x.split(size, 1), self.there.split(size, 1), strict=True)]

    def at(self, index: Tensor) -> _Tokens:
        """Those at index [B, M]; -1 is none."""
        return _Tokens(self.x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, self.x.shape[-1])), index >= 0)


def _by_differences(a: _Tokens, b: _Tokens) -> Tensor:
    d = torch.cdist(a.x, b.x, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(b.there[:, None], d * d, torch.inf)


def _by_products(a: _Tokens, b: _Tokens) -> Tensor:
    """By matrix products in float64, those that are too small for that from differences; float32.

    Ten times as fast on a CPU, but it looks at values. Symmetric if b is a.
    """
    products = torch.baddbmm(b.norm.mT.expand(-1, a.x.shape[1], -1), a.x, b.x.mT, alpha=-2)
    d = products.add_(a.norm).float()
    near = d < (_CANCELLED * a.norm).float()
    if b is a:
        for t in (d, near):
            t.diagonal(dim1=1, dim2=2).zero_()
    for pairs in near.nonzero().split(max(1, _AT_ONCE // a.x.shape[2])):
        sample, i, j = pairs.unbind(1)
        d[sample, i, j] = (a.x[sample, i] - b.x[sample, j]).square().sum(-1).float()
    return torch.minimum(d, d.mT) if b is a else d


def _pivots(x: Tensor, valid: Tensor) -> Tensor:
    """Per sample and channel the median of three valid tokens, [B, 1, C]: outliers do not move it."""
    count = valid.sum(1, keepdim=True)
    first = (~valid).byte().argsort(dim=1, stable=True)  # the valid ones come first
    three = torch.cat([(count // 6 + nth * (count // 3)).clamp(max=valid.shape[1] - 1) for nth in range(3)], 1)
    return x.gather(1, first.gather(1, three)[..., None].expand(-1, -1, x.shape[-1])).median(1, keepdim=True).values
