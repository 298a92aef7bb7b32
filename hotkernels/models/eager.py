"""The same models in eager PyTorch as published, a rearrange copy around every block: what ours are measured against.

Written from their structure and behaviour; parameters and state_dict keys are those of `HoTMixSTE` and `HoTMotionBERT`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..baselines import AttentionEager, CrossAttentionEager, cluster_dpc_knn_eager
from .layers import layer_norm


def cluster_dpc_knn(x: Tensor, cluster_num: int, k: int, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cluster x [B, N, C] as published, with noise from the global generator: (index_down, idx_cluster)."""
    noise = torch.rand(x.shape[:2], device=x.device, dtype=x.dtype) * 1e-6
    return cluster_dpc_knn_eager(x, cluster_num, k, noise, token_mask)


def cluster_dpc_knn_center(
    x: Tensor, cluster_num: int, k: int, center: int, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same without the frame `center`, which the caller appends."""
    noise = torch.rand(x.shape[:2], device=x.device, dtype=x.dtype) * 1e-6
    return cluster_dpc_knn_eager(x, cluster_num, k, noise, token_mask, center)


class DropPath(nn.Module):
    """Stochastic depth as timm publishes it: whole rows of the first dim are left out."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop rows of x in training."""
        if self.drop_prob == 0 or not self.training:
            return x
        kept = x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)
        return x * kept.div_(1 - self.drop_prob)


def _chosen(x: Tensor, token_num: int, k: int, center: int | None) -> Tensor:
    """Choose frames of x [B, F, J, C] by clustering the means over its joints, with densities of k neighbours."""
    B, F, J, C = x.shape
    pooled = nn.functional.adaptive_avg_pool1d(x.permute(0, 1, 3, 2).reshape(B, F * C, J), 1).reshape(B, F, C)
    if center is None:
        return cluster_dpc_knn(pooled, token_num, k)[0].sort().values
    index, _ = cluster_dpc_knn_center(pooled, token_num - 1, k, center)
    return torch.cat([index, torch.full_like(index[:, :1], center)], 1).sort().values


def _recovered(x: Tensor, x_token: Tensor, cross_attention: nn.Module) -> Tensor:
    """Recover [B * J, M, C] to [B * J, L, C]."""
    token = x_token.expand(len(x), -1, -1)
    return token + cross_attention(token, x, x)


def _frames_first(x: Tensor, F: int) -> Tensor:
    """[B * F, J, C] -> [B * J, F, C]."""
    return x.unflatten(0, (-1, F)).transpose(1, 2).flatten(0, 1)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.fc2(self.act(self.fc1(x)))


class MixSTEBlock(nn.Module):
    """A pre-norm transformer block on [rows, N, C]."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = AttentionEager(dim, num_heads, qkv_bias=True)
        self.drop_path = DropPath(drop_path)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, N, C] -> [rows, N, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HoTMixSTEEager(nn.Module):
    """`hot_mixste`; with center=True and recover=None, `tpc_mixste`, which returns (poses, index)."""

    def __init__(
        self,
        *,
        frames: int = 243,
        token_num: int = 81,
        layer_index: int = 3,
        channels: int = 512,
        depth: int = 8,
        n_joints: int = 17,
        center: bool = False,
        recover: str | None = "attention",
        drop_path: float = 0.1,
        k: int = 2,
    ) -> None:
        super().__init__()
        self.token_num, self.layer_index, self.k = token_num, layer_index, k
        self.center = (frames - 1) // 2 if center else None
        self.Spatial_patch_to_embedding = nn.Linear(2, channels)
        self.Spatial_pos_embed = nn.Parameter(torch.zeros(1, n_joints, channels))
        self.Temporal_pos_embed = nn.Parameter(torch.zeros(1, frames, channels))
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.STEblocks, self.TTEblocks = (
            nn.ModuleList(MixSTEBlock(channels, 8, channels * 2, rate) for rate in rates) for _ in range(2)
        )
        self.recovers = recover is not None
        if self.recovers:
            self.pos_embed_token = nn.Parameter(torch.zeros(1, token_num, channels))
            self.x_token = nn.Parameter(torch.zeros(1, frames, channels))
            self.cross_attention = CrossAttentionEager(channels, 8, qkv_bias=True)
        self.Spatial_norm = layer_norm(channels)
        self.Temporal_norm = layer_norm(channels)
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 3))

    def forward(self, x: Tensor, index: Tensor | None = None) -> Any:
        """[B, F, J, 2] -> [B, F, J, 3], or (poses [B, M, J, 3], index)."""
        B, F, J, _ = x.shape
        x = self.Spatial_patch_to_embedding(x.flatten(0, 1))
        x += self.Spatial_pos_embed
        for i, (spatial, temporal) in enumerate(zip(self.STEblocks, self.TTEblocks, strict=True)):
            if i == self.layer_index:
                x = x.unflatten(0, (B, -1))
                if index is None:
                    index = _chosen(x, self.token_num, self.k, self.center)
                x = x[torch.arange(B, device=x.device)[:, None], index]
                F = self.token_num
                if self.recovers:
                    x = x.transpose(1, 2).flatten(0, 1)
                    x += self.pos_embed_token
                    x = x.unflatten(0, (B, J)).transpose(1, 2)
                x = x.flatten(0, 1)
            x = _frames_first(self.Spatial_norm(spatial(x)), F)
            if i == 0:
                x += self.Temporal_pos_embed
            x = _frames_first(self.Temporal_norm(temporal(x)), J)  # [B * F, J, C] again
        if self.recovers:
            x = _recovered(_frames_first(x, F), self.x_token, self.cross_attention)
            x = _frames_first(x, J)
        x = self.head(x).unflatten(0, (B, -1))
        return x if self.recovers else (x, index)


class MotionBERTAttention(AttentionEager):
    """MotionBERT's attention: over the rows' tokens, or ("temporal") over `seqlen` consecutive rows, per token."""

    def __init__(self, dim: int, num_heads: int, mode: str) -> None:
        super().__init__(dim, num_heads, qkv_bias=True)
        self.mode = mode

    def forward(self, x: Tensor, seqlen: int = 1) -> Tensor:
        """[B * F, J, C] -> [B * F, J, C]."""
        if self.mode == "spatial":
            return super().forward(x)
        R, J, C = x.shape
        qkv = self.qkv(x).reshape(R, J, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = (t.reshape(-1, seqlen, *t.shape[1:]).permute(0, 2, 3, 1, 4) for t in qkv)  # [B, H, J, F, D]
        probability = self.attn_drop((query @ key.transpose(-2, -1) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((probability @ value).permute(0, 3, 2, 1, 4).reshape(R, J, C)))


class MotionBERTBlock(nn.Module):
    """Spatial then temporal attention and MLP ("st"), or the reverse, on [B * F, J, C]."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, order: str, drop_path: float) -> None:
        super().__init__()
        self.order = order
        self.norm1_s, self.norm1_t = layer_norm(dim), layer_norm(dim)
        self.attn_s = MotionBERTAttention(dim, num_heads, "spatial")
        self.attn_t = MotionBERTAttention(dim, num_heads, "temporal")
        self.drop_path = DropPath(drop_path)
        self.norm2_s, self.norm2_t = layer_norm(dim), layer_norm(dim)
        self.mlp_s, self.mlp_t = Mlp(dim, hidden_dim), Mlp(dim, hidden_dim)

    def forward(self, x: Tensor, seqlen: int) -> Tensor:
        """[B * F, J, C] -> [B * F, J, C], with F = seqlen."""
        for which in self.order:
            norm1, attn, norm2, mlp = (getattr(self, f"{name}_{which}") for name in ("norm1", "attn", "norm2", "mlp"))
            x = x + self.drop_path(attn(norm1(x), seqlen))
            x = x + self.drop_path(mlp(norm2(x)))
        return x


