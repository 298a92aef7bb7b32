"""The published modules that swap knows, by their structure, each with its fused forward."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..nn.attention import Attention, CrossAttention, cross_attention, self_attention
from ..nn.linear import calls_onednn, is_fast_on, is_strided, linear, multiply
from ..nn.plain import DROPS, has_hooks, is_idle, is_plain
from ..ops.gathered_attention import gathered_attention
from ..ops.gathered_attention.api import MAX_HEAD_DIM, packed_attention, unpack
from .classes import codes, methods
from .twins import Twin, register_twin
from .watch import as_seen, in_probe

_ALONG = {"spatial": -2, "temporal": -3}  # mode -> the dim of [B, T, J, C] that attends
# Tokens of a long example: more than windows have (49, 196, 256), or attention that scales with log N was trained on.
_LONG, _LONG_SIDES = 300, (12, 25)
# Linear layers -> how many times C they make of C channels.
_QKV, _Q_K_V, _Q_KV = {"qkv": 3}, {"linear_q": 1, "linear_k": 1, "linear_v": 1}, {"q": 1, "kv": 2}
_QV_BIASES = ("q_bias", "v_bias")
_AFTER = ("proj", "proj_drop")  # what `_project` calls
_MLP = ("fc1", "act", "fc2")
_OF_SHAPE = frozenset({"dim", "ndim", "shape", "size"})
_NOT_GIVEN = object()


def _obstacle(module: Any, takes: int, linears: dict[str, int], weights: Iterable[str] = ()) -> str | None:
    """What in its structure keeps a module from being plain attention; None if nothing does.

    Args:
        module: with the children that `linears` names.
        takes: arguments of its forward; any further must be off, None or False, by default.
        linears: which layers project, and how many times C they make of C channels.
        weights: the parameters of its own that the twin knows.
    """
    if isinstance(module, (Attention, CrossAttention)):
        return "it is fused as it is"
    if obstacle := _forward_obstacle(module, takes, weights):
        return obstacle
    if not isinstance(getattr(module, "sr_ratio", 1), int):
        return f"sr_ratio is {module.sr_ratio}"
    known = (*linears, *_AFTER, "attn_drop")
    reducing = _reducing(module, linears)
    for name, child in module.named_children():
        if name not in known and not isinstance(child, reducing.get(name, nn.Identity)):
            return f"it has {name}, a {type(child).__name__}"
        if name not in (*linears, *_AFTER, *reducing) and has_hooks(child):
            return f"{name} has hooks, which would not run"
    for name in known:
        child, kinds = getattr(module, name, None), DROPS if "drop" in name else (nn.Linear,)
        if not isinstance(child, kinds) or (name == "attn_drop" and type(child) not in kinds):
            return f"{name} is {torch.typename(child)}"
    heads, scale = getattr(module, "num_heads", None), getattr(module, "scale", None)
    if not isinstance(heads, int) or not isinstance(scale, (int, float)):
        return f"num_heads and scale are {heads} and {scale}"
    C = module.proj.in_features
    for name, times in linears.items():
        linear = getattr(module, name)
        if (linear.in_features, linear.out_features) != (C, times * C):
            return f"{name} makes {linear.out_features} channels of {linear.in_features} where proj takes {C}"
    if C % heads != 0 or C // heads > MAX_HEAD_DIM:
        return f"{heads} heads of {C} channels: a head has at most {MAX_HEAD_DIM}"
    return None


def _forward_obstacle(module: Any, takes: int, weights: Iterable[str] = ()) -> str | None:
    """What in its forward, or in weights of its own but these, keeps a module from being replaced."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if type(module).forward is nn.Module.forward:
        return "it has no forward"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if hasattr(type(module).forward, "__wrapped__"):
        return "its forward is decorated"
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    more = [p.name for p in parameters[takes:] if p.default is not None and p.default is not False]
    if more or len(parameters) < takes:
        return f"its forward takes {', '.join(p.name for p in parameters)}"
    held = (*module._parameters.items(), *module._buffers.items())
    own = [name for name, t in held if t is not None and name not in weights]
    return f"it has {own[0]}" if own else None


