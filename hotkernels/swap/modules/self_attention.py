"""Attention of tokens to themselves: one layer makes queries, keys and values."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...nn.attention import self_attention
from ...nn.linear import is_strided, linear, multiply
from ...nn.plain import DROPS, has_hooks, is_plain
from ...ops.gathered_attention import gathered_attention
from ...ops.gathered_attention.api import MAX_HEAD_DIM, packed_attention, unpack
from ..twins import register_twin
from .published import (
    AFTER,
    LONG,
    QKV,
    Published,
    arguments,
    child_of,
    described,
    forward_obstacle,
    has_layers,
    plain_attention,
    project,
    random_tokens,
    served,
)

_ALONG = {"spatial": -2, "temporal": -3}  # mode -> the dim of [B, T, J, C] that attends
_QV_BIASES = ("q_bias", "v_bias")


@register_twin
class _PolicyAttention(Published):
    """DynamicViT's: forward(x [B, N, C], policy); without a policy, as in evaluation, it is plain attention."""

    kind = "attention"
    _hotkernels_also: ClassVar[tuple[Any, ...]] = ()  # what it returns beside the result

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return has_layers(module, "qkv") and arguments(module) > 1 and plain_attention(module, 2, QKV)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.qkv, 2, 5), None)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.qkv, 1, LONG), None)]

    @classmethod
    def describe(cls, module: Any) -> str:
        _, _, policy, *_ = inspect.signature(type(module).forward).parameters
        return described(cls, module, "attn_drop", module.attn_drop, f"{policy} is None")

    def forward(self: Any, x: Tensor, policy: Any, /) -> Any:
        if policy is not None or not served(self, (*QKV, *AFTER), (x,)):
            return super().forward(x, policy)
        out = project(self, self_attention(self, x))
        return (out, *self._hotkernels_also) if self._hotkernels_also else out


@register_twin
class _PairedPolicyAttention(_PolicyAttention):
    """TPS's: the same, which returns (out, None) unless it is asked for the probabilities."""

    _hotkernels_also = (None,)


@register_twin
class _ProportionalAttention(Published):
    """ToMe's: forward(x [B, N, C], size [B, N, 1] = None) -> (out, keys' mean over heads); log(size) adds to logits."""

    kind = "attention to merged tokens"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return has_layers(module, "qkv") and arguments(module) > 1 and plain_attention(module, 1, QKV)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = random_tokens(module.qkv, 2, 5)
        return [(x,), (x, 0.5 + torch.rand_like(x[..., :1]))]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = random_tokens(module.qkv, 1, LONG)
        return [(x, 0.5 + torch.rand_like(x[..., :1]))]

    def forward(self: Any, x: Tensor, size: Any = None, /) -> Any:
        if not served(self, (*QKV, *AFTER), (x,)):
            return super().forward(x, size)
        qkv = linear(self.qkv, x)
        _, key, _ = unpack(qkv.unflatten(-1, (3, self.num_heads, -1)))
        attended = attend_packed(qkv, self.num_heads, self.scale, None if size is None else size.log()[..., 0])
        return project(self, attended), key.mean(1)


@register_twin
class _Attention(Published):
    """timm's ViT, MixSTE, MHFormer: forward(x [B, N, C])."""

    kind = "attention"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return has_layers(module, "qkv") and plain_attention(module, 1, QKV)

    def forward(self: Any, x: Tensor, /) -> Any:
        if not served(self, (*QKV, *AFTER), (x,)):
            return super().forward(x)
        return project(self, self_attention(self, x))


@register_twin
class _HaltingAttention(Published):
    """A-ViT's: forward(x [B, N, C], mask [B, N] = None); logits of keys get mask times masked_softmax_bias."""

    kind = "attention to tokens that go on"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        halting = isinstance(getattr(module, "masked_softmax_bias", None), (int, float))
        return halting and has_layers(module, "qkv") and plain_attention(module, 2, QKV)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = random_tokens(module.qkv, 2, 5)
        return [(x,), (x, torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0]]).to(x).expand(2, -1))]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = random_tokens(module.qkv, 1, LONG)
        return [(x, (x[..., 0] > 1).to(x.dtype))]

    def forward(self: Any, x: Tensor, mask: Any = None, /) -> Any:
        known = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if not known or not served(self, (*QKV, *AFTER), (x,)):
            return super().forward(x, mask)
        bias = None if mask is None else mask * self.masked_softmax_bias
        return project(self, attend_packed(linear(self.qkv, x), self.num_heads, self.scale, bias))


