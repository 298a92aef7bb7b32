"""What looks like a module that hotkernels.swap knows, and is left alone, with which reason."""

from __future__ import annotations

import functools
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import published
import published_tcformer
import pytest
import torch
from published import TimmMlp, ToQkvAttention, VisionAttention
from published_tcformer import GridAttention, KeyValueAttention, TCAttention
from torch import Tensor, nn

import hotkernels
from hotkernels.baselines import AttentionEager, BiLevelRoutingAttentionEager, CrossAttentionEager
from hotkernels.models import eager
from hotkernels.nn.linear import _HAS_ONEDNN
from hotkernels.swap import twins

# What looks like plain attention and is not. All of it would pass a look at a fresh module's output or at its layers.


class RelativeBias(AttentionEager):
    def __init__(self) -> None:
        super().__init__(32, 4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))


class RelativeBiasBesideBiases(published.QvBiasAttention):
    """BEiT's."""

    def __init__(self) -> None:
        super().__init__(32, 4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))


class Rotary(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        angle = torch.arange(N)[:, None] * torch.logspace(0, -1, q.shape[-1] // 2)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
        return self.proj(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Residual(AttentionEager):
    """Zero at the start, as a projection that is initialised to zero hides."""

    def __init__(self) -> None:
        super().__init__(32, 4)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.proj(x)


class DropKey(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (torch.rand(x.shape[:2]) > 0.1)[..., None]) if self.training else super().forward(x)


class TrainingScale(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.1 if self.training else 1.0)


class ReturnsWeights(AttentionEager):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class StoresMap(AttentionEager):
    """What a model prunes by later: on the module or in a list of its."""

    def __init__(self, where: str) -> None:
        super().__init__(32, 4)
        self.where, self.maps = where, []

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q @ k.mT * self.scale).softmax(-1)
        if self.where == "list":
            self.maps.append(attn.detach())
        elif self.where == "attribute" or self.training:
            self.attn_map = attn.detach()
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class Limited(AttentionEager):
    """Plain attention where there are few tokens; what else it does says `limit`."""

    def __init__(self, limit: str) -> None:
        super().__init__(32, 4)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * self.scale
        if self.limit == "window":
            far = (torch.arange(N) - torch.arange(N)[:, None]).abs() > 128
            logits = logits.masked_fill(far, -torch.inf)
        elif self.limit == "top-k":
            least = logits.topk(min(256, N)).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        elif self.limit == "chunks":
            chunk = torch.arange(N) // 49
            logits = logits.masked_fill(chunk != chunk[:, None], -torch.inf)
        elif self.limit == "log N":
            logits = logits * max(1.0, math.log(N, 197))
        elif N > 256:
            raise IndexError
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class ShortFrames(published.FramesAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.shape[1 if self.mode == "temporal" else 2] <= 243 else 0.5)


class ShortSequence(eager.MotionBERTAttention):
    def forward(self, x: Tensor, seqlen: int = 1) -> Tensor:
        return super().forward(x, seqlen) * (1.0 if (seqlen if self.mode == "temporal" else x.shape[1]) <= 243 else 0.5)


class OtherLength(eager.MotionBERTAttention):
    def forward(self, x: Tensor, seqlen: int = 2) -> Tensor:
        return super().forward(x, seqlen)


class ShortCross(CrossAttentionEager):
    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        return super().forward(x_1, x_2[:, :243], x_3[:, :243])


class ShortGrid(GridAttention):
    def attend(self, x: Tensor, keys: Tensor, score: Tensor | None = None) -> Tensor:
        return super().attend(x, keys[:, :243], score if score is None else score[:, :243])


class ShortTokens(TCAttention):
    def attend(self, x: Tensor, keys: Tensor, score: Tensor | None = None) -> Tensor:
        return super().attend(x, keys[:, :243], score if score is None else score[:, :243])


class ShortContext(KeyValueAttention):
    def attend(self, x: Tensor, keys: Tensor, score: Tensor | None = None) -> Tensor:
        return super().attend(x, keys[:, :243])


class Gated(KeyValueAttention):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return super().forward(x, context) * x.sigmoid()


class Cooler(AttentionEager):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.temperature = 0.9

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT * self.scale * self.temperature).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Alibi(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        slope = 0.25 * 0.5 ** torch.arange(2, 2 * self.num_heads + 2, 2, dtype=x.dtype)
        bias = -slope[:, None, None] * (torch.arange(N) - torch.arange(N)[:, None]).abs()
        return self.proj(((q @ k.mT * self.scale + bias).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class WiderInHalf(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.dtype == torch.float32 else 1.5)


class Times(AttentionEager):
    def __init__(self, factor: float | Tensor, name: str = "factor") -> None:
        super().__init__(32, 4)
        self.name = name
        setattr(self, name, factor)

    def forward(self, x: Tensor) -> Tensor:
        factor = getattr(self, self.name)
        return super().forward(x) * (factor[1000] if isinstance(factor, Tensor) else factor)


class NeedsMask(AttentionEager):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * mask


class AnyNumber(AttentionEager):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x) * (1 + len(more) - more.count(None))


class DetachedMetric(published.ToMeAttention):
    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, metric = super().forward(x, size)
        return x, metric.detach()


class Window(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (-1, 7))
        return super().forward(windows.flatten(0, 1)).unflatten(0, windows.shape[:2]).flatten(1, 2)


class Unfit(AttentionEager):
    """No class can be derived from it without an argument."""

    def __init_subclass__(cls, *, x: int) -> None:
        super().__init_subclass__()


class SomeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))


class AttentionOfContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 96), nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.0))