def _has(module: nn.Module, *children: str) -> bool:
    return all(name in module._modules for name in (*children, "proj"))


def _arguments(module: nn.Module) -> int:
    """How many arguments its forward takes, -1 if any number.

    A scripted module does not say. It gets 2, so that some form refuses it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return 2
    parameters = inspect.signature(type(module).forward).parameters.values()
    return -1 if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters) else len(parameters) - 1


def _project(module: Any, attended: Tensor) -> Tensor:
    return module.proj_drop(linear(module.proj, attended))


def _served(module: Any, uses: Iterable[str], tokens: tuple[Tensor, ...], *more: Any) -> bool:
    """Whether a call is fused: without further arguments, with tokens, and the module does what the probe saw.

    `uses` names the layers, and parameters of the module's own, that the twin uses.

    So nothing was set since the swap that its own forward may heed. That forward also runs what a twin would not call:
    dropout on the probabilities, which draws random numbers in their layout, and whatever was put in the place of a
    Dropout or an Identity, or hooked to it.
    """
    if not as_seen(module, uses):
        return False
    called = (*uses, *_reducing(module, uses))
    for name, child in module._modules.items():
        if name not in called and child is not None and not is_idle(child):
            return False
    return not more and all(x.numel() for x in tokens)


def _reducing(module: Any, layers: Iterable[str]) -> dict[str, type[nn.Module]]:
    """What reduces the keys of a module that projects them apart from the queries."""
    return {"sr": nn.Conv2d, "norm": nn.LayerNorm} if "kv" in layers and _reduces(module) else {}


def _tokens(linear: Any, *shape: int) -> Tensor:
    """Random input [*shape, C] of a linear layer."""
    weight = linear.weight
    return torch.randn(*shape, linear.in_features, dtype=weight.dtype, device=weight.device)


def _described(kind: str, name: str, drop: nn.Module | None) -> str:
    p = getattr(drop, "p", 0)
    return f"{kind}, in evaluation; training has {name} = {p}" if p else kind


class _Published(Twin):
    _hotkernels_first: ClassVar[str]  # the layer that takes tokens [B, N, C], for twins without examples of their own

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        original = vars(cls).get("_hotkernels_original")
        if original is None:
            return
        # A caller may pass arguments by the original's names for them, and further ones that are off.
        twin = cls.forward
        theirs, ours = ([*inspect.signature(f).parameters.values()][1:] for f in (original.forward, twin))
        count = sum(p.kind is p.POSITIONAL_ONLY for p in ours)
        names = [p.name for p in theirs[:count] if p.kind is p.POSITIONAL_OR_KEYWORD]
        off = {p.name: p.default for p in theirs[count:]}
        defaults = tuple(off.values())

        def forward(self: Any, *args: Any, **named: Any) -> Any:
            for name in names[len(args) :]:
                if name not in named:
                    break
                args = (*args, named.pop(name))
            more = args[count:]
            if len(more) <= len(defaults) and all(map(operator.is_, more, defaults)):
                args = args[:count]
            if named and all(name in off and value is off[name] for name, value in named.items()):
                named = {}
            return twin(self, *args, **named)

        cls.forward = forward

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(_tokens(getattr(module, cls._hotkernels_first), 2, 5),)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(_tokens(getattr(module, cls._hotkernels_first), 1, _LONG),)]

    @classmethod
    def describe(cls, module: Any) -> str:
        return _described(cls.kind, "attn_drop", module.attn_drop)


@register_twin
class _PolicyAttention(_Published):
    """DynamicViT's: forward(x [B, N, C], policy); without a policy, as in evaluation, it is plain attention."""

    kind = "attention"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return _has(module, "qkv") and _arguments(module) == 2 and (_obstacle(module, 2, _QKV) or True)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(_tokens(module.qkv, 2, 5), None)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(_tokens(module.qkv, 1, _LONG), None)]

    @classmethod
    def describe(cls, module: Any) -> str:
        _, _, policy = inspect.signature(type(module).forward).parameters
        return _described(f"{cls.kind}, where {policy} is None", "attn_drop", module.attn_drop)

    def forward(self: Any, x: Tensor, policy: Any = _NOT_GIVEN, /) -> Any:
        if policy is _NOT_GIVEN:
            return super().forward(x)
        if policy is not None or not _served(self, (*_QKV, *_AFTER), (x,)):
            return super().forward(x, policy)
        return _project(self, self_attention(self, x))


