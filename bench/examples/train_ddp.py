"""Train HoT-MixSTE on two processes with DistributedDataParallel: python -m bench.examples.train_ddp.

Both lift generated 2D motion to 3D, each on its own half of every batch, over gloo on this machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from bench.convergence import mpjpe, windows
from bench.examples import arguments
from hotkernels.models import HoTMixSTE
from hotkernels.models.eager import HoTMixSTEEager


def worker(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    poses, target = windows(range(2), 10.0, args.frames)
    options = {
        "frames": args.frames, "token_num": args.frames // 3, "channels": args.channels, "depth": 4, "layer_index": 1
    }  # fmt: skip
    seconds, losses = {}, {}
    published, ours = HoTMixSTEEager(**options), HoTMixSTE(**options, select="cluster_random")
    ours.load_state_dict(published.state_dict())
    for name, model in (("eager", published), ("hotkernels", ours)):
        model = DistributedDataParallel(model)  # gives both processes the parameters of the first
        torch.manual_seed(rank)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        generator = torch.Generator().manual_seed(rank)
        losses[name] = []
        for step in range(args.steps + 1):
            if step == 1:  # the first sets things up
                start = time.perf_counter()
            chosen = torch.randint(len(poses), (2,), generator=generator)
            loss = mpjpe(model(poses[chosen]), target[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(1000 * loss.item())
        seconds[name] = (time.perf_counter() - start) / args.steps
        sums = torch.stack([p.detach().double().sum() for p in model.parameters()])
        other = sums.clone()
        distributed.broadcast(other, 0)
        assert torch.equal(sums, other), "the two processes have drifted apart"
    if rank == 0:
        for name, time_ in seconds.items():
            print(f"{name:<12}{time_ * 1e3:8.1f} ms per step; MPJPE {losses[name][0]:.0f} -> {losses[name][-1]:.0f} mm")
        print("both processes hold the same parameters")
        print(f"{seconds['eager'] / seconds['hotkernels']:.2f}x as fast")
    distributed.destroy_process_group()


def main() -> None:
    """Start both processes."""
    args = arguments(__doc__, frames=81, channels=128, steps=10)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (args, str(Path(folder) / "rendezvous")), nprocs=2)


if __name__ == "__main__":
    main()
