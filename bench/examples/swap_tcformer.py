"""A model in the style of TCFormer: image tokens merged by clusters, 3136 -> 784 -> 196; made faster by one line.

python -m bench.examples.swap_tcformer
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import hotkernels
from bench.examples import arguments, saved
from hotkernels.baselines import cluster_dpc_knn_eager, merge_tokens_eager


# The functions of the model's own file, as TCFormer has them.
def cluster_dpc_knn(
    token_dict: dict[str, Any], cluster_num: int, k: int = 5, token_mask: Tensor | None = None
) -> tuple[Tensor, int]:
    """Assign the tokens to clusters."""
    x = token_dict["x"]
    return cluster_dpc_knn_eager(x, cluster_num, k, torch.rand(x.shape[:2]) * 1e-6, token_mask)[1], cluster_num


def merge_tokens(
    token_dict: dict[str, Any], idx_cluster: Tensor, cluster_num: int, token_weight: Tensor | None = None
) -> dict[str, Any]:
    """Average the tokens of each cluster, and keep track of where every pixel went."""
    x = token_dict["x"]
    weight = torch.ones_like(x[..., :1]) if token_weight is None else token_weight
    batch = torch.arange(len(x))[:, None]
    total = weight.new_zeros(len(x), cluster_num, 1).index_put((batch, idx_cluster), weight, accumulate=True) + 1e-6
    share = weight / total[batch, idx_cluster]
    return {
        "x": merge_tokens_eager(x, idx_cluster, cluster_num, weight),
        "token_num": cluster_num,
        "map_size": token_dict["map_size"],
        "init_grid_size": token_dict["init_grid_size"],
        "idx_token": idx_cluster.gather(1, token_dict["idx_token"]),
        "agg_weight": token_dict["agg_weight"] * share[batch, token_dict["idx_token"]],
    }


def token2map(token_dict: dict[str, Any]) -> Tensor:
    """The map [B, C, H, W] whose pixels are the mean of the tokens that lie there."""
    x, idx_token, (H, W) = token_dict["x"], token_dict["idx_token"], token_dict["map_size"]
    pixels = torch.arange(H * W).view(1, 1, H, W).float()
    pixels = F.interpolate(pixels, token_dict["init_grid_size"]).long().flatten()
    cells = x.gather(1, idx_token[..., None].expand(-1, -1, x.shape[-1]))
    total = x.new_zeros(len(x), H * W, x.shape[-1]).index_add(1, pixels, cells)
    return (total / pixels.bincount(minlength=H * W)[:, None]).transpose(1, 2).unflatten(2, (H, W))


class TCAttention(nn.Module):
    """Merged tokens attend to those before merging, reduced on their map; a score per key is added to the logits."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.num_heads, self.sr_ratio, self.scale = num_heads, sr_ratio, (dim // num_heads) ** -0.5
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.sr, self.norm = nn.Conv2d(dim, dim, sr_ratio, sr_ratio), nn.LayerNorm(dim)

    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        """[B, M, C]."""
        x, keys = q_dict["x"], kv_dict["x"]
        both = torch.cat([keys, kv_dict.get("token_score", torch.zeros_like(keys[..., :1]))], -1)
        pixels = token2map({**kv_dict, "x": both, "map_size": q_dict["map_size"]})
        keys = self.norm(self.sr(pixels[:, :-1]).flatten(2).transpose(1, 2))
        score = F.avg_pool2d(pixels[:, -1:], self.sr_ratio).flatten(2)[:, None]
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(keys).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        probabilities = self.attn_drop((q @ k.mT * self.scale + score).softmax(-1))
        return self.proj_drop(self.proj((probabilities @ v).transpose(1, 2).flatten(2)))


class MergeStage(nn.Module):
    """Merge N tokens to N / 4 by clusters, weighted by a score, then let them attend."""

    def __init__(self, dim: int, sr_ratio: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Linear(dim, 1)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TCAttention(dim, 8, sr_ratio)

    def forward(self, token_dict: dict[str, Any]) -> dict[str, Any]:
        """One stage."""
        x = self.norm(token_dict["x"])
        score = self.score(x)
        token_dict = token_dict | {"x": x, "token_score": score}
        idx_cluster, cluster_num = cluster_dpc_knn(token_dict, x.shape[1] // 4)
        down = merge_tokens(token_dict, idx_cluster, cluster_num, score.exp())
        down["map_size"] = [size // 2 for size in down["map_size"]]
        asking, asked = down | {"x": self.norm1(down["x"])}, token_dict | {"x": self.norm1(x)}
        return down | {"x": down["x"] + self.attn(asking, asked)}


class Merger(nn.Module):
    """Patches of 4 x 4 pixels, two merge stages, the mean of what is left."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 7, 4, 3)
        self.stages = nn.ModuleList(MergeStage(dim, sr_ratio) for sr_ratio in (4, 2))
        self.head = nn.Linear(dim, 10)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 10]."""
        x = self.embed(image)
        B, _, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        tokens: dict[str, Any] = {
            "x": x,
            "token_num": H * W,
            "map_size": [H, W],
            "init_grid_size": [H, W],
            "idx_token": torch.arange(H * W).repeat(B, 1),
            "agg_weight": x.new_ones(B, H * W, 1),
        }
        for stage in self.stages:
            tokens = stage(tokens)
        return self.head(tokens["x"].mean(1))


def main() -> None:
    """Swap, compare, time."""
    args = arguments(__doc__, size=224, channels=128, batch=2)
    torch.manual_seed(0)
    published = Merger(args.channels).eval()
    model = copy.deepcopy(published)
    image = torch.randn(args.batch, 3, args.size, args.size)

    print(hotkernels.swap(model))

    with torch.no_grad():
        answers = []
        for each in (published, model):
            torch.manual_seed(1)  # both draw the same noise for the clustering
            answers.append(each(image))
        print(f"\nlargest difference of an output: {(answers[0] - answers[1]).abs().max():.1e}")
        print("a forward pass:")
        saved(lambda: published(image), lambda: model(image), args.rounds)
    print("forward and backward:")
    saved(lambda: published(image).sum().backward(), lambda: model(image).sum().backward(), args.rounds)


if __name__ == "__main__":
    main()