@register_twin
class _ProportionalAttention(_Published):
    """ToMe's: forward(x [B, N, C], size [B, N, 1] = None) -> (out, keys' mean over heads); log(size) adds to logits."""

    kind = "attention to merged tokens"
    _hotkernels_first = "qkv"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return _has(module, "qkv") and _arguments(module) == 2 and (_obstacle(module, 1, _QKV) or True)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = _tokens(module.qkv, 2, 5)
        return [(x,), (x, 0.5 + torch.rand_like(x[..., :1]))]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = _tokens(module.qkv, 1, _LONG)
        return [(x, 0.5 + torch.rand_like(x[..., :1]))]

    def forward(self: Any, x: Tensor, size: Any = None, /) -> Any:
        if x.dim() != 3 or not _served(self, (*_QKV, *_AFTER), (x,)):
            return super().forward(x, size)
        qkv = linear(self.qkv, x)
        query, key, value = unpack(qkv.unflatten(-1, (3, self.num_heads, -1)))
        if size is None:
            attended = _attend_packed(qkv, self.num_heads, self.scale)
        else:
            out: Any = gathered_attention(query, key, value, key_bias=size.log()[..., 0], scale=self.scale)
            attended = out.transpose(1, 2).flatten(2)
        return _project(self, attended), key.mean(1)


@register_twin
class _Attention(_Published):
    """timm's ViT, MixSTE, MHFormer: forward(x [B, N, C])."""

    kind = "attention"
    _hotkernels_first = "qkv"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return _has(module, "qkv") and (_obstacle(module, 1, _QKV) or True)

    def forward(self: Any, x: Tensor, /, *more: Any, **named: Any) -> Any:
        if not _served(self, (*_QKV, *_AFTER), (x,), *more, *named.values()):
            return super().forward(x, *more, **named)
        return _project(self, self_attention(self, x))


@register_twin
class _QvBiasAttention(_Published):
    """VideoMAE's: forward(x [B, N, C]), whose product with qkv's weight takes q_bias and v_bias; keys have no bias."""

    kind = "attention"
    _hotkernels_first = "qkv"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        biased = _has(module, "qkv") and all(isinstance(getattr(module, b, None), nn.Parameter) for b in _QV_BIASES)
        return biased and (_obstacle(module, 1, _QKV, _QV_BIASES) or True)

    def forward(self: Any, x: Tensor, /, *more: Any, **named: Any) -> Any:
        plain = x.dim() == 3 and self.q_bias is not None and self.v_bias is not None
        if not plain or not _served(self, (*_QKV, *_QV_BIASES, *_AFTER), (x,), *more, *named.values()):
            return super().forward(x, *more, **named)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        return _project(self, _attend_packed(multiply(x, self.qkv.weight, bias), self.num_heads, self.scale))