@register_twin
class _QvBiasAttention(Published):
    """VideoMAE's: forward(x [B, N, C]), whose product with qkv's weight takes q_bias and v_bias; keys have no bias."""

    kind = "attention"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        biased = has_layers(module, "qkv") and all(
            isinstance(getattr(module, b, None), nn.Parameter) for b in _QV_BIASES
        )
        return biased and plain_attention(module, 1, QKV, _QV_BIASES)

    def forward(self: Any, x: Tensor, /) -> Any:
        plain = self.q_bias is not None and self.v_bias is not None
        if not plain or not served(self, (*QKV, *_QV_BIASES, *AFTER), (x,)):
            return super().forward(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        return project(self, attend_packed(multiply(x, self.qkv.weight, bias), self.num_heads, self.scale))


@register_twin
class _ToQkvAttention(Published):
    """TokenPose's, PPT's, vit-pytorch's: forward(x [B, N, C]), with to_qkv and to_out, and perhaps a norm first."""

    kind = "attention"
    _hotkernels_first = "to_qkv"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        qkv, out = (child_of(module, name) for name in ("to_qkv", "to_out"))
        if type(qkv) is not nn.Linear or out is None:
            return False
        heads, scale = (inspect.getattr_static(module, name, None) for name in ("heads", "scale"))
        if not isinstance(heads, int) or not isinstance(scale, (int, float)):
            return f"heads and scale are {heads} and {scale}"
        kinds = {"norm": (nn.LayerNorm,), "attend": (nn.Softmax,), "dropout": DROPS}
        for name, child in module.named_children():
            if child is not qkv and child is not out and type(child) not in kinds.get(name, ()):
                return f"it has {name}, a {type(child).__name__}"
            if name in ("attend", "dropout") and has_hooks(child):
                return f"{name} has hooks, which would not run"
        if qkv.out_features % (3 * heads) != 0 or qkv.out_features // (3 * heads) > MAX_HEAD_DIM:
            return f"to_qkv makes {qkv.out_features} channels for {heads} heads: a head has at most {MAX_HEAD_DIM}"
        if not is_strided(getattr(qkv, "weight", None)):
            return "to_qkv has no weights of an ordinary layout"
        return forward_obstacle(module, 1) or True

    @classmethod
    def describe(cls, module: Any) -> str:
        return described(cls, module, "dropout", getattr(module, "dropout", None))

    def forward(self: Any, x: Tensor, /) -> Any:
        layers = self._modules
        attend = layers.get("attend")
        plain = attend is None or (is_plain(attend, nn.Softmax) and attend.dim in (-1, 3))
        if not plain or not served(self, ("to_qkv", "to_out", "norm", "attend"), (x,)):
            return super().forward(x)
        qkv = linear(self.to_qkv, layers["norm"](x) if layers.get("norm") is not None else x)
        attended = attend_packed(qkv, self.heads, self.scale)
        out = self.to_out(attended)
        return out.clone() if out is attended else out  # autograd lets nobody write into this view


@register_twin
class _FramesAttention(Published):
    """MotionAGFormer: forward(x [B, T, J, C]), over frames or joints as `mode` says."""

    kind = "attention over frames or joints"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return has_layers(module, "qkv") and getattr(module, "mode", None) in _ALONG and plain_attention(module, 1, QKV)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.qkv, 2, 5, 3),)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.qkv, 1, *((2, LONG) if module.mode == "spatial" else (LONG, 2))),)]

    def forward(self: Any, x: Tensor, /) -> Any:
        if self.mode not in _ALONG or not served(self, (*QKV, *AFTER), (x,), dims=4):
            return super().forward(x)
        return project(self, self_attention(self, x, _ALONG[self.mode]))


@register_twin
class _SequenceAttention(Published):
    """MotionBERT: forward(x [B * T, J, C], seqlen = T), over frames or joints as `mode` says."""

    kind = "attention over frames or joints"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        if not (has_layers(module, "qkv") and hasattr(module, "mode")):
            return False
        if "seqlen" not in inspect.signature(type(module).forward).parameters:
            return False
        if module.mode not in _ALONG:
            return f"its mode is {module.mode}, not spatial or temporal"
        return plain_attention(module, 2, QKV)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(random_tokens(module.qkv, 6, 5), 3), (random_tokens(module.qkv, 2, 5),)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = random_tokens(module.qkv, 2, LONG)
        return [(x, 2) if module.mode == "spatial" else (x.transpose(0, 1).contiguous(), LONG)]

    def forward(self: Any, x: Tensor, seqlen: int = 1, /) -> Any:
        if self.mode not in _ALONG or not served(self, (*QKV, *AFTER), (x,)):
            return super().forward(x, seqlen)
        if self.mode == "spatial":
            return project(self, self_attention(self, x))
        return project(self, self_attention(self, x.unflatten(0, (-1, seqlen)), along=-3).flatten(0, 1))


def attend_packed(qkv: Tensor, heads: int, scale: float, key_bias: Tensor | None = None) -> Tensor:
    """Self-attention of a projection [B, N, 3 * C], before `proj`; key_bias [B, N] is added to the logits of a key."""
    qkv = qkv.unflatten(-1, (3, heads, -1))
    if key_bias is None:
        return packed_attention(qkv, scale).transpose(1, 2).flatten(2)
    query, key, value = unpack(qkv)
    return gathered_attention(query, key, value, key_bias=key_bias, scale=scale).transpose(1, 2).flatten(2)
