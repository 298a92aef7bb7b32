"""What hotkernels.swap leaves for what it is made of, though it looks like a module that swap knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import published
import pytest
import torch
from published import TimmMlp, ToQkvAttention, VisionAttention
from published_tcformer import GridAttention, TCAttention
from swapping import assert_left
from torch import Tensor, nn

import hotkernels
from hotkernels.baselines import AttentionEager, BiLevelRoutingAttentionEager
from hotkernels.models import eager
from hotkernels.nn.linear import _HAS_ONEDNN


class RelativeBias(AttentionEager):
    def __init__(self) -> None:
        super().__init__(32, 4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))


class RelativeBiasBesideBiases(published.QvBiasAttention):
    """BEiT's."""

    def __init__(self) -> None:
        super().__init__(32, 4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))


class AnyNumber(AttentionEager):
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return super().forward(x) * (1 + len(more) - more.count(None))


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


class ClassAttn(nn.Module):
    """CaiT's name for it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x[:, :1]) @ self.k(x).mT).softmax(-1) @ self.v(x)


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


class Decorated(AttentionEager):
    def __init__(self) -> None:
        super().__init__(32, 4)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def of_regions(**parts: Any) -> nn.Module:
    module = BiLevelRoutingAttentionEager(32, 4, 3)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def hooked_gather() -> nn.Module:
    module: Any = BiLevelRoutingAttentionEager(32, 4, 3)
    module.kv_gather.register_forward_hook(lambda _, __, out: out * 2)
    return module


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


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "q and k norms": (lambda: VisionAttention(32, 4, qk_norm=True), "it has q_norm, a LayerNorm"),
    "relative bias": (RelativeBias, "it has relative_position_bias_table"),
    "relative bias beside q_bias": (RelativeBiasBesideBiases, "it has relative_position_bias_table"),
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
    "any number of arguments": (lambda: AnyNumber(32, 4), "its forward takes x, more"),
    "no mode": (lambda: eager.MotionBERTAttention(32, 4, "vanilla"), "its mode is vanilla, not spatial or temporal"),
    "ratio per side": (lambda: with_ratio((2, 4)), "sr_ratio is (2, 4)"),
    "ratio on qkv": (with_reduced_qkv, "it has sr, a Conv2d"),
    "reduced otherwise": (lambda: with_ratio(2, nn.Conv1d(32, 32, 2)), "it has sr, a Conv1d"),
    "no token2map": (NoTokenMap, "it reduces its keys (sr_ratio = 2) without a token2map of its file"),
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
    "attn": (ClassAttn, "a form of attention that swap does not know"),
    "scripted": (lambda: torch.jit.trace(AttentionEager(32, 4), torch.ones(1, 2, 32)), "it is scripted"),
    "scripted, on a grid": (
        lambda: torch.jit.trace(GridAttention(32, 4), (torch.ones(1, 6, 32), torch.tensor(2), torch.tensor(3))),
        "it is scripted",
    ),
    "lazy": (lambda: of_to_qkv(to_out=nn.LazyLinear(32)), "it has parameters whose shape is not known yet"),
    "property": (Property, f"heads and scale are {Property.scale} and {Property.scale}"),
}
if _HAS_ONEDNN:  # without which an MLP has no twin
    LEFT["underived"] = (
        lambda: Underived(nn.Linear(32, 8), nn.Linear(8, 32)),
        "its class cannot be derived from (final)",
    )


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", LEFT)
def test_left_alone_with_a_reason(what: str) -> None:
    make, reason = LEFT[what]
    assert_left(make(), reason)


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


# Of which nothing is told.
SILENT: dict[str, Callable[[], nn.Module]] = {
    "attention by name": ChannelAttention,
    "sparse": sparse_mlp,
    "no weight": without_weight,
    "no forward": lambda: nn.ModuleDict({"fc1": nn.Linear(2, 2), "act": nn.ReLU(), "fc2": nn.Linear(2, 2)}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("what", SILENT)
def test_left_alone_in_silence(what: str) -> None:
    report = hotkernels.swap(nn.ModuleDict({"odd": SILENT[what](), "plain": AttentionEager(32)}))
    assert report.replaced == [("plain", "attention")]
    assert report.left == []
