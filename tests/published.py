"""Small models as published, for tests: HoT's hosts beside those of `hotkernels.models.eager`, and a ViT.

Written from their structure and state_dict keys. Like each published file, this one has the clustering functions in its
own namespace, where the models' forwards look them up by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hotkernels.baselines import AttentionEager, BiLevelRoutingAttentionEager, CrossAttentionEager
from hotkernels.models.eager import (
    DropPath,
    HoTMixSTEEager,
    HoTMotionBERTEager,
    MixSTEBlock,
    Mlp,
    cluster_dpc_knn,
    cluster_dpc_knn_center,
)
from hotkernels.models.layers import layer_norm

M = TypeVar("M", bound=nn.Module)


def _small(make: Callable[..., M], options: dict[str, Any]) -> M:
    """A model for five joints, no parameter of which is zero, as its embeddings are before training."""
    model = make(**{"frames": 27, "token_num": 9, "layer_index": 1, "channels": 32, "n_joints": 5, **options})
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def hot_mixste(**options: Any) -> HoTMixSTEEager:
    return _small(HoTMixSTEEager, {"depth": 3, **options})


def hot_motionbert(**options: Any) -> HoTMotionBERTEager:
    return _small(HoTMotionBERTEager, {"depth": 2, "representation": 32, "drop_path": 0.1, **options})


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
                index, _ = cluster_dpc_knn(x.mean(2), self.token_num, self.k)
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
                self.add_module(f"norm{i}{j}", layer_norm(dim))
            make = CrossAttentionEager if cross else AttentionEager
            self.add_module(f"attn_{i}", make(dim, heads, qkv_bias=True, proj_drop=0.1))
        self.drop_path = DropPath(drop_path)
        self.norm2 = layer_norm(dim * 3)
        self.mlp = Mlp(dim * 3, dim)

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
            self.add_module(f"encoder_{i}", MixSTEBlock(frames, 9, 2 * frames, 0.0))
            self.add_module(f"embedding_{i}", nn.Conv1d(2 * joints, dim, 1))
        self.SHR_blocks = nn.ModuleList([HypothesisBlock(dim, heads, rate, cross=False) for rate in (0.0, 0.1)])
        self.CHI_blocks = nn.ModuleList([HypothesisBlock(dim, heads, 0.2, cross=True)])
        self.norm = layer_norm(dim * 3)
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


class QvBiasAttention(AttentionEager):
    """VideoMAE's: a bias for queries and one for values, beside a qkv of which only the weight is used."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = nn.functional.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(B, N, -1)))


class PolicyAttention(AttentionEager):
    """DynamicViT's: in training a policy says which tokens are attended to, beside each one itself."""

    def forward(self, x: Tensor, policy: Tensor | None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = q @ k.transpose(-2, -1) * self.scale
        if policy is None:
            attn = attn.softmax(-1)
        else:
            kept = policy.reshape(B, 1, 1, N)
            weight = (attn - attn.amax(-1, keepdim=True)).exp() * (kept + (1 - kept) * torch.eye(N))
            attn = (weight + 1e-6 / N) / (weight.sum(-1, keepdim=True) + 1e-6)
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(B, N, C)))


class PairedPolicyAttention(PolicyAttention):
    """TPS's: also returns None, or the probabilities if asked for."""

    def forward(self, x: Tensor, policy: Tensor | None, return_attn: bool = False) -> Any:
        out = super().forward(x, policy)
        if not return_attn:
            return out, None
        q, k, _ = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return out, (q @ k.transpose(-2, -1) * self.scale).softmax(-1)


class HaltingAttention(AttentionEager):
    """A-ViT's: tokens that have halted are attended to no more."""

    def __init__(self, dim: int, heads: int, masked_softmax_bias: float = -1000.0) -> None:
        super().__init__(dim, heads)
        self.mask, self.masked_softmax_bias = None, masked_softmax_bias

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = q @ k.transpose(-2, -1) * self.scale
        if mask is not None:
            attn = attn + mask.view(mask.shape[0], 1, 1, mask.shape[1]) * self.masked_softmax_bias
        x = (self.attn_drop(attn.softmax(-1)) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class ToMeAttention(AttentionEager):
    """ToMe's: a merged token counts as often as it has been merged; also returns what tokens are compared by."""

    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = q @ k.transpose(-2, -1) * self.scale
        if size is not None:
            attn = attn + size.log()[:, None, None, :, 0]
        x = (self.attn_drop(attn.softmax(-1)) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x)), k.mean(1)


