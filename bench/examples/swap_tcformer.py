"""A model in the style of TCFormer: image tokens merged by clusters, 3136 -> 784 -> 196; made faster by one line.

python -m bench.examples.swap_tcformer
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import hotkernels
from bench.examples import arguments, saved
from hotkernels.baselines import AttentionEager, cluster_dpc_knn_eager, merge_tokens_eager


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


class MergeStage(nn.Module):
    """Merge N tokens to N / 4 by clusters, weighted by a score, then let them attend to each other."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.score = nn.Linear(dim, 1)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = AttentionEager(dim, 8, qkv_bias=True)

    def forward(self, token_dict: dict[str, Any]) -> dict[str, Any]:
        """One stage."""
        token_dict = token_dict | {"x": self.norm(token_dict["x"])}
        weight = self.score(token_dict["x"]).exp()
        idx_cluster, cluster_num = cluster_dpc_knn(token_dict, token_dict["x"].shape[1] // 4)
        token_dict = merge_tokens(token_dict, idx_cluster, cluster_num, weight)
        return token_dict | {"x": token_dict["x"] + self.attn(self.norm1(token_dict["x"]))}


class Merger(nn.Module):
    """Patches of 4 x 4 pixels, two merge stages, the mean of what is left."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 7, 4, 3)
        self.stages = nn.ModuleList(MergeStage(dim) for _ in range(2))
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
    print("a training step:")
    saved(lambda: published(image).sum().backward(), lambda: model(image).sum().backward(), args.rounds)


if __name__ == "__main__":
    main()
