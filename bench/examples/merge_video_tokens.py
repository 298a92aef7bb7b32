"""Merge the tokens of each video frame, 256 -> 64 -> 32 -> 16, as Chat-UniVi does before its language model.

python -m bench.examples.merge_video_tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

import hotkernels
from bench.examples import arguments, saved
from hotkernels.baselines import cluster_dpc_knn_eager, merge_tokens_eager

STEPS = ((64, 5), (32, 3), (16, 3))  # clusters, neighbours


def merge(x: Tensor) -> list[Tensor]:
    """Tokens of all three scales, [T, M, C] each."""
    scales = []
    for clusters, k in STEPS:
        peaks = hotkernels.dpc_knn(x, clusters, k)
        x = hotkernels.merge_tokens(x, peaks.assignment, clusters)
        scales.append(x)
    return scales


def merge_eager(x: Tensor) -> list[Tensor]:
    """The same with the published functions: cdist in float32, N x N matrices, index_add."""
    scales = []
    for clusters, k in STEPS:
        noise = torch.rand(x.shape[:2]) * 1e-6
        _, assignment = cluster_dpc_knn_eager(x.float(), clusters, k, noise)
        x = merge_tokens_eager(x, assignment, clusters)
        scales.append(x)
    return scales


def coverage(x: Tensor, kept: Tensor) -> float:
    """Mean distance from a token to the nearest merged one."""
    return float(torch.cdist(x, kept).amin(-1).mean())


def main() -> None:
    """Merge, compare, time."""
    args = arguments(__doc__, frames=64, channels=1024)
    torch.manual_seed(0)
    # Frames that change slowly, each with regions: what a vision encoder gives has neighbours that are alike.
    regions = torch.randn(1, 40, args.channels) + 0.1 * torch.randn(args.frames, 40, args.channels).cumsum(0)
    which = torch.randint(40, (256,))
    x = regions[:, which] + 0.5 * torch.randn(args.frames, 256, args.channels)

    ours, eager = merge(x), merge_eager(x)
    print(f"{args.frames} frames of 256 tokens -> " + ", ".join(str(t.shape[1]) for t in ours) + " per frame:")
    print(f"{256 * args.frames} tokens -> {sum(t.shape[1] for t in ours) * args.frames} for the language model")
    for a, b in zip(eager, ours, strict=True):
        print(f"  mean distance to the nearest of {b.shape[1]}: eager {coverage(x, a):.3f}, ours {coverage(x, b):.3f}")
    saved(lambda: merge_eager(x), lambda: merge(x), args.rounds)


if __name__ == "__main__":
    main()
