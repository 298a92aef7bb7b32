"""Ways to choose the frames that stay, and to bring back the others, of HoT (CVPR 2024) and H2OT (arXiv 2509.06956).

A way to choose is any function ``(x, token_num, scene) -> index``: tokens [B, F, J, C] to positions [B, token_num]
int64, strictly ascending.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..nn import Attention
from ..nn.hourglass import cluster_frames
from ..ops.gathered_attention.api import unpack


class Scene(NamedTuple):
    """What a way to choose may look at besides the tokens."""

    poses: Tensor
    """[B, F, J, 2]: the model's input at these frames."""
    keep: Tensor | None
    """[1 or B, 1]: the position that must stay; None = none."""
    norm: nn.Module
    attention: Attention
    """The next temporal attention, and the norm before it."""


Select = Callable[[Tensor, int, Scene], Tensor]


def cluster(x: Tensor, token_num: int, scene: Scene) -> Tensor:
    """TPC: the density peaks among the frames (k = 2), by the mean of their joints' tokens; reproducible."""
    return cluster_frames(x, token_num, keep=scene.keep)


def cluster_random(x: Tensor, token_num: int, scene: Scene) -> Tensor:
    """TPC as published: equal densities are ordered by one ``torch.rand(B, F)`` of the global generator."""
    noise = torch.rand(x.shape[:2], device=x.device, dtype=x.dtype) * 1e-6
    return cluster_frames(x, token_num, keep=scene.keep, noise=noise)


def uniform(x: Tensor, token_num: int, scene: Scene) -> Tensor:
    """TPS: evenly spaced frames, the first and the last among them."""
    B, F = x.shape[:2]
    place = torch.arange(token_num, device=x.device)
    index = place * (F - 1) // (token_num - 1) if token_num > 1 else place + (F - 1) // 2
    index = index.expand(B, -1)
    if scene.keep is None:
        return index
    keep = scene.keep.to(index).expand(B, 1)
    return index.scatter(1, (index - keep).abs().argmin(1, keepdim=True), keep)


@torch.no_grad()
def attention(x: Tensor, token_num: int, scene: Scene) -> Tensor:
    """TPA: the frames that the next temporal attention attends to most, over all joints, heads and query frames."""
    score = []
    for sample in x.split(1):  # one [J, H, F, F] at a time
        qkv = scene.attention.qkv(scene.norm(sample)).unflatten(-1, (3, scene.attention.num_heads, -1))
        query, key, _ = unpack(qkv)
        score.append((query @ key.mT * scene.attention.scale).softmax(-1).mean((1, 2, 3)))
    return _best(torch.cat(score), token_num, scene.keep)


def motion(x: Tensor, token_num: int, scene: Scene) -> Tensor:
    """TPMo: the frames that moved most since the one before, by the sum of absolute differences of 2D joints."""
    moved = scene.poses.detach().diff(dim=1).abs().sum((2, 3))
    return _best(torch.nn.functional.pad(moved, (1, 0)), token_num, scene.keep)


def _best(score: Tensor, token_num: int, keep: Tensor | None) -> Tensor:
    score = score.nan_to_num(-torch.inf, torch.finfo(score.dtype).max)
    if keep is not None:
        score = score.scatter(1, keep.expand(score.shape[0], 1), torch.inf)
    return score.topk(token_num, dim=1).indices.sort(1).values


SELECT: dict[str, Select] = {f.__name__: f for f in (cluster, cluster_random, uniform, attention, motion)}


def interpolate(poses: Tensor, index: Tensor, length: int) -> Tensor:
    """TRI: bring poses at chosen frames back to every frame, linearly in time; constant outside the chosen ones.

    Args:
        poses: [B, M, J, 3], after the head.
        index: [B, M], their frames, strictly ascending.
        length: L.

    Returns:
        [B, L, J, 3], differentiable in poses.
    """
    B, M = index.shape
    if M == 1:
        return poses.expand(B, length, *poses.shape[2:])
    time = torch.arange(length, device=index.device).expand(B, length).contiguous()
    right = torch.searchsorted(index.contiguous(), time).clamp(1, M - 1)
    before, after = index.gather(1, right - 1), index.gather(1, right)
    weight = ((time - before).to(poses.dtype) / (after - before)).clamp(0, 1)[..., None, None]
    batch = torch.arange(B, device=index.device)[:, None]
    return torch.lerp(poses[batch, right - 1], poses[batch, right], weight)