@register_twin
class _ToQkvAttention(_Published):
    """TokenPose's, PPT's, vit-pytorch's: forward(x [B, N, C]), with to_qkv and to_out, and perhaps a norm first."""

    kind = "attention"
    _hotkernels_first = "to_qkv"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        qkv, out = (_child(module, name) for name in ("to_qkv", "to_out"))
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
        return _forward_obstacle(module, 1) or True

    @classmethod
    def describe(cls, module: Any) -> str:
        return _described(cls.kind, "dropout", getattr(module, "dropout", None))

    def forward(self: Any, x: Tensor, /, *more: Any, **named: Any) -> Any:
        layers = self._modules
        attend = layers.get("attend")
        plain = x.dim() == 3 and (attend is None or (is_plain(attend, nn.Softmax) and attend.dim in (-1, 3)))
        if not plain or not _served(self, ("to_qkv", "to_out", "norm", "attend"), (x,), *more, *named.values()):
            return super().forward(x, *more, **named)
        qkv = linear(self.to_qkv, layers["norm"](x) if layers.get("norm") is not None else x)
        return self.to_out(_attend_packed(qkv, self.heads, self.scale))


@register_twin
class _FramesAttention(_Published):
    """MotionAGFormer: forward(x [B, T, J, C]), over frames or joints as `mode` says."""

    kind = "attention over frames or joints"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return _has(module, "qkv") and getattr(module, "mode", None) in _ALONG and (_obstacle(module, 1, _QKV) or True)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(_tokens(module.qkv, 2, 5, 3),)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(_tokens(module.qkv, 1, *((2, _LONG) if module.mode == "spatial" else (_LONG, 2))),)]

    def forward(self: Any, x: Tensor, /, *more: Any, **named: Any) -> Any:
        if self.mode not in _ALONG or not _served(self, (*_QKV, *_AFTER), (x,), *more, *named.values()):
            return super().forward(x, *more, **named)
        return _project(self, self_attention(self, x, _ALONG[self.mode]))


@register_twin
class _SequenceAttention(_Published):
    """MotionBERT: forward(x [B * T, J, C], seqlen = T), over frames or joints as `mode` says."""

    kind = "attention over frames or joints"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        if not (_has(module, "qkv") and hasattr(module, "mode")):
            return False
        if "seqlen" not in inspect.signature(type(module).forward).parameters:
            return False
        if module.mode not in _ALONG:
            return f"its mode is {module.mode}, not spatial or temporal"
        return _obstacle(module, 2, _QKV) or True

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(_tokens(module.qkv, 6, 5), 3), (_tokens(module.qkv, 2, 5),)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = _tokens(module.qkv, 2, _LONG)
        return [(x, 2) if module.mode == "spatial" else (x.transpose(0, 1).contiguous(), _LONG)]

    def forward(self: Any, x: Tensor, seqlen: int = 1, /, *more: Any, **named: Any) -> Any:
        if self.mode not in _ALONG or not _served(self, (*_QKV, *_AFTER), (x,), *more, *named.values()):
            return super().forward(x, seqlen, *more, **named)
        if self.mode == "spatial":
            return _project(self, self_attention(self, x))
        return _project(self, self_attention(self, x.unflatten(0, (-1, seqlen)), along=-3).flatten(0, 1))


@register_twin
class _CrossAttention(_Published):
    """HoT and MHFormer: forward(x_1 [B, L, C], x_2 [B, M, C], x_3 [B, M, C])."""

    kind = "cross-attention"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        if not _has(module, "linear_q", "linear_k", "linear_v"):
            return False
        return _obstacle(module, 3, _Q_K_V) or True

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = _tokens(module.linear_q, 3, 5)
        return [(x, _tokens(module.linear_q, 3, 5), _tokens(module.linear_q, 3, 5)), (x[:1].expand(3, -1, -1), x, x)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        x = _tokens(module.linear_q, 1, _LONG)
        return [(_tokens(module.linear_q, 1, _LONG), x, x)]

    def forward(self: Any, x_1: Tensor, x_2: Tensor, x_3: Tensor, /, *more: Any, **named: Any) -> Any:
        if not _served(self, (*_Q_K_V, *_AFTER), (x_1, x_2, x_3), *more, *named.values()):
            return super().forward(x_1, x_2, x_3, *more, **named)
        return _project(self, cross_attention(self, x_1, x_2, x_3))


@register_twin
class _KeyValueAttention(_Published):
    """Cross-attention with one projection for keys and values: forward(x [B, L, C], context [B, M, C])."""

    kind = "cross-attention"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        if not _has(module, "q", "kv") or _arguments(module) != 2 or _reduces(module):
            return False
        return _obstacle(module, 2, _Q_KV) or True

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(_tokens(module.q, 2, 5), _tokens(module.q, 2, 7))]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        return [(_tokens(module.q, 1, _LONG), _tokens(module.q, 1, _LONG))]

    def forward(self: Any, x: Tensor, context: Any = _NOT_GIVEN, /) -> Any:
        if context is _NOT_GIVEN:
            return super().forward(x)
        known = isinstance(context, Tensor) and x.dim() == context.dim() == 3
        if not known or not _served(self, (*_Q_KV, *_AFTER), (x, context)):
            return super().forward(x, context)
        return _attend(self, x, context, None)