class HoTMotionBERTEager(nn.Module):
    """`hot_motionbert`."""

    def __init__(
        self,
        *,
        frames: int = 243,
        token_num: int = 81,
        layer_index: int = 1,
        channels: int = 256,
        depth: int = 5,
        n_joints: int = 17,
        representation: int = 512,
        drop_path: float = 0.0,
        k: int = 2,
    ) -> None:
        super().__init__()
        self.token_num, self.layer_index, self.k = token_num, layer_index, k
        self.pos_embed_token = nn.Parameter(torch.zeros(1, token_num, channels))
        self.joints_embed = nn.Linear(3, channels)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks_st, self.blocks_ts = (
            nn.ModuleList(MotionBERTBlock(channels, 8, channels * 4, order, rate) for rate in rates)
            for order in ("st", "ts")
        )
        self.norm = layer_norm(channels)
        self.x_token = nn.Parameter(torch.zeros(1, frames, channels))
        self.cross_attention = CrossAttentionEager(channels, 8, qkv_bias=True)
        self.pre_logits = nn.Sequential(OrderedDict([("fc", nn.Linear(channels, representation)), ("act", nn.Tanh())]))
        self.head = nn.Linear(representation, 3)
        self.temp_embed = nn.Parameter(torch.zeros(1, frames, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, n_joints, channels))
        self.ts_attn = nn.ModuleList(nn.Linear(channels * 2, 2) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, J, 3] -> [B, F, J, 3]."""
        B, F, _, _ = x.shape
        x = self.joints_embed(x.flatten(0, 1)) + self.pos_embed
        x = (x.unflatten(0, (B, F)) + self.temp_embed).flatten(0, 1)
        for i, (block_st, block_ts, fuse) in enumerate(zip(self.blocks_st, self.blocks_ts, self.ts_attn, strict=True)):
            if i == self.layer_index:
                x = x.unflatten(0, (B, F))
                index = _chosen(x, self.token_num, self.k, None)
                x = x[torch.arange(B, device=x.device)[:, None], index].transpose(1, 2).flatten(0, 1)
                x += self.pos_embed_token
                x, F = _frames_first(x, x.shape[0] // B), self.token_num
            x_st, x_ts = block_st(x, F), block_ts(x, F)
            alpha = fuse(torch.cat([x_st, x_ts], -1)).softmax(-1)
            x = x_st * alpha[..., :1] + x_ts * alpha[..., 1:]
        J = x.shape[1]
        x = _recovered(_frames_first(self.norm(x), F), self.x_token, self.cross_attention)
        return self.head(self.pre_logits(x.unflatten(0, (B, J)).transpose(1, 2)))
