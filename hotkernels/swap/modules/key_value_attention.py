"""Attention whose keys and values are projected apart from the queries: of others, or of the same tokens, reduced."""

from __future__ import annotations

from types import FunctionType, ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ...nn.attention import cross_attention
from ...nn.linear import linear
from ...ops.gathered_attention import gathered_attention
from ..twins import register_twin
from .published import (
    AFTER,
    LONG,
    Published,
    arguments,
    attention_obstacle,
    has_layers,
    plain_attention,
    project,
    random_tokens,
    reduces,
    served,
)

_LONG_SIDES = (12, 25)  # of a map of LONG tokens
_Q_K_V, _Q_KV = {"linear_q": 1, "linear_k": 1, "linear_v": 1}, {"q": 1, "kv": 2}


@register_twin
class _CrossAttention(Published):
    """HoT and MHFormer: forward(x_1 [B, L, C], x_2 [B, M, C], x_3 [B, M, C])."""

    kind = "cross-attention"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        if not has_layers(module, "linear_q", "linear_k", "linear_v"):
            return False
        return plain_attention(module, 3, _Q_K_V)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = random_tokens(module.linear_q, 3, 5)
        return [
            (x, random_tokens(module.linear_q, 3, 5), random_tokens(module.linear_q, 3, 5)),
            (x[:1].expand(3, -1, -1), x, x),
        ]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = random_tokens(module.linear_q, 1, LONG)
        return [(random_tokens(module.linear_q, 1, LONG), x, x)]

    def forward(self: Any, x_1: Tensor, x_2: Tensor, x_3: Tensor, /) -> Any:
        if not served(self, (*_Q_K_V, *AFTER), (x_1, x_2, x_3)):
            return super().forward(x_1, x_2, x_3)
        return project(self, cross_attention(self, x_1, x_2, x_3))


@register_twin
class _KeyValueAttention(Published):
    """Cross-attention with one projection for keys and values: forward(x [B, L, C], context [B, M, C])."""

    kind = "cross-attention"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        if not has_layers(module, "q", "kv") or arguments(module) != 2 or reduces(module):
            return False
        return plain_attention(module, 2, _Q_KV)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.q, 2, 5), random_tokens(module.q, 2, 7))]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.q, 1, LONG), random_tokens(module.q, 1, LONG))]

    def forward(self: Any, x: Tensor, context: Any, /) -> Any:
        if not served(self, (*_Q_KV, *AFTER), (x, context)):
            return super().forward(x, context)
        return _attend(self, x, context, None)


@register_twin
class _TokenAttention(Published):
    """TCFormer's dynamic tokens: forward(q_dict, kv_dict), whose token_score is added to the logits of its keys.

    With sr_ratio > 1 the keys and their scores first become a map, by the `token2map` of the module's own file, and the
    map is reduced.
    """

    kind = "attention over tokens with scores"
    _hotkernels_file: ClassVar[Any]  # the names of the file that has token2map

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if original := vars(cls).get("_hotkernels_original"):
            cls._hotkernels_file = _file_with_token2map(original)

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        if not has_layers(module, "q", "kv") or arguments(module) != 2:
            return False
        if obstacle := attention_obstacle(module, 2, _Q_KV):
            return obstacle
        if reduces(module) and _file_with_token2map(type(module)) is None:
            return f"it reduces its keys (sr_ratio = {module.sr_ratio}) without a token2map of its file"
        return True

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        ratio = getattr(module, "sr_ratio", 1)
        query, keys = _token_dict(module, 5, ratio, 3 * ratio), _token_dict(module, 7, ratio, ratio)
        return [(query, keys), (query, {**keys, "token_score": torch.randn_like(keys["x"][..., :1])})]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        H, W = (side * getattr(module, "sr_ratio", 1) for side in _LONG_SIDES)
        return [(_token_dict(module, LONG, H, W, B=1), _token_dict(module, LONG, H, W, B=1))]

    def forward(self: Any, q_dict: dict[str, Any], kv_dict: dict[str, Any], /) -> Any:
        if not served(self, (*_Q_KV, *AFTER), (q_dict["x"], kv_dict["x"])):
            return super().forward(q_dict, kv_dict)
        keys, score = kv_dict["x"], kv_dict.get("token_score")
        if reduces(self):
            both = keys if score is None else torch.cat([keys, score], -1)
            pixels = self._hotkernels_file["token2map"]({**kv_dict, "x": both, "map_size": q_dict["map_size"]})
            keys, score = _reduced(self, pixels[:, : keys.shape[-1]]), pixels[:, keys.shape[-1] :]
            score = _pooled(self, score) if score.shape[1] else None
        return _attend(self, q_dict["x"], keys, score)