@register_twin
class _TokenAttention(_Published):
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
        if not _has(module, "q", "kv") or _arguments(module) != 2:
            return False
        if obstacle := _obstacle(module, 2, _Q_KV):
            return obstacle
        if _reduces(module) and _file_with_token2map(type(module)) is None:
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
        return [(_token_dict(module, _LONG, H, W, B=1), _token_dict(module, _LONG, H, W, B=1))]

    def forward(self: Any, q_dict: dict[str, Any], kv_dict: dict[str, Any], /) -> Any:
        if not _served(self, (*_Q_KV, *_AFTER), (q_dict["x"], kv_dict["x"])):
            return super().forward(q_dict, kv_dict)
        keys, score = kv_dict["x"], kv_dict.get("token_score")
        if _reduces(self):
            both = keys if score is None else torch.cat([keys, score], -1)
            pixels = self._hotkernels_file["token2map"]({**kv_dict, "x": both, "map_size": q_dict["map_size"]})
            keys, score = _reduced(self, pixels[:, : keys.shape[-1]]), pixels[:, keys.shape[-1] :]
            score = _pooled(self, score) if score.shape[1] else None
        return _attend(self, q_dict["x"], keys, score)


@register_twin
class _GridAttention(_Published):
    """PVT's and TCFormer's tokens on a grid: forward(x [B, H * W, C], H, W), with sr_ratio > 1 to a reduced grid."""

    kind = "attention over a grid"

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        return _has(module, "q", "kv") and _arguments(module) == 3 and (_obstacle(module, 3, _Q_KV) or True)

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:
        ratio = getattr(module, "sr_ratio", 1)
        H, W = 2 * ratio, 3 * ratio
        return [(_tokens(module.q, 2, H * W), H, W)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:
        H, W = (side * getattr(module, "sr_ratio", 1) for side in _LONG_SIDES)
        return [(_tokens(module.q, 1, H * W), H, W)]

    def forward(self: Any, x: Tensor, H: int, W: int, /) -> Any:
        if not _served(self, (*_Q_KV, *_AFTER), (x,)):
            return super().forward(x, H, W)
        keys = _reduced(self, x.transpose(1, 2).unflatten(2, (H, W))) if _reduces(self) else x
        return _attend(self, x, keys, None)


@register_twin
class _Mlp(_Published):
    """MixSTE's, timm's: fc2(act(fc1(x))), where oneDNN is faster or fuses GELU into the product: float32, on a CPU."""

    kind = "MLP"
    _hotkernels_first = "fc1"
    _hotkernels_any_dims: ClassVar[bool]  # whether no method asks what shape the input has

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        fc1, act, fc2 = (_child(module, name) for name in _MLP)
        others = [child for name, child in module.named_children() if name not in _MLP]
        return (
            type(fc1) is type(fc2) is nn.Linear
            and fc1.out_features == fc2.in_features  # false where half of them are gates
            and isinstance(act, nn.Module)
            and all(type(child) in DROPS for child in others)
            and is_fast_on(getattr(fc1, "weight", None))
            and is_fast_on(getattr(fc2, "weight", None))
            and not _forward_obstacle(module, 1)
        )

    @classmethod
    def describe(cls, module: Any) -> str:
        drops = [child for child in module.children() if isinstance(child, nn.Dropout)]
        return _described(cls.kind, "drop", max(drops, key=lambda drop: drop.p, default=None))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if original := vars(cls).get("_hotkernels_original"):
            found = [code for _, method in methods(original) for code in codes(method.__code__)]
            cls._hotkernels_any_dims = not any(_OF_SHAPE & {*code.co_names} for code in found)

    def forward(self: Any, x: Tensor, /, *more: Any, **named: Any) -> Any:
        gelu = _is_gelu(self.act)
        probed = x.dim() == 3 or self._hotkernels_any_dims
        gains = in_probe(self) or (probed and calls_onednn(self.fc1, x, gelu))
        if not (gains and _served(self, _MLP, (x,), *more, *named.values())):
            return super().forward(x, *more, **named)
        hidden = linear(self.fc1, x, gelu)
        return linear(self.fc2, hidden if gelu else self.act(hidden))


@register_twin
class _Sequence(_Published):
    """MLPs that are an nn.Sequential, as TokenPose's, vit-pytorch's and torchvision's."""

    kind = "MLP"
    _hotkernels_probed = False

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        layers = [layer for layer in module.children() if type(layer) is nn.Linear]
        return (
            isinstance(module, nn.Sequential)
            and type(module).forward is nn.Sequential.forward
            and len(layers) > 1
            and is_fast_on(getattr(layers[0], "weight", None))
            and not _forward_obstacle(module, 1)
        )

    @classmethod
    def describe(cls, module: Any) -> str:
        return cls.kind

    def forward(self: Any, input: Any, /) -> Any:
        layers, i = [*self], 0
        while i < len(layers):
            gelu = i + 1 < len(layers) and _is_gelu(layers[i + 1])
            if calls_onednn(layers[i], input, gelu):
                input = linear(layers[i], input, gelu)
                i += gelu
            else:
                input = layers[i](input)
            i += 1
        return input


def _child(module: nn.Module, name: str) -> Any:
    return module._modules[name] if name in module._modules else None  # noqa: SIM401  (a ScriptModule's has no get)


def _is_gelu(act: Any) -> bool:
    return is_plain(act, nn.GELU) and act.approximate == "none"


def _token_dict(module: Any, N: int, H: int, W: int, B: int = 2) -> dict[str, Any]:
    """N random tokens for a map of H x W, on an initial grid of 2H x 3H."""
    return {
        "x": _tokens(module.q, B, N),
        "token_num": N,
        "map_size": [H, W],
        "init_grid_size": [2 * H, 3 * H],
        "idx_token": torch.randint(N, (B, 6 * H * H), device=module.q.weight.device),
        "agg_weight": _tokens(module.q, B, 6 * H * H)[..., :1].abs(),
    }


def _reduces(module: Any) -> bool:
    return getattr(module, "sr_ratio", 1) != 1


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


def _attend_packed(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """Self-attention of a projection [B, N, 3 * C], before `proj`."""
    return packed_attention(qkv.unflatten(-1, (3, heads, -1)), scale).transpose(1, 2).flatten(2)


def _attend(module: Any, x: Tensor, keys: Tensor, score: Tensor | None) -> Tensor:
    """Attention of x [B, N, C] to keys [B, M, C], with the projections q and kv and a score [B, M, 1] per key."""
    query = linear(module.q, x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    key, value = linear(module.kv, keys).unflatten(-1, (2, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    key_bias = None if score is None else score.squeeze(-1)
    out: Any = gathered_attention(query, key, value, key_bias=key_bias, scale=module.scale)
    return _project(module, out.transpose(1, 2).flatten(2))
