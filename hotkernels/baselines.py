"""What users run today: the published functions and modules in eager PyTorch.

Demo, tests and benchmarks measure against these. Written from their signatures and behaviour; the definitions that
kernels are held against are ops/<op>/reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@torch.no_grad()
def cluster_dpc_knn_eager(
    x: Tensor, cluster_num: int, k: int, noise: Tensor, token_mask: Tensor | None = None, center: int | None = None
) -> tuple[Tensor, Tensor]:
    """DPC-kNN as TCFormer and HoT publish it, over an N x N matrix: (index_down [B, M], idx_cluster [B, N]).

    `noise` [B, N] is what they draw as torch.rand(B, N) * 1e-6. `center` is the frame that MHFormer always keeps: it is
    not among the `cluster_num`, its caller appends it.
    """
    B, _, C = x.shape
    d = torch.cdist(x, x) / C**0.5
    if token_mask is not None:
        token_mask = token_mask > 0
        d = d * token_mask[:, None, :] + (d.max() + 1) * ~token_mask[:, None, :]
    nearest = d.topk(k, dim=-1, largest=False).values
    density = (-(nearest**2).mean(-1)).exp() + noise
    if token_mask is not None:
        density = density * token_mask
    denser = (density[:, None, :] > density[:, :, None]).type(x.dtype)
    farthest = d.flatten(1).max(-1).values[:, None, None]
    delta = (d * denser + farthest * (1 - denser)).min(-1).values
    score = delta * density
    if center is not None:
        score[:, center] = -torch.inf
    index_down = score.topk(cluster_num, dim=-1).indices
    batch = torch.arange(B, device=x.device)[:, None]
    idx_cluster = d[batch, index_down].argmin(1)
    idx_cluster[batch, index_down] = torch.arange(cluster_num, device=x.device).expand(B, -1)
    return index_down, idx_cluster


def merge_tokens_eager(x: Tensor, idx_cluster: Tensor, cluster_num: int, weight: Tensor | None = None) -> Tensor:
    """Weighted mean per cluster as TCFormer publishes it: index_add over B * M rows. weight [B, N, 1]."""
    B, N, C = x.shape
    if weight is None:
        weight = x.new_ones(B, N, 1)
    rows = (idx_cluster + torch.arange(B, device=x.device)[:, None] * cluster_num).reshape(-1)
    total = weight.new_zeros(B * cluster_num, 1).index_add(0, rows, weight.reshape(B * N, 1)) + 1e-6
    share = weight / total[rows].reshape(B, N, 1)
    merged = x.new_zeros(B * cluster_num, C).index_add(0, rows, (x * share).reshape(B * N, C).to(x.dtype))
    return merged.reshape(B, cluster_num, C)


def gather_tokens_eager(x: Tensor, index: Tensor, pos: Tensor | None = None) -> Tensor:
    """Pruning as HoT publishes it: an index, then the addition of the position embedding [M, C] or [1, M, C]."""
    pruned = x[torch.arange(x.shape[0], device=x.device)[:, None], index]
    return pruned if pos is None else pruned + pos.reshape(pos.shape[-2], *[1] * (x.dim() - 3), pos.shape[-1])


def attention_eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Dense attention of [..., H, N, D] as every published module writes it: the whole matrix of probabilities."""
    return (query @ key.transpose(-2, -1) * scale).softmax(-1) @ value