class NormOfOutput(ToQkvAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(super().forward(x, mask))


class ShortToQkv(ToQkvAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.arange(x.shape[1]).expand(len(x), -1) < 243)


def of_to_qkv(**attributes: Any) -> nn.Module:
    module = ToQkvAttention(dim_head=6)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked_softmax() -> nn.Module:
    module = ToQkvAttention(dim_head=6)
    module.attend.register_forward_hook(lambda *_: None)
    return module


def replaced_forward() -> nn.Module:
    module = AttentionEager(32, 4)
    module.forward = lambda x: x
    return module


def hooked_probabilities() -> nn.Module:
    module = AttentionEager(32, 4)
    module.attn_drop.register_forward_hook(lambda *_: None)
    return module


def hooked_norm() -> nn.Module:
    module = VisionAttention(32, 4)
    module.k_norm.register_full_backward_hook(lambda *_: None)
    return module


class OwnDropout(nn.Dropout):
    pass


def own_dropout() -> nn.Module:
    module = AttentionEager(32, 4)
    module.attn_drop = OwnDropout()
    return module


def with_qkv(layer: nn.Module) -> nn.Module:
    module = AttentionEager(32, 4)
    module.qkv = layer
    return module


def with_ratio(ratio: Any, layer: nn.Module | None = None) -> nn.Module:
    module = GridAttention(32, 4, sr_ratio=2)
    module.sr_ratio, module.sr = ratio, layer or module.sr
    return module


def with_reduced_qkv() -> nn.Module:
    module = AttentionEager(32, 4)
    module.sr_ratio, module.sr = 2, nn.Conv2d(32, 32, 2, 2)
    return module


class NoTokenMap(TCAttention):
    def __init__(self) -> None:
        super().__init__(32, 4, sr_ratio=2)

    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        return super().forward(q_dict, kv_dict)


class MapOfKeys(NoTokenMap):
    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        return published_tcformer.TCAttention.forward(self, {**q_dict, "map_size": kv_dict["map_size"]}, kv_dict)


class DetachedScore(NoTokenMap):
    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        score = kv_dict["token_score"].detach() if "token_score" in kv_dict else kv_dict["x"][..., :1] * 0
        return published_tcformer.TCAttention.forward(self, q_dict, {**kv_dict, "token_score": score})


class Decorated(AttentionEager):
    def __init__(self) -> None:
        super().__init__(32, 4)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class GatedMlp(eager.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(self.act(hidden) * hidden.sigmoid())


class ShortMlp(eager.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.shape[1] <= 243 else 0.5)


class DropsNever(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


class DropsBefore(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.proj(self.proj_drop(out.transpose(1, 2).flatten(2)))


class ChangesItsInput(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x[:, 0] = 0  # a second call finds nothing to change
        return super().forward(x)


class LayerDrop(AttentionEager):
    """By the random numbers of another library; one in a million, so that outputs are the same."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__(32, 4)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.draw() > 1e-6)


class Clamped(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * self.scale).clamp(-20, 20).softmax(-1)
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Controller:
    """Prompt-to-Prompt's AttentionStore, by its kind."""

    def __init__(self) -> None:
        self.maps: dict[str, list[Tensor]] = {"all": []}

    def __call__(self, weights: Tensor) -> Tensor:
        self.maps["all"].append(weights.detach())
        return weights


class Controlled(AttentionEager):
    def __init__(self) -> None:
        super().__init__(32, 4)
        self.controller = Controller()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.controller((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Counting(AttentionEager):
    """On a module inside."""

    def __init__(self, count: Any) -> None:
        super().__init__(32, 4)
        self.proj.count = count

    def forward(self, x: Tensor) -> Tensor:
        self.proj.count += 1
        return super().forward(x)


class ClassAttn(nn.Module):
    """CaiT's name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x[:, :1]) @ self.k(x).mT).softmax(-1) @ self.v(x)


class WeightedRoutes(BiLevelRoutingAttentionEager):
    """Whose values are weighted after the attention, once more."""

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Tensor:
        return super().forward(x) * self.router.scale


def of_regions(**parts: Any) -> nn.Module:
    module = BiLevelRoutingAttentionEager(32, 4, 3)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def hooked_gather() -> nn.Module:
    module: Any = BiLevelRoutingAttentionEager(32, 4, 3)
    module.kv_gather.register_forward_hook(lambda _, __, out: out * 2)
    return module


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "q and k norms": (lambda: VisionAttention(32, 4, qk_norm=True), "it has q_norm, a LayerNorm"),
    "relative bias": (RelativeBias, "it has relative_position_bias_table"),
    "relative bias beside q_bias": (RelativeBiasBesideBiases, "it has relative_position_bias_table"),
    "rotary": (lambda: Rotary(32, 4), "its output differs from attention"),
    "residual": (Residual, "its output differs from attention"),
    "drop key": (lambda: DropKey(32, 4), "its forward draws random numbers in training"),
    "training scale": (lambda: TrainingScale(32, 4), "its output differs from attention in training"),
    "returns weights": (lambda: ReturnsWeights(32, 4), "it returns a tuple"),
    "stores its map": (lambda: StoresMap("attribute"), "its forward stores attn_map"),
    "stores its map in training": (lambda: StoresMap("training"), "its forward stores attn_map in training"),
    "adds to a list": (lambda: StoresMap("list"), "its forward stores maps"),
    "window of 256": (lambda: Limited("window"), "its output differs from attention on long input"),
    "256 largest": (lambda: Limited("top-k"), "its output differs from attention on long input"),
    "chunks of 49": (lambda: Limited("chunks"), "its output differs from attention on long input"),
    "scaled by log N": (lambda: Limited("log N"), "its output differs from attention on long input"),
    "at most 256": (
        lambda: Limited("error"),
        "its forward or its gradient fails (IndexError on [1, 300, 32]) on long input",
    ),
    "cross-attention to 243": (
        lambda: ShortCross(32, 4),
        "its output differs from cross-attention on long input",
    ),
    "keys and values of 243": (
        lambda: ShortContext(32, 4),
        "its output differs from cross-attention on long input",
    ),
    "gated": (lambda: Gated(32, 4), "its output differs from cross-attention"),
    "243 tokens": (
        lambda: ShortTokens(32, 4, sr_ratio=2),
        "its output differs from attention over tokens with scores on long input",
    ),
    **{
        f"243 of {cls.func.__name__}, {mode}": (
            lambda cls=cls, mode=mode: cls(mode=mode),
            "its output differs from attention over frames or joints on long input",
        )
        for cls in (
            functools.partial(ShortFrames, 32, 32, 4),
            functools.partial(ShortSequence, 32, 4),
        )
        for mode in ("spatial", "temporal")
    },
    "reduced to 243": (
        lambda: ShortGrid(32, 4, sr_ratio=2),
        "its output differs from attention over a grid on long input",
    ),
    **{
        f"MLP, {cls.__name__}": (lambda cls=cls: cls(32, 64), f"its output differs from MLP{where}")
        for cls, where in ((GatedMlp, ""), (ShortMlp, " on long input"))
        if _HAS_ONEDNN
    },
    "to_qkv, norm of the output": (lambda: NormOfOutput(dim_head=6), "its output differs from attention"),
    "to_qkv of 243": (lambda: ShortToQkv(dim_head=6), "its output differs from attention on long input"),
    "to_qkv without heads": (lambda: of_to_qkv(heads=None), f"heads and scale are None and {6**-0.5}"),
    "to_qkv with wide heads": (
        lambda: ToQkvAttention(8, 1, 300),
        "to_qkv makes 900 channels for 1 heads: a head has at most 256",
    ),
    "to_qkv with a talking head": (lambda: of_to_qkv(mix=nn.Conv2d(4, 4, 1)), "it has mix, a Conv2d"),
    "to_qkv with another norm": (lambda: of_to_qkv(norm=nn.Identity()), "it has norm, a Identity"),
    "hooked softmax": (hooked_softmax, "attend has hooks, which would not run"),
    "soft routes": (
        lambda: BiLevelRoutingAttentionEager(32, 4, 3, soft_routing=True),
        "its routes have soft weights",
    ),
    "weighted routes": (lambda: WeightedRoutes(32, 4, 3), "its output differs from attention between regions"),
    "pooled keys": (lambda: of_regions(kv_down=nn.AvgPool2d(2)), "kv_down is torch.nn.modules.pooling.AvgPool2d"),
    "hooked gather": (hooked_gather, "kv_gather has hooks, which would not run"),
    "regions with wide heads": (
        lambda: BiLevelRoutingAttentionEager(514, 2, 3),
        "2 heads of 514 channels: a head has at most 256",
    ),
    "regions with narrow queries": (
        lambda: of_regions(qkv=published.NarrowProjection()),
        "qkv makes 64 channels of 32",
    ),
    "needs a mask": (lambda: NeedsMask(32, 4), "its forward or its gradient fails (TypeError on [2, 5, 32], None)"),
    "any number of arguments": (lambda: AnyNumber(32, 4), "its forward takes x, more"),
    "second output detached": (lambda: DetachedMetric(32, 4), "it returns a tuple"),
    "windows": (lambda: Window(32, 4), "its forward or its gradient fails (RuntimeError on [2, 5, 32])"),
    "no mode": (lambda: eager.MotionBERTAttention(32, 4, "vanilla"), "its mode is vanilla, not spatial or temporal"),
    "other default": (
        lambda: OtherLength(32, 4, "temporal"),
        "its output differs from attention over frames or joints",
    ),
    "ratio per side": (lambda: with_ratio((2, 4)), "sr_ratio is (2, 4)"),
    "ratio on qkv": (lambda: with_reduced_qkv(), "it has sr, a Conv2d"),
    "reduced otherwise": (lambda: with_ratio(2, nn.Conv1d(32, 32, 2)), "it has sr, a Conv1d"),
    "no token2map": (NoTokenMap, "it reduces its keys (sr_ratio = 2) without a token2map of its file"),
    "map of the keys": (MapOfKeys, "its output differs from attention over tokens with scores"),
    "detached score": (DetachedScore, "its gradients differ from attention over tokens with scores"),
    "unfit class": (
        lambda: Unfit(32, 4),
        "its class cannot be derived from (Unfit.__init_subclass__() missing 1 required keyword-only argument: 'x')",
    ),
    "no gradient": (Decorated, "its forward is decorated"),
    "torch's": (lambda: nn.MultiheadAttention(32, 4), "a form of attention that swap does not know"),
    "unknown": (SomeAttention, "a form of attention that swap does not know"),
    "layers in containers": (AttentionOfContainers, "a form of attention that swap does not know"),
    "ours": (lambda: hotkernels.nn.Attention(32, 4), "it is fused as it is"),
    "instance forward": (replaced_forward, "its forward was replaced on the instance"),
    "hooked probabilities": (hooked_probabilities, "attn_drop has hooks, which would not run"),
    "hooked norm": (hooked_norm, "k_norm has hooks, which would not run"),
    "own dropout": (own_dropout, "attn_drop is test_swap_left.OwnDropout"),
    "quantised": (
        lambda: with_qkv(torch.ao.nn.quantized.dynamic.Linear(32, 96)),
        "qkv is torch.ao.nn.quantized.dynamic.modules.linear.Linear",
    ),
    "no qkv": (lambda: with_qkv(nn.Linear(32, 64)), "qkv makes 64 channels of 32 where proj takes 32"),
    "wide heads": (lambda: AttentionEager(514, 2), "2 heads of 514 channels: a head has at most 256"),
    "meta device": (lambda: AttentionEager(32, 4).to("meta"), "on the meta device nothing can be compared"),
    "drops nothing": (lambda: DropsNever(32, 4), "it applies proj_drop elsewhere than attention"),
    "drops elsewhere": (lambda: DropsBefore(32, 4), "it applies proj_drop elsewhere than attention"),
    "changes its input": (lambda: ChangesItsInput(32, 4), "its forward changes its input"),
    "Python's random numbers": (lambda: LayerDrop(random.random), "its forward draws random numbers"),
    "NumPy's random numbers": (lambda: LayerDrop(np.random.rand), "its forward draws random numbers"),
    "clamped logits": (lambda: Clamped(32, 4), "its output differs from attention on large input"),
    "a controller": (Controlled, "its forward stores controller"),
    "a count on a layer": (lambda: Counting(0), "its forward stores proj.count"),
    "a tensor on a layer": (lambda: Counting(torch.zeros(1)), "its forward stores proj.count"),
    "an array on a layer": (lambda: Counting(np.zeros(1)), "its forward stores proj.count"),
    "attn": (ClassAttn, "a form of attention that swap does not know"),
    "scripted": (lambda: torch.jit.trace(AttentionEager(32, 4), torch.ones(1, 2, 32)), "it is scripted"),
    "scripted, on a grid": (
        lambda: torch.jit.trace(GridAttention(32, 4), (torch.ones(1, 6, 32), torch.tensor(2), torch.tensor(3))),
        "it is scripted",
    ),
}


class OwnGenerator(AttentionEager):
    """Drops its whole output now and then, by numbers of its own."""

    def __init__(self, generator: Any) -> None:
        super().__init__(32)
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        g = self.generator
        drawn = torch.rand((), generator=g).item() if isinstance(g, torch.Generator) else g.random()
        return super().forward(x) * (drawn >= 0.001 or not self.training)


@pytest.mark.parametrize("make", [torch.Generator, random.Random, np.random.default_rng, np.random.RandomState])
def test_a_forward_that_draws_from_a_generator_of_its_own(make: Any) -> None:
    """It is left, and the generator is where it was."""
    generator = make()
    state = generator.get_state() if isinstance(generator, torch.Generator) else pickle.dumps(generator)
    with pytest.raises(ValueError, match="its forward stores generator"):
        hotkernels.swap(OwnGenerator(generator))
    now = generator.get_state() if isinstance(generator, torch.Generator) else pickle.dumps(generator)
    assert torch.equal(now, state) if isinstance(now, Tensor) else now == state


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", LEFT)
def test_left_alone_with_a_reason(what: str) -> None:
    make, reason = LEFT[what]
    odd = make()
    cls = type(odd)
    report = hotkernels.swap(nn.ModuleDict({"odd": odd, "plain": AttentionEager(32)}))
    assert getattr(odd, "maps", []) == []
    assert report.left == [("odd", reason)]
    assert report.replaced == [("plain", "attention")]
    assert type(odd) is cls
    with pytest.raises(ValueError, match=r"swap: model must be one with a module that swap knows, got .+") as error:
        hotkernels.swap(odd)
    assert reason in str(error.value)


def test_a_twin_that_differs_leaves_a_module_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlike(hotkernels.Twin):
        kind = "unlike"
        fits = staticmethod(lambda module: isinstance(module, AttentionEager))
        examples = staticmethod(lambda module: [(torch.randn(2, 5, 32),)])

        def forward(self, x: Tensor) -> Tensor:
            return x

    monkeypatch.setattr(twins, "TWINS", [Unlike, *twins.TWINS])
    assert hotkernels.swap(AttentionEager(32, 4)).replaced == [("", "attention")]


def test_a_verdict_is_for_modules_that_hold_the_same() -> None:
    """It is reached once for all modules that differ in the values of their parameters alone."""
    report = hotkernels.swap(nn.Sequential(Times(1.0), Times(2.0), Times(1.0)))
    assert [name for name, _ in report.replaced] == ["0", "2"]
    assert report.left == [("1", "its output differs from attention")]
    ones = torch.ones(2000)  # of which a text shows the ends
    for factors, name in (((1.0, 2.0), "_factor"), ((ones, ones.index_fill(0, torch.tensor(1000), 2.0)), "factor")):
        report = hotkernels.swap(nn.Sequential(*(Times(factor, name) for factor in factors)))
        assert report.left == [("1", "its output differs from attention")]
    report = hotkernels.swap(nn.Sequential(WiderInHalf(64, 4), WiderInHalf(64, 4).bfloat16()))
    assert report.left == [("1", "its output differs from attention")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", ["Cooler", "Alibi", "WiderInHalf"])
def test_rounding_in_half_precision_hides_nothing(dtype: torch.dtype, change: str) -> None:
    """Of a module: rounding to half precision is larger than what some of these change."""
    model = nn.Sequential(globals()[change](64, 4), AttentionEager(64, 4)).to(dtype)
    report = hotkernels.swap(model)
    assert report.left == [("0", "its output differs from attention")]
    assert report.replaced == [("1", "attention")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_of_16_blocks_is_no_difference(dtype: torch.dtype) -> None:
    model = eager.HoTMixSTEEager(frames=81, token_num=27, layer_index=3, channels=64, depth=8).to(dtype)
    report = hotkernels.swap(model, example_inputs=torch.randn(2, 81, 17, 2, dtype=dtype))
    assert len(report.replaced) == 17


class FewKeys(ToQkvAttention):
    """Multi-query: one key and value for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(32, 48)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.to_qkv(x).split([32, 8, 8], -1)
        q, k, v = q.unflatten(-1, (4, 8)).transpose(1, 2), k[:, None], v[:, None]
        return self.to_out(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Halves(TimmMlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(torch.cat([self.act(hidden), self.act(hidden)], -1))


class Property(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(32, 96), nn.Linear(32, 32)

    @property
    def scale(self) -> float:
        raise RuntimeError

    fc1 = act = heads = scale


class Underived(nn.Sequential):
    def __init_subclass__(cls) -> None:
        raise TypeError("final")


def sparse_mlp() -> nn.Module:
    module = TimmMlp(nn.GELU())
    module.fc1.weight = nn.Parameter(module.fc1.weight.detach().to_sparse_csr(), requires_grad=False)
    return module


def without_weight() -> nn.Module:
    module = TimmMlp(nn.GELU())
    del module.fc1.weight
    return module


class ChannelAttention(nn.Module):
    """CBAM's and squeeze-and-excitation's: one layer, and no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(1, keepdim=True)).sigmoid()


ODD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "few keys": (FewKeys, "attention fails on what it takes (RuntimeError)"),
    "lazy": (lambda: of_to_qkv(to_out=nn.LazyLinear(32)), "it has parameters whose shape is not known yet"),
    "attention by name": (ChannelAttention, ""),
    "property": (Property, f"heads and scale are {Property.scale} and {Property.scale}"),
    **{
        name: (make, reason)
        for name, make, reason in (
            ("halves", lambda: Halves(nn.GLU()), "MLP fails on what it takes (RuntimeError)"),
            (
                "underived",
                lambda: Underived(nn.Linear(32, 8), nn.Linear(8, 32)),
                "its class cannot be derived from (final)",
            ),
            ("sparse", sparse_mlp, ""),
            ("no weight", without_weight, ""),
            (
                "no forward",
                lambda: nn.ModuleDict({"fc1": nn.Linear(2, 2), "act": nn.ReLU(), "fc2": nn.Linear(2, 2)}),
                "",
            ),
        )
        if _HAS_ONEDNN
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_odd_modules_beside_others(name: str) -> None:
    """They are left, with a reason or in silence, and raise nothing."""
    make, reason = ODD[name]
    report = hotkernels.swap(nn.ModuleDict({"odd": make(), "plain": AttentionEager(32)}))
    assert report.replaced == [("plain", "attention")]
    assert report.left == ([("odd", reason)] if reason else [])
