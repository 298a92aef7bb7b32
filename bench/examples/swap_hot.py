"""A published HoT model, made faster by one line: python -m bench.examples.swap_hot.

The model is HoT on MixSTE as its authors write it; any other that swap recognises would do. Its parameters, state_dict
and optimizer stay what they were.
"""

from __future__ import annotations

import copy

import torch

import hotkernels
from bench.examples import arguments, saved
from hotkernels.models.eager import HoTMixSTEEager


def main() -> None:
    """Swap, compare, time."""
    args = arguments(__doc__, frames=243, channels=256, depth=8, batch=1)
    options = {"frames": args.frames, "token_num": args.frames // 3, "channels": args.channels, "depth": args.depth}
    torch.manual_seed(0)
    published = HoTMixSTEEager(**options, layer_index=1).eval()
    model = copy.deepcopy(published)  # to have both; you would swap your own
    poses = torch.rand(args.batch, args.frames, 17, 2) * 2 - 1

    print(hotkernels.swap(model))

    index = torch.arange(0, args.frames, 3).expand(args.batch, -1)  # the same frames for both
    with torch.no_grad():
        gap = (model(poses, index) - published(poses, index)).abs().max()
        print(f"\nlargest difference of a coordinate, on the same kept frames: {gap:.1e}")
        print("a forward pass:")
        saved(lambda: published(poses), lambda: model(poses), args.rounds)
    print("forward and backward:")
    saved(lambda: published(poses).sum().backward(), lambda: model(poses).sum().backward(), args.rounds)


if __name__ == "__main__":
    main()
