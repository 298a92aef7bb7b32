"""Attention between regions of an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...nn.plain import has_hooks, is_plain
from ...nn.routing import bi_level_routing
from ...ops.gathered_attention.api import MAX_HEAD_DIM
from ..twins import register_twin
from .published import Published, child_of, described, forward_obstacle, random_tokens, served

_CALLED = ("lepe", "router", "qkv", "wo")
_PASSED_BY = {"kv_gather": nn.Module, "kv_down": nn.Identity, "attn_act": nn.Softmax}  # children that are not called


@register_twin
class _BiLevelRoutingAttention(Published):
    """BiFormer's: forward(x [B, height, width, C]), whose router says to which regions each attends."""

    kind = "attention between regions"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        named = all(child_of(module, name) is not None for name in ("router", "qkv", "wo", *_PASSED_BY))
        projection = child_of(module.qkv, "qkv") if named else None
        if not isinstance(projection, nn.Linear) or not hasattr(module.kv_gather, "mul_weight"):
            return False
        for name, kind in _PASSED_BY.items():
            child = child_of(module, name)
            if not isinstance(child, kind):
                return f"{name} is {torch.typename(child)}"
            if has_hooks(child):
                return f"{name} has hooks, which would not run"
        if module.kv_gather.mul_weight != "none":
            return f"its routes have {module.kv_gather.mul_weight} weights"
        C, made = projection.in_features, projection.out_features
        if made != 3 * C:
            return f"qkv makes {made} channels of {C}"
        if C // module.num_heads > MAX_HEAD_DIM:
            return f"{module.num_heads} heads of {C} channels: a head has at most {MAX_HEAD_DIM}"
        return forward_obstacle(module, 1) or True

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        n = module.n_win
        sides = [(2 * n, 2 * n), (3 * n, 4 * n)] + [(3 * n - 1, 2 * n)] * bool(module.auto_pad)
        return [(random_tokens(module.qkv.qkv, 2, *side),) for side in sides]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.qkv.qkv, 1, 5 * module.n_win, 6 * module.n_win),)]

    @classmethod
    def describe(cls, module: Any) -> str:
        return described(cls, module, "", None)

    def forward(self: Any, x: Tensor, /) -> Any:
        gather, act = self._modules.get("kv_gather"), self._modules.get("attn_act")
        plain = getattr(gather, "mul_weight", "") == "none" and not has_hooks(gather) and is_plain(act, nn.Softmax)
        uses = (*_CALLED, "kv_gather", "attn_act")
        if not plain or not served(self, uses, (x,), dims=4):
            return super().forward(x)
        if not self.auto_pad and (x.shape[1] % self.n_win or x.shape[2] % self.n_win):
            return super().forward(x)

        def project(regions: Tensor) -> tuple[Tensor, ...]:
            query, both = self.qkv(regions)
            return query, *both.chunk(2, -1)

        return bi_level_routing(self, x, project, lambda query, key: self.router(query, key)[1])
