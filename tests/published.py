"""Models built as HoT's authors publish theirs, and a ViT, at any size: for tests of what runs on published code.

Written from their structure and state_dict keys. Like each published file, this one defines its own clustering
functions, which the models' forwards call by name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hotkernels.baselines import AttentionEager, CrossAttentionEager, cluster_dpc_knn_eager

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def cluster_dpc_knn(x: Tensor, cluster_num: int, k: int, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    noise = torch.rand(x.shape[:2], device=x.device, dtype=x.dtype) * 1e-6
    return cluster_dpc_knn_eager(x, cluster_num, k, noise, token_mask)


def cluster_dpc_knn_center(
    x: Tensor, cluster_num: int, k: int, center: int, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    noise = torch.rand(x.shape[:2], device=x.device, dtype=x.dtype) * 1e-6
    return cluster_dpc_knn_eager(x, cluster_num, k, noise, token_mask, center)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep) / keep


def drop_path_of(drop_prob: float) -> nn.Module:
    return DropPath(drop_prob) if drop_prob > 0 else nn.Identity()


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """The pre-norm block of MixSTE, MHFormer and ViT."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0, attn: nn.Module | None = None, **drops: float):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = attn or AttentionEager(dim, heads, qkv_bias=True, **drops)
        self.drop_path = drop_path_of(drop_path)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim, drops.get("proj_drop", 0.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def swap_batch(x: Tensor, inner: int) -> Tensor:
    """[(b i), n, c] -> [(b n), i, c], a copy."""
    _, n, c = x.shape
    return x.reshape(-1, inner, n, c).transpose(1, 2).reshape(-1, inner, c)


def pool_joints(pool: nn.Module, x: Tensor) -> Tensor:
    """[b, f, n, c] -> [b, f, c] as published: an AdaptiveAvgPool1d over a permuted copy."""
    b, f, n, c = x.shape
    return pool(x.permute(0, 1, 3, 2).reshape(b, f * c, n)).reshape(b, f, c)


class MixSTE(nn.Module):
    """HoT on MixSTE; with `center`, its TPC form, which keeps the centre frame, returns the index and recovers none."""

    def __init__(
        self,
        frames: int = 27,
        token_num: int = 9,
        dim: int = 32,
        depth: int = 3,
        layer_index: int = 1,
        joints: int = 5,
        heads: int = 4,
        center: bool = False,
        drop_path: float = 0.1,
        k: int = 2,
        **drops: float,
    ) -> None:
        super().__init__()
        self.center = (frames - 1) // 2 if center else None
        self.token_num, self.layer_index, self.k = token_num, layer_index, k
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.Spatial_patch_to_embedding = nn.Linear(2, dim)
        self.Spatial_pos_embed = nn.Parameter(torch.randn(1, joints, dim) * 0.1)
        self.Temporal_pos_embed = nn.Parameter(torch.randn(1, frames, dim) * 0.1)
        self.pos_drop = nn.Dropout(0.0)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.STEblocks = nn.ModuleList([Block(dim, heads, rate, **drops) for rate in rates])
        self.TTEblocks = nn.ModuleList([Block(dim, heads, rate, **drops) for rate in rates])
        if not center:
            self.pos_embed_token = nn.Parameter(torch.randn(1, token_num, dim) * 0.1)
            self.x_token = nn.Parameter(torch.randn(1, frames, dim) * 0.1)
            self.cross_attention = CrossAttentionEager(dim, heads, qkv_bias=True, **drops)
        self.Spatial_norm, self.Temporal_norm = LayerNorm(dim), LayerNorm(dim)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3))

    def prune(self, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        b = x.shape[0]
        if index is None:
            pooled = pool_joints(self.pool, x)
            if self.center is None:
                index, _ = cluster_dpc_knn(pooled, self.token_num, self.k)
            else:
                index, _ = cluster_dpc_knn_center(pooled, self.token_num - 1, self.k, self.center)
                index = torch.cat([index, torch.full((b, 1), self.center, device=x.device)], -1)
            index, _ = torch.sort(index)
        return x[torch.arange(b, device=x.device).unsqueeze(-1), index], index

    def forward(self, x: Tensor, index: Tensor | None = None) -> Any:
        b, f, n, _ = x.shape
        x = self.Spatial_patch_to_embedding(x.reshape(b * f, n, -1))
        x += self.Spatial_pos_embed
        for i, (spatial, temporal) in enumerate(zip(self.STEblocks, self.TTEblocks, strict=True)):
            if i == self.layer_index:
                x, index = self.prune(x.reshape(b, -1, n, x.shape[-1]), index)
                if self.center is None:
                    x = x.transpose(1, 2).reshape(b * n, self.token_num, -1)
                    x += self.pos_embed_token
                    x = swap_batch(x, n)
                else:
                    x = x.flatten(0, 1)
            x = self.Spatial_norm(spatial(self.pos_drop(x)))
            x = swap_batch(x, x.shape[0] // b)
            if i == 0:
                x += self.Temporal_pos_embed
            x = swap_batch(self.Temporal_norm(temporal(self.pos_drop(x))), n)
        x = swap_batch(x, x.shape[0] // b)
        if self.center is None:
            x_token = self.x_token.expand(b * n, -1, -1)
            x = x_token + self.cross_attention(x_token, x, x)
        x = self.head(x.reshape(b, n, -1, x.shape[-1]).transpose(1, 2))
        return x if self.center is None else (x, index)


class SeqlenAttention(AttentionEager):
    """MotionBERT's: forward(x [b * t, j, c], seqlen = t); in any other mode than these, no attention at all."""

    def __init__(self, dim: int, heads: int, st_mode: str = "vanilla", **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self.mode = st_mode

    def forward(self, x: Tensor, seqlen: int = 1) -> Tensor:
        B, N, C = x.shape
        if self.mode in ("temporal", "spatial"):
            q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
            x = self.forward_temporal(q, k, v, seqlen) if self.mode == "temporal" else self.forward_spatial(q, k, v)
        return self.proj_drop(self.proj(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1)) @ v

    def forward_spatial(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(q, k, v).transpose(1, 2).flatten(2)

    def forward_temporal(self, q: Tensor, k: Tensor, v: Tensor, seqlen: int) -> Tensor:
        q, k, v = (t.reshape(-1, seqlen, *t.shape[1:]).permute(0, 2, 3, 1, 4) for t in (q, k, v))
        return self.attend(q, k, v).permute(0, 3, 2, 1, 4).flatten(0, 1).flatten(2)


class DualBlock(nn.Module):
    """MotionBERT's block: spatial then temporal attention, or the other way round."""

    def __init__(self, dim: int, heads: int, st_mode: str, drop_path: float) -> None:
        super().__init__()
        self.st_mode = st_mode
        for name, mode in (("s", "spatial"), ("t", "temporal")):
            self.add_module(f"norm1_{name}", LayerNorm(dim))
            self.add_module(f"attn_{name}", SeqlenAttention(dim, heads, mode, qkv_bias=True))
            self.add_module(f"norm2_{name}", LayerNorm(dim))
            self.add_module(f"mlp_{name}", Mlp(dim, 2 * dim))
        self.drop_path = drop_path_of(drop_path)

    def forward(self, x: Tensor, seqlen: int = 1) -> Tensor:
        for name in self.st_mode[-2:]:
            part = {key: getattr(self, f"{key}_{name}") for key in ("norm1", "attn", "norm2", "mlp")}
            x = x + self.drop_path(part["attn"](part["norm1"](x), seqlen))
            x = x + self.drop_path(part["mlp"](part["norm2"](x)))
        return x


class MotionBERT(nn.Module):
    """HoT on MotionBERT's DSTformer: two streams that a learned softmax mixes."""

    def __init__(self, frames: int = 27, token_num: int = 9, dim: int = 32, depth: int = 2, heads: int = 4, k: int = 2):
        super().__init__()
        self.token_num, self.layer_index, self.k = token_num, 1, k
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.pos_embed_token = nn.Parameter(torch.randn(1, token_num, dim) * 0.1)
        self.joints_embed = nn.Linear(3, dim)
        self.blocks_st = nn.ModuleList([DualBlock(dim, heads, "stage_st", 0.1) for _ in range(depth)])
        self.blocks_ts = nn.ModuleList([DualBlock(dim, heads, "stage_ts", 0.1) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        self.x_token = nn.Parameter(torch.randn(1, frames, dim) * 0.1)
        self.cross_attention = CrossAttentionEager(dim, heads, qkv_bias=True)
        self.head = nn.Linear(dim, 3)
        self.temp_embed = nn.Parameter(torch.randn(1, frames, 1, dim) * 0.1)
        self.ts_attn = nn.ModuleList([nn.Linear(dim * 2, 2) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        b, f, n, _ = x.shape
        x = (self.joints_embed(x) + self.temp_embed).flatten(0, 1)
        for i, (block_st, block_ts) in enumerate(zip(self.blocks_st, self.blocks_ts, strict=True)):
            if i == self.layer_index:
                x = x.reshape(b, f, n, -1)
                index, _ = cluster_dpc_knn(pool_joints(self.pool, x), self.token_num, self.k)
                x = x[torch.arange(b, device=x.device).unsqueeze(-1), torch.sort(index)[0]]
                f = x.shape[1]
                x = x.transpose(1, 2).reshape(b * n, f, -1)
                x += self.pos_embed_token
                x = swap_batch(x, n)
            st, ts = block_st(x, f), block_ts(x, f)
            alpha = self.ts_attn[i](torch.cat([st, ts], -1)).softmax(-1)
            x = st * alpha[..., :1] + ts * alpha[..., 1:]
        x = swap_batch(self.norm(x), f)
        x_token = self.x_token.expand(b * n, -1, -1)
        x = x_token + self.cross_attention(x_token, x, x)
        return self.head(x.reshape(b, n, -1, x.shape[-1]).transpose(1, 2))


class FramesAttention(AttentionEager):
    """MotionAGFormer's: forward(x [b, t, j, c]) with a mode; its heads come before the frames."""

    def __init__(self, dim_in: int, dim_out: int, heads: int, mode: str = "spatial", **options: Any) -> None:
        super().__init__(dim_in, heads, **options)
        self.mode = mode
        self.proj = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        B, T, J, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, J, 3, self.num_heads, C // self.num_heads).permute(3, 0, 4, 1, 2, 5)
        if self.mode == "temporal":
            q, k, v = q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)
        elif self.mode != "spatial":
            raise NotImplementedError(self.mode)
        x = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1)) @ v
        x = x.permute((0, 3, 2, 1, 4) if self.mode == "temporal" else (0, 2, 3, 1, 4)).reshape(B, T, J, C)
        return self.proj_drop(self.proj(x))


class JointGraph(nn.Module):
    """A stand-in for MotionAGFormer's graph mixer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.U = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.U(x) + self.U(x).mean(2, keepdim=True))


class AGFormerBlock(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(dim), mixer
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 0.5))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1 * self.mixer(self.norm1(x))
        return x + self.layer_scale_2 * self.mlp(self.norm2(x))


class MotionAGFormerLayer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.att_spatial = AGFormerBlock(dim, FramesAttention(dim, dim, heads, "spatial"))
        self.att_temporal = AGFormerBlock(dim, FramesAttention(dim, dim, heads, "temporal"))
        self.graph_spatial = AGFormerBlock(dim, JointGraph(dim))
        self.fusion = nn.Linear(dim * 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        attended, graph = self.att_temporal(self.att_spatial(x)), self.graph_spatial(x)
        alpha = self.fusion(torch.cat((attended, graph), -1)).softmax(-1)
        return attended * alpha[..., :1] + graph * alpha[..., 1:]


class MotionAGFormer(nn.Module):
    """HoT on MotionAGFormer: [b, t, j, c] throughout."""

    def __init__(self, frames: int = 27, token_num: int = 9, dim: int = 32, depth: int = 2, heads: int = 4, k: int = 2):
        super().__init__()
        self.token_num, self.layer_index, self.k = token_num, 1, k
        self.pool = nn.AdaptiveAvgPool1d(1)
        self.pos_embed_token = nn.Parameter(torch.randn(1, token_num, dim) * 0.1)
        self.joints_embed = nn.Linear(3, dim)
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.Sequential(*[MotionAGFormerLayer(dim, heads) for _ in range(depth)])
        self.x_token = nn.Parameter(torch.randn(1, frames, dim) * 0.1)
        self.cross_attention = CrossAttentionEager(dim, heads)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, _, n, _ = x.shape
        x = self.joints_embed(x)
        for i, layer in enumerate(self.layers):
            if i == self.layer_index:
                index, _ = cluster_dpc_knn(pool_joints(self.pool, x), self.token_num, self.k)
                x = x[torch.arange(b, device=x.device).unsqueeze(-1), torch.sort(index)[0]]
                x = x + self.pos_embed_token[:, :, None]
            x = layer(x)
        x = self.norm(x).transpose(1, 2).flatten(0, 1)
        x_token = self.x_token.expand(b * n, -1, -1)
        x = x_token + self.cross_attention(x_token, x, x)
        return self.head(x.reshape(b, n, -1, x.shape[-1]).transpose(1, 2))


class HypothesisBlock(nn.Module):
    """MHFormer's two blocks for three hypotheses: each attends to itself, or one asks, one is asked, one answers."""

    def __init__(self, dim: int, heads: int, drop_path: float, cross: bool) -> None:
        super().__init__()
        self.cross = cross
        for i in (1, 2, 3):
            for j in (1, 2, 3) if cross else (1,):
                self.add_module(f"norm{i}{j}", LayerNorm(dim))
            make = CrossAttentionEager if cross else AttentionEager
            self.add_module(f"attn_{i}", make(dim, heads, qkv_bias=True, proj_drop=0.1))
        self.drop_path = drop_path_of(drop_path)
        self.norm2 = LayerNorm(dim * 3)
        self.mlp = Mlp(dim * 3, dim, 0.1)

    def forward(self, *x: Tensor) -> tuple[Tensor, ...]:
        out = list(x)
        for i in (1, 2, 3):
            others = [j for j in (0, 1, 2) if j != i - 1]
            asked = [*others, i - 1] if self.cross else [i - 1]
            normed = [getattr(self, f"norm{i}{j}")(out[a]) for j, a in enumerate(asked, 1)]
            out[i - 1] = out[i - 1] + self.drop_path(getattr(self, f"attn_{i}")(*normed))
        both = torch.cat(out, 2)
        return (both + self.drop_path(self.mlp(self.norm2(both)))).chunk(3, 2)


class MHFormer(nn.Module):
    """TPC on MHFormer: attention over joints with frames as channels (27 of 9 heads), then three hypotheses pruned."""

    def __init__(
        self, frames: int = 27, token_num: int = 9, dim: int = 32, joints: int = 4, heads: int = 4, k: int = 2
    ):
        super().__init__()
        self.center, self.token_num, self.k = (frames - 1) // 2, token_num, k
        for i in (1, 2, 3):
            self.add_module(f"encoder_{i}", Block(frames, 9))
            self.add_module(f"embedding_{i}", nn.Conv1d(2 * joints, dim, 1))
        self.SHR_blocks = nn.ModuleList([HypothesisBlock(dim, heads, rate, cross=False) for rate in (0.0, 0.1)])
        self.CHI_blocks = nn.ModuleList([HypothesisBlock(dim, heads, 0.2, cross=True)])
        self.norm = LayerNorm(dim * 3)
        self.regression = nn.Sequential(nn.BatchNorm1d(dim * 3), nn.Conv1d(dim * 3, 3 * joints, 1))

    def forward(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        b, _, n, _ = x.shape
        x = x.flatten(2).transpose(1, 2).contiguous()  # [b, (n c), f]
        hypotheses = []
        for i in (1, 2, 3):
            x = x + getattr(self, f"encoder_{i}")(x)
            hypotheses.append(getattr(self, f"embedding_{i}")(x).transpose(1, 2).contiguous())
        for i, block in enumerate(self.SHR_blocks):
            if i == 1:
                if index is None:
                    index, _ = cluster_dpc_knn_center(torch.cat(hypotheses, 2), self.token_num - 1, self.k, self.center)
                    index = torch.cat([index, torch.full((b, 1), self.center, device=x.device)], -1).sort()[0]
                hypotheses = [h[torch.arange(b, device=x.device)[:, None], index] for h in hypotheses]
            hypotheses = block(*hypotheses)
        x = self.norm(torch.cat(self.CHI_blocks[0](*hypotheses), 2))
        x = self.regression(x.transpose(1, 2)).transpose(1, 2)
        return x.reshape(b, -1, n, 3), index


class VisionAttention(nn.Module):
    """timm's: norms of queries and keys that are the identity unless asked for, SDPA, a mask that may be given."""

    def __init__(self, dim: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, dim * 3)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attn_drop.p if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask, dropout_p=drop)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).reshape(B, N, C))))


class ViT(nn.Module):
    """timm's plain ViT: patches, a class token, blocks."""

    def __init__(self, dim: int = 32, depth: int = 2, heads: int = 4, drop_path: float = 0.1, **attention: Any) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.1)
        self.blocks = nn.Sequential(
            *[Block(dim, heads, drop_path, VisionAttention(dim, heads, **attention)) for _ in range(depth)]
        )
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])
