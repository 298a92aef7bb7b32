"""Self-attention that also says which tokens to keep: those to which the class token attends most."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from ...nn.linear import linear
from ...ops.gathered_attention.api import unpack
from ..twins import register_twin
from .published import (
    AFTER,
    LONG,
    QKV,
    Published,
    arguments,
    has_layers,
    plain_attention,
    project,
    random_tokens,
    served,
)
from .self_attention import attend_packed

_KIND = "attention that selects tokens"


@register_twin
class _EvitAttention(Published):
    """EViT's: forward(x [B, 1 + N, C], keep_rate = None, tokens = None) -> (out, index, idx, scores, number kept)."""

    kind = _KIND

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        if not (has_layers(module, "qkv") and hasattr(module, "keep_rate") and arguments(module) == 3):
            return False
        return plain_attention(module, 3, QKV)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = random_tokens(module.qkv, 2, 6)
        return [(x,), (x, 0.5), (x, None, 3)]

    def forward(self: Any, x: Tensor, keep_rate: Any = None, tokens: Any = None, /) -> Any:
        if not served(self, (*QKV, *AFTER), (x,)):
            return super().forward(x, keep_rate, tokens)
        rate = self.keep_rate if keep_rate is None else keep_rate
        kept = others = x.shape[1] - 1
        if tokens is not None:
            kept = tokens
        elif self.keep_rate < 1 and rate < 1:
            kept = math.ceil(rate * others)
        if not 1 <= kept <= others:
            return super().forward(x, keep_rate, tokens)
        out, found = _attend(self, x, None if kept == others else kept)
        return out, *found, kept


@register_twin
class _RankingAttention(Published):
    """TokenReduction's of EViT: forward(x [B, 1 + N, C]), which keeps keep_rate of the init_n tokens of an image."""

    kind = _KIND
    _hotkernels_returned: ClassVar[int] = 4  # of index, idx, scores and the number kept

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        if not has_layers(module, "qkv") or not all(hasattr(module, name) for name in ("keep_rate", "init_n")):
            return False
        return plain_attention(module, 1, QKV)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.qkv, 2, 1 + module.init_n),)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.qkv, 1, max(LONG, 1 + module.init_n)),)]

    def forward(self: Any, x: Tensor, /) -> Any:
        if not served(self, (*QKV, *AFTER), (x,)):
            return super().forward(x)
        kept = int(self.keep_rate * self.init_n) if self.keep_rate < 1 else None
        if kept is not None and kept >= x.shape[1] - 1:  # as no example has
            return super().forward(x)
        out, found = _attend(self, x, kept)
        return out, *(*found, kept)[: self._hotkernels_returned]


@register_twin
class _TopKAttention(_RankingAttention):
    """TokenReduction's of top-k, which returns (out, index, idx)."""

    _hotkernels_returned = 2


def _attend(module: Any, x: Tensor, kept: int | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The attention; and of `kept` tokens, best first, the index [B, kept, C] and [B, kept], and all scores [B, N]."""
    qkv = linear(module.qkv, x)
    found: tuple[Tensor | None, ...] = (None, None, None)
    if kept is not None:  # first: Dynamo cannot multiply by a dynamic scale that an autograd.Function had before
        query, key, _ = unpack(qkv.unflatten(-1, (3, module.num_heads, -1)))
        of_class_token = (query[:, :, :1] @ key.mT * module.scale).softmax(-1)
        scores = of_class_token[:, :, 0, 1:].mean(1)
        best = scores.topk(kept, 1)[1]
        found = best.unsqueeze(-1).expand(-1, -1, x.shape[-1]), best, scores
    return project(module, attend_packed(qkv, module.num_heads, module.scale)), found
