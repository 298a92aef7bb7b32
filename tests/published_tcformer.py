"""A model built as TCFormer's authors publish theirs, at any size, with the clustering and merging of its file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hotkernels.baselines import cluster_dpc_knn_eager, merge_tokens_eager
from hotkernels.models.eager import DropPath, Mlp


def cluster_dpc_knn(
    token_dict: dict[str, Any], cluster_num: int, k: int = 5, token_mask: Tensor | None = None
) -> tuple[Tensor, int]:
    x = token_dict["x"]
    noise = torch.rand(x.shape[:2], device=x.device, dtype=x.dtype) * 1e-6
    return cluster_dpc_knn_eager(x, cluster_num, k, noise, token_mask)[1], cluster_num


def merge_tokens(
    token_dict: dict[str, Any], idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None = None
) -> dict[str, Any]:
    x, idx_token = token_dict["x"], token_dict["idx_token"]
    if token_weight is None:
        token_weight = x.new_ones(*x.shape[:2], 1)
    member = F.one_hot(idx_cluster, cluster_num).to(x.dtype)
    share = token_weight / (member @ (member.mT @ token_weight) + 1e-6)
    return {
        "x": merge_tokens_eager(x, idx_cluster, cluster_num, token_weight),
        "token_num": cluster_num,
        "map_size": token_dict["map_size"],
        "init_grid_size": token_dict["init_grid_size"],
        "idx_token": idx_cluster.gather(1, idx_token),
        "agg_weight": token_dict["agg_weight"] * share.gather(1, idx_token[..., None]),
    }


def grid_index(token_dict: dict[str, Any]) -> Tensor:
    """For every cell of the initial grid, the pixel of the feature map that it lies in."""
    H, W = token_dict["map_size"]
    pixels = torch.arange(H * W).reshape(1, 1, H, W).float()
    return F.interpolate(pixels, token_dict["init_grid_size"], mode="nearest").long().flatten()


def average(x: Tensor, index: Tensor, size: int) -> Tensor:
    """Mean over the rows of x [B, N, C] that index [B, N] sends to the same place."""
    weight = F.one_hot(index, size).to(x.dtype)
    return weight.mT @ x / (weight.sum(1)[..., None] + 1e-6)


def token2map(token_dict: dict[str, Any]) -> Tensor:
    x, idx_token, (H, W) = token_dict["x"], token_dict["idx_token"], token_dict["map_size"]
    cells = x.gather(1, idx_token[..., None].expand(-1, -1, x.shape[-1]))
    pixels = average(cells, grid_index(token_dict).expand(len(x), -1), H * W)
    return pixels.transpose(1, 2).unflatten(2, (H, W))


def map2token(feature_map: Tensor, token_dict: dict[str, Any]) -> Tensor:
    cells = feature_map.flatten(2).transpose(1, 2)[:, grid_index(token_dict)]
    return average(cells, token_dict["idx_token"], token_dict["token_num"])


class TokenConv(nn.Conv2d):
    def __init__(self, dim: int, dim_out: int, **options: Any) -> None:
        super().__init__(dim, dim_out, 3, padding=1, **options)
        self.skip = nn.Conv1d(dim, dim_out, 1, bias=False, groups=options.get("groups", 1))

    def forward(self, token_dict: dict[str, Any]) -> Tensor:
        x = self.skip(token_dict["x"].transpose(1, 2)).transpose(1, 2)
        pooled = super().forward(token2map(token_dict))
        size = {**token_dict, "map_size": list(pooled.shape[-2:])}
        return x + map2token(pooled, size)


class GridAttention(nn.Module):
    """The first stage's: forward(x, H, W), keys from a strided convolution where sr_ratio > 1."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, sr_ratio: int = 1):
        super().__init__()
        self.dim, self.num_heads, self.sr_ratio = dim, num_heads, sr_ratio
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def attend(self, x: Tensor, keys: Tensor, score: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, -1).permute(0, 2, 1, 3)
        k, v = self.kv(keys).reshape(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if score is not None:
            logits = logits + score.squeeze(-1)[:, None, None, :]
        x = (self.attn_drop(logits.softmax(-1)) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        keys = x
        if self.sr_ratio > 1:
            keys = self.norm(self.sr(x.transpose(1, 2).unflatten(2, (H, W))).flatten(2).transpose(1, 2))
        return self.attend(x, keys)


class KeyValueAttention(GridAttention):
    """Cross-attention of the same layers: forward(x, context)."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.attend(x, context)


class TCAttention(GridAttention):
    """For dynamic tokens: forward(q_dict, kv_dict); a score per key is added to the logits.

    Without use_sr_layer keys are averaged where sr_ratio > 1.
    """

    def __init__(self, *args: Any, use_sr_layer: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.use_sr_layer = use_sr_layer
        if self.sr_ratio > 1 and not use_sr_layer:
            del self.sr, self.norm

    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        x, keys = q_dict["x"], kv_dict["x"]
        score = kv_dict["token_score"] if "token_score" in kv_dict else keys.new_zeros(*keys.shape[:2], 1)
        if self.sr_ratio > 1:
            source = {**kv_dict, "x": torch.cat([keys, score], -1), "map_size": q_dict["map_size"]}
            pixels = token2map(source)
            if self.use_sr_layer:
                keys = self.norm(self.sr(pixels[:, :-1]).flatten(2).transpose(1, 2))
            else:
                keys = F.avg_pool2d(pixels[:, :-1], self.sr_ratio).flatten(2).transpose(1, 2)
            score = F.avg_pool2d(pixels[:, -1:], self.sr_ratio).flatten(2).transpose(1, 2)
        return self.attend(x, keys, score)


class GridBlock(nn.Module):
    def __init__(self, dim: int, heads: int, sr_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), GridAttention(dim, heads, sr_ratio=sr_ratio)
        self.drop_path = DropPath(drop_path)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim, 2 * dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TCMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = TokenConv(hidden, hidden, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, token_dict: dict[str, Any]) -> Tensor:
        return self.fc2(F.gelu(self.dwconv({**token_dict, "x": self.fc1(token_dict["x"])})))


class TCBlock(nn.Module):
    def __init__(self, dim: int, heads: int, sr_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), TCAttention(dim, heads, sr_ratio=sr_ratio)
        self.drop_path = DropPath(drop_path)
        self.norm2, self.mlp = nn.LayerNorm(dim), TCMlp(dim, 2 * dim)

    def forward(self, inputs: Any) -> dict[str, Any]:
        q_dict, kv_dict = inputs if isinstance(inputs, tuple) else (inputs, None)
        x = q_dict["x"]
        q_dict = {**q_dict, "x": self.norm1(x)}
        kv_dict = q_dict if kv_dict is None else {**kv_dict, "x": self.norm1(kv_dict["x"])}
        x = x + self.drop_path(self.attn(q_dict, kv_dict))
        x = x + self.drop_path(self.mlp({**q_dict, "x": self.norm2(x)}))
        return {**q_dict, "x": x}


class CTM(nn.Module):
    """Clustering-based Token Merge: a convolution, a score per token, clusters of N * sample_ratio."""

    def __init__(self, sample_ratio: float, dim: int, dim_out: int, k: int = 5) -> None:
        super().__init__()
        self.sample_ratio, self.k = sample_ratio, k
        self.conv = TokenConv(dim, dim_out, stride=2)
        self.norm = nn.LayerNorm(dim_out)
        self.score = nn.Linear(dim_out, 1)

    def forward(self, token_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        token_dict = token_dict.copy()
        token_dict["x"] = self.norm(self.conv(token_dict))
        token_dict["token_score"] = self.score(token_dict["x"])
        cluster_num = max(math.ceil(token_dict["x"].shape[1] * self.sample_ratio), 1)
        idx_cluster, cluster_num = cluster_dpc_knn(token_dict, cluster_num, self.k)
        down_dict = merge_tokens(token_dict, idx_cluster, cluster_num, token_dict["token_score"].exp())
        down_dict["map_size"] = [(size - 1) // 2 + 1 for size in token_dict["map_size"]]
        return down_dict, token_dict


class TCFormer(nn.Module):
    """Two stages on the grid and two on dynamic tokens; keys are reduced in the first of each."""

    def __init__(self, dims: tuple[int, int, int] = (16, 24, 32), heads: int = 4) -> None:
        super().__init__()
        self.patch_embed1 = nn.Conv2d(3, dims[0], 7, 4, 3)
        self.block1 = nn.ModuleList([GridBlock(dims[0], heads, ratio, 0.1) for ratio in (2, 1)])
        for i, ratio in ((1, 2), (2, 1)):
            self.add_module(f"ctm{i}", CTM(0.25, dims[i - 1], dims[i]))
            self.add_module(f"block{i + 1}", nn.ModuleList([TCBlock(dims[i], heads, ratio, 0.1) for _ in range(2)]))
        self.head = nn.Linear(dims[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed1(x)
        B, _, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        for block in self.block1:
            x = block(x, H, W)
        tokens: Any = {
            "x": x,
            "token_num": H * W,
            "map_size": [H, W],
            "init_grid_size": [H, W],
            "idx_token": torch.arange(H * W).repeat(B, 1),
            "agg_weight": x.new_ones(B, H * W, 1),
        }
        for i in (1, 2):
            tokens = getattr(self, f"ctm{i}")(tokens)
            for block in getattr(self, f"block{i + 1}"):
                tokens = block(tokens)
        return self.head(tokens["x"].mean(1))