class EvitAttention(AttentionEager):
    """EViT's: also says which tokens the class token attends to most, if it is to drop any."""

    def __init__(self, dim: int, heads: int, keep_rate: float = 0.7, **options: Any) -> None:
        super().__init__(dim, heads, **options)
        self.keep_rate = keep_rate

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2))), attn[:, :, 0, 1:].mean(1)

    def forward(self, x: Tensor, keep_rate: float | None = None, tokens: int | None = None) -> tuple[Any, ...]:
        rate = self.keep_rate if keep_rate is None else keep_rate
        out, scores = self.attend(x)
        left = x.shape[1] - 1
        if (self.keep_rate < 1 and rate < 1) or tokens is not None:
            left = math.ceil(rate * left) if tokens is None else tokens
            if left != x.shape[1] - 1:
                assert left >= 1
                best = scores.topk(left, dim=1)[1]
                return out, best.unsqueeze(-1).expand(-1, -1, x.shape[2]), best, scores, left
        return out, None, None, None, left


class RankingAttention(EvitAttention):
    """TokenReduction's of EViT, and with three results its top-k."""

    def __init__(self, dim: int, heads: int, keep_rate: float = 0.7, results: int = 5, **options: Any) -> None:
        super().__init__(dim, heads, keep_rate, **options)
        self.init_n, self.results = 9, results

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        out, scores = self.attend(x)
        left = int(self.keep_rate * self.init_n)
        if self.keep_rate >= 1:
            return (out, None, None, None, None)[: self.results]
        if left == x.shape[1] - 1:
            return out, None, None, None, left
        assert left >= 1
        best = scores.topk(left, dim=1)[1]
        return (out, best.unsqueeze(-1).expand(-1, -1, x.shape[2]), best, scores, left)[: self.results]


class VisionBlock(MixSTEBlock):
    def __init__(self, dim: int, heads: int, drop_path: float, **attention: Any) -> None:
        super().__init__(dim, heads, 2 * dim, drop_path)
        self.attn = VisionAttention(dim, heads, **attention)


class ViT(nn.Module):
    """timm's plain ViT: patches, a class token, blocks."""

    def __init__(self, dim: int = 32, depth: int = 2, heads: int = 4, drop_path: float = 0.1, **attention: Any) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.1)
        self.blocks = nn.Sequential(*[VisionBlock(dim, heads, drop_path, **attention) for _ in range(depth)])
        self.norm = layer_norm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class NarrowProjection(BiLevelRoutingAttentionEager.Projection):
    """Queries and keys of half the channels."""

    def __init__(self) -> None:
        super().__init__(32)
        self.dim, self.qkv = 16, nn.Linear(32, 64)


class BiFormerBlock(nn.Module):
    def __init__(self, dim: int, topk: int) -> None:
        super().__init__()
        self.norm1, self.attn = layer_norm(dim), BiLevelRoutingAttentionEager(dim, dim // 16, 3, topk=topk)
        self.norm2, self.mlp = layer_norm(dim), nn.Sequential(nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        return (x + self.mlp(self.norm2(x))).permute(0, 3, 1, 2)


class BiFormer(nn.Module):
    """Two stages, with regions of 16 and of 4 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 64, 2, 2)])
        self.stages = nn.ModuleList([BiFormerBlock(32, 2), BiFormerBlock(64, 5)])
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
        return self.head(x.flatten(2).mean(-1))


class TimmMlp(nn.Module):
    """timm's."""

    def __init__(self, act: nn.Module, drop: float = 0.0, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(32, 48), act, nn.Dropout(drop)
        self.norm, self.fc2, self.drop2 = norm or nn.Identity(), nn.Linear(48, 24), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class ToQkvAttention(nn.Module):
    """TokenPose's; with a norm and a softmax of its own, and its own width of heads, vit-pytorch's."""

    def __init__(self, dim: int = 32, heads: int = 4, dim_head: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        inner = dim if dim_head is None else heads * dim_head
        self.heads, self.scale = heads, dim**-0.5 if dim_head is None else dim_head**-0.5
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(0.0))
        if dim_head is not None:
            self.norm, self.attend, self.dropout = nn.LayerNorm(dim), nn.Softmax(dim=-1), nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(x) if hasattr(self, "norm") else x
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        logits = q @ k.mT * self.scale
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
        probability = self.dropout(self.attend(logits)) if hasattr(self, "attend") else logits.softmax(-1)
        return self.to_out((probability @ v).transpose(1, 2).flatten(2))


class LowRank(nn.Linear):
    """A layer that is adapted, as by LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)