def gathered_attention_eager(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Keys per query as RoITr publishes it: gathered copies [B, Nq, K, H * D] of keys and values, then a softmax.

    query, key, value [B, H, N, D]; index [B, Nq, K]; returns [B, H, Nq, D].
    """
    H, D = query.shape[1], query.shape[-1]
    batch = torch.arange(len(index), device=index.device)[:, None, None]
    near_key, near_value = (t.transpose(1, 2).flatten(2)[batch, index].unflatten(-1, (H, D)) for t in (key, value))
    probability = (torch.einsum("bhnd,bnkhd->bhnk", query, near_key) * D**-0.5).softmax(-1)
    return torch.einsum("bhnk,bnkhd->bhnd", probability, near_value)


class AttentionEager(nn.Module):
    """Self-attention as timm's ViT and MixSTE publish it; arguments and state_dict keys as hotkernels.nn.Attention."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each sequence of x [B, N, C]."""
        B, N, C = x.shape
        query, key, value = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        probability = self.attn_drop((query @ key.transpose(-2, -1) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((probability @ value).transpose(1, 2).reshape(B, N, C)))


class CrossAttentionEager(nn.Module):
    """Cross-attention as HoT publishes it; arguments and state_dict keys as hotkernels.nn.CrossAttention."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        length: int = 27,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.linear_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.linear_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.linear_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        """Let x_1 [B, L, C] attend to keys from x_2 and values from x_3, both [B, M, C]."""
        query, key, value = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.linear_q(x_1), self.linear_k(x_2), self.linear_v(x_3))
        )
        probability = self.attn_drop((query @ key.transpose(-2, -1) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((probability @ value).transpose(1, 2).reshape(x_1.shape)))


class TokenPruningEager(nn.Module):
    """Pruning as HoT publishes it; arguments and state_dict keys as hotkernels.nn.TokenPruning."""

    def __init__(self, dim: int, token_num: int, k: int = 2) -> None:
        super().__init__()
        self.token_num, self.k = token_num, k
        self.pos_embed_token = nn.Parameter(torch.zeros(1, token_num, dim))

    def forward(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prune x [B, F, J, C] to [B, M, J, C]."""
        if index is None:
            noise = torch.rand(x.shape[:2], device=x.device) * 1e-6
            index = cluster_dpc_knn_eager(x.mean(2), self.token_num, self.k, noise)[0].sort().values
        return gather_tokens_eager(x, index, self.pos_embed_token), index


class TokenRecoveryEager(nn.Module):
    """Recovery as HoT publishes it: x_token expanded to every joint of every sample, and projected as often."""

    def __init__(
        self,
        dim: int,
        length: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.x_token = nn.Parameter(torch.zeros(1, length, dim))
        self.cross_attention = CrossAttentionEager(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, length)

    def forward(self, x: Tensor) -> Tensor:
        """Recover x [B, M, J, C] to [B, L, J, C], a strided view as published: the next layer pays for that copy."""
        B, _, J, _ = x.shape
        x = x.transpose(1, 2).flatten(0, 1)
        token = self.x_token.expand(B * J, -1, -1)
        return (token + self.cross_attention(token, x, x)).unflatten(0, (B, J)).transpose(1, 2)


class BiLevelRoutingAttentionEager(nn.Module):
    """BiFormer's, without its options; arguments and state_dict keys as hotkernels.nn.BiLevelRoutingAttention."""

    class Projection(nn.Module):
        """One projection, split into queries and what belongs to keys."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.dim = dim
            self.qkv = nn.Linear(dim, 3 * dim)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            """Query [..., C], and keys and values [..., 2 * C]."""
            return self.qkv(x).split([self.dim, 2 * self.dim], -1)

    class Router(nn.Module):
        """The `topk` regions that are most like each, and their share."""

        def __init__(self, dim: int, topk: int, scale: float) -> None:
            super().__init__()
            self.topk, self.scale = topk, scale
            self.emb, self.routing_act = nn.Identity(), nn.Softmax(-1)

        def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            """Shares and regions [B, P, topk], of mean queries and keys [B, P, C]."""
            query, key = self.emb(query.detach()), self.emb(key.detach())
            logits, routes = (query * self.scale @ key.transpose(-2, -1)).topk(self.topk, -1)
            return self.routing_act(logits), routes

    class Gather(nn.Module):
        """Copies what each region attends to."""

        def __init__(self, mul_weight: str = "none") -> None:
            super().__init__()
            self.mul_weight = mul_weight

        def forward(self, r_idx: Tensor, r_weight: Tensor | None, kv: Tensor) -> Tensor:
            """Keys and values [B, P, topk, R, 2 * C] of the regions r_idx [B, P, topk], of kv [B, P, R, 2 * C]."""
            P, R, C = kv.shape[1:]
            chosen = kv[:, None].expand(-1, P, -1, -1, -1).gather(2, r_idx[..., None, None].expand(-1, -1, -1, R, C))
            if self.mul_weight == "none" or r_weight is None:
                return chosen
            return chosen * r_weight[..., None, None]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        soft_routing: bool = False,
        side_dwconv: int = 3,
        auto_pad: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.qk_dim, self.num_heads, self.n_win, self.topk = dim, dim, num_heads, n_win, topk
        self.scale = qk_scale or dim**-0.5
        self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)
        self.router = self.Router(dim, topk, self.scale)
        self.kv_gather = self.Gather("soft" if soft_routing else "none")
        self.qkv = self.Projection(dim)
        self.wo = nn.Linear(dim, dim)
        self.kv_down = nn.Identity()
        self.attn_act = nn.Softmax(-1)
        self.auto_pad = auto_pad

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Tensor:
        """Attend between the regions of x [B, height, width, C]."""
        n, (_, height, width, C) = self.n_win, x.shape
        if self.auto_pad:
            x = F.pad(x, (0, 0, 0, (n - width % n) % n, 0, (n - height % n) % n))
        B, H, W, _ = x.shape
        h, w = H // n, W // n
        query, kv = self.qkv(x.view(B, n, h, n, w, C).transpose(2, 3).reshape(B, n * n, h, w, C))
        pooled = self.kv_down(kv.flatten(0, 1).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2).unflatten(0, (B, n * n))
        values = kv[..., C:].unflatten(1, (n, n)).transpose(2, 3).reshape(B, H, W, C)
        lepe = self.lepe(values.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        weight, routes = self.router(query.mean([2, 3]), kv[..., :C].mean([2, 3]))
        chosen = self.kv_gather(r_idx=routes, r_weight=weight, kv=pooled)
        key, value = chosen.reshape(B * n * n, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        query = query.reshape(B * n * n, h * w, self.num_heads, -1).transpose(1, 2)
        out = self.attn_act(query * self.scale @ key.transpose(-2, -1)) @ value
        out = out.transpose(1, 2).reshape(B, n, n, h, w, C).transpose(2, 3).reshape(B, H, W, C)
        return self.wo(out + lepe)[:, :height, :width].contiguous()