@register_twin
class _GridAttention(Published):
    """PVT's and TCFormer's tokens on a grid: forward(x [B, H * W, C], H, W), with sr_ratio > 1 to a reduced grid."""

    kind = "attention over a grid"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return has_layers(module, "q", "kv") and arguments(module) == 3 and plain_attention(module, 3, _Q_KV)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        ratio = getattr(module, "sr_ratio", 1)
        H, W = 2 * ratio, 3 * ratio
        return [(random_tokens(module.q, 2, H * W), H, W)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        H, W = (side * getattr(module, "sr_ratio", 1) for side in _LONG_SIDES)
        return [(random_tokens(module.q, 1, H * W), H, W)]

    def forward(self: Any, x: Tensor, H: int, W: int, /) -> Any:
        if not served(self, (*_Q_KV, *AFTER), (x,)):
            return super().forward(x, H, W)
        keys = _reduced(self, x.transpose(1, 2).unflatten(2, (H, W))) if reduces(self) else x
        return _attend(self, x, keys, None)


def _token_dict(module: Any, N: int, H: int, W: int, B: int = 2) -> dict[str, Any]:
    """N random tokens for a map of H x W, on an initial grid of 2H x 3H."""
    return {
        "x": random_tokens(module.q, B, N),
        "token_num": N,
        "map_size": [H, W],
        "init_grid_size": [2 * H, 3 * H],
        "idx_token": torch.randint(N, (B, 6 * H * H), device=module.q.weight.device),
        "agg_weight": random_tokens(module.q, B, 6 * H * H)[..., :1].abs(),
    }


def _file_with_token2map(cls: Any) -> Any:
    """The names of the file whose token2map a class's forward can call: its own file or one that it imports."""
    if not isinstance(cls.forward, FunctionType):
        return None
    own = cls.forward.__globals__
    imported = [own[name] for name in cls.forward.__code__.co_names if isinstance(own.get(name), ModuleType)]
    return next((names for names in (own, *map(vars, imported)) if "token2map" in names), None)


def _reduced(module: Any, pixels: Tensor) -> Tensor:
    """The keys [B, M, C] from a map [B, C, H, W]: by a strided convolution, or averaged where there is none."""
    if "sr" not in module._modules:
        return _pooled(module, pixels)
    return module.norm(module.sr(pixels).flatten(2).transpose(1, 2))


def _pooled(module: Any, pixels: Tensor) -> Tensor:
    return F.avg_pool2d(pixels, module.sr_ratio).flatten(2).transpose(1, 2)


def _attend(module: Any, x: Tensor, keys: Tensor, score: Tensor | None) -> Tensor:
    """Attention of x [B, N, C] to keys [B, M, C], with the projections q and kv and a score [B, M, 1] per key."""
    query = linear(module.q, x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    key, value = linear(module.kv, keys).unflatten(-1, (2, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    key_bias = None if score is None else score.squeeze(-1)
    out: Any = gathered_attention(query, key, value, key_bias=key_bias, scale=module.scale)
    return project(module, out.transpose(1, 2).flatten(2))
