"""HoT's hourglass in one block: prune frames, attend over the kept ones, recover all; as published and as ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import nn as fused
from ..baselines import AttentionEager, TokenPruningEager, TokenRecoveryEager
from .measure import Pair, peaks, times

_HEADS = 8


class Hourglass(nn.Module):
    """TokenPruning, attention between joints, attention between frames, TokenRecovery: hotkernels.nn's modules.

    [B, F, J, C] -> [B, F, J, C]. The MLPs between attentions, the same on both sides, are left out.
    """

    parts: ClassVar[tuple[type[nn.Module], ...]] = (fused.TokenPruning, fused.Attention, fused.TokenRecovery)

    def __init__(self, channels: int, frames: int, keep: int, k: int) -> None:
        super().__init__()
        pruning, attention, recovery = self.parts
        self.pruning = pruning(channels, keep, k)
        self.spatial_norm, self.temporal_norm = (nn.LayerNorm(channels, eps=1e-6) for _ in range(2))
        self.spatial, self.temporal = (attention(channels, _HEADS, qkv_bias=True) for _ in range(2))
        self.recovery = recovery(channels, frames, _HEADS, qkv_bias=True)

    def prune(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """[B, F, J, C] -> [B, M, J, C]: the frames of `index` [B, M], or of its own choice."""
        return self.pruning(x, index)[0]

    def attend(self, x: Tensor) -> Tensor:
        """Between the joints of a frame, then between the frames of a joint."""
        x = x + self.spatial(self.spatial_norm(x))
        return x + self.temporal(self.temporal_norm(x), along=-3)

    def recover(self, x: Tensor) -> Tensor:
        """[B, M, J, C] -> [B, F, J, C]."""
        return self.recovery(x)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """All three."""
        return self.recover(self.attend(self.prune(x, index)))


class HourglassEager(Hourglass):
    """The same from the published modules, with their rearrange copies and state_dict keys."""

    parts = (TokenPruningEager, AttentionEager, TokenRecoveryEager)

    def attend(self, x: Tensor) -> Tensor:
        """The same; attention takes rows of [B * M, J, C] and of [B * J, M, C]."""
        B, M, J, _ = x.shape
        x = x.flatten(0, 1)
        x = x + self.spatial(self.spatial_norm(x))
        x = x.unflatten(0, (B, M)).transpose(1, 2).flatten(0, 1)
        x = x + self.temporal(self.temporal_norm(x))
        return x.unflatten(0, (B, J)).transpose(1, 2)


@dataclass
class Comparison:
    """The published hourglass and ours, same weights, same tokens [B, F, J, C]; on one thread."""

    shape: list[int]
    keep: int
    heads: int
    difference: float
    """Largest difference of their outputs where both keep the same frames, over the largest output."""
    float64_error: Pair
    """The same between each and the published modules in float64, on the first window."""
    times_ms: dict[str, Pair]
    """Medians per stage, and of the whole; pruning chooses its frames itself."""
    memory_mib: Pair | None
    """Peak memory of the whole beyond the input and the weights."""


def build(channels: int, frames: int, keep: int, k: int, seed: int) -> tuple[HourglassEager, Hourglass]:
    """Both hourglasses with the same seeded, untrained weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        eager, ours = HourglassEager(channels, frames, keep, k), Hourglass(channels, frames, keep, k)
        # Published as zeros, from which every frame would recover the same tokens.
        for name in ("pruning.pos_embed_token", "recovery.x_token"):
            nn.init.normal_(eager.get_parameter(name))
    ours.load_state_dict(eager.state_dict(), strict=True)
    return eager.eval().requires_grad_(False), ours.eval().requires_grad_(False)


def compare(x: Tensor, index: Tensor, k: int, seed: int, rounds: int, tick: Callable[[], None]) -> Comparison:
    """Run both on tokens x [B, F, J, C], with the frames of `index` [B, M] kept where outputs are compared."""
    keep = index.shape[1]
    eager, ours = build(x.shape[-1], x.shape[1], keep, k, seed)
    published, own = eager(x, index), ours(x, index)
    exact = copy.deepcopy(eager).double()(x[:1].double(), index[:1])
    tick()
    kept = eager.prune(x, index)
    attended, ours_attended = eager.attend(kept), ours.attend(kept)  # each in its own layout
    calls = {
        "prune": (lambda: eager.prune(x), lambda: ours.prune(x)),
        "attend": (lambda: eager.attend(kept), lambda: ours.attend(kept)),
        "recover": (lambda: eager.recover(attended), lambda: ours.recover(ours_attended)),
        "whole": (lambda: eager(x), lambda: ours(x)),
    }
    return Comparison(
        shape=list(x.shape),
        keep=keep,
        heads=_HEADS,
        difference=_relative(own, published),
        float64_error=Pair(_relative(published[:1], exact), _relative(own[:1], exact)),
        times_ms=times(calls, 1, rounds, tick),
        memory_mib=peaks(calls["whole"]),
    )


def _relative(value: Tensor, to: Tensor) -> float:
    return float((value - to).abs().max() / to.abs().max())
