"""Attention of each point to its nearest neighbours in a point cloud, with a learned bias of their distance.

python -m bench.examples.point_cloud
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hotkernels
from bench.examples import arguments, saved


class NeighbourAttention(nn.Module):
    """Attend to K neighbours; with `fused`, without the gathered copies [B, N, K, C] of keys and values."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.distance = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, heads))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, index: Tensor, distance: Tensor) -> Tensor:
        """x [B, N, C], index and distance [B, N, K]."""
        B, N, C = x.shape
        query, key, value = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        bias = self.distance(distance[..., None]).permute(0, 3, 1, 2)  # [B, H, N, K]
        if self.fused:
            out = hotkernels.gathered_attention(query, key, value, index, bias=bias)
        else:
            batch, head = torch.arange(B)[:, None, None, None], torch.arange(self.heads)[:, None, None]
            near_key, near_value = (t[batch, head, index[:, None]] for t in (key, value))  # [B, H, N, K, D]
            logits = (query[..., None, :] * near_key).sum(-1) * query.shape[-1] ** -0.5 + bias
            out = (logits.softmax(-1)[..., None] * near_value).sum(-2)
        return self.proj(out.transpose(1, 2).reshape(B, N, C))


def main() -> None:
    """Compare and time a forward and backward pass."""
    args = arguments(__doc__, points=4096, neighbours=16, channels=128)
    torch.manual_seed(0)
    points = torch.randn(1, args.points, 3)
    points = points / points.norm(dim=-1, keepdim=True)  # on a sphere
    distance, index = torch.cdist(points, points).topk(args.neighbours, largest=False)
    x = torch.randn(1, args.points, args.channels)
    ours = NeighbourAttention(args.channels, 4, fused=True)
    eager = NeighbourAttention(args.channels, 4, fused=False)
    eager.load_state_dict(ours.state_dict())

    def step(model: nn.Module) -> list[Tensor]:
        out = model(x, index, distance)
        return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]

    gap, *gaps = [(a - b).abs().max() for a, b in zip(step(ours), step(eager), strict=True)]
    print(f"{args.points} points, {args.neighbours} neighbours")
    print(f"largest difference of an output: {gap:.1e}, of a gradient: {max(gaps):.1e}")
    print("forward and backward:")
    saved(lambda: step(eager), lambda: step(ours), args.rounds)


if __name__ == "__main__":
    main()
