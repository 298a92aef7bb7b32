"""Train HoT-MixSTE on two processes with DistributedDataParallel: python -m bench.examples.train_ddp.

Both lift generated 2D motion to 3D, each on its own half of every batch, over gloo on this machine. What they measured
goes home through a queue, as plain numbers: a tensor that gloo still holds when Python shuts down ends the process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from bench.convergence import mpjpe, windows
from bench.examples import arguments
from hotkernels.models import HoTMixSTE
from hotkernels.models.eager import HoTMixSTEEager


def worker(rank: int, args: argparse.Namespace, rendezvous: str, results: Any) -> None:
    """One of the two: puts its rank and {model: (seconds per step, first and last MPJPE in mm, sums of parameters)}."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    poses, target = windows(range(2), 10.0, args.frames)
    options = {
        "frames": args.frames, "token_num": args.frames // 3, "channels": args.channels, "depth": 4, "layer_index": 1
    }  # fmt: skip
    found = {}
    published, ours = HoTMixSTEEager(**options), HoTMixSTE(**options, select="cluster_random")
    ours.load_state_dict(published.state_dict())
    for name, plain in (("eager", published), ("hotkernels", ours)):
        model = DistributedDataParallel(plain)  # gives both processes the parameters of the first
        torch.manual_seed(rank)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        generator = torch.Generator().manual_seed(rank)
        losses = []
        for step in range(args.steps + 1):
            if step == 1:  # the first sets things up
                start = time.perf_counter()
            chosen = torch.randint(len(poses), (2,), generator=generator)
            loss = mpjpe(model(poses[chosen]), target[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(1000 * loss.item())
        seconds = (time.perf_counter() - start) / args.steps
        found[name] = (seconds, losses[0], losses[-1], [p.detach().double().sum().item() for p in model.parameters()])
    results.put((rank, found))
    distributed.destroy_process_group()


def main() -> None:
    """Start both processes, and say what they found."""
    args = arguments(__doc__, frames=81, channels=128, steps=10)
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (args, str(Path(folder) / "rendezvous"), results), nprocs=2)
    found = dict(results.get() for _ in range(2))
    for name, (seconds, before, after, parameters) in found[0].items():
        assert parameters == found[1][name][3], "the two processes have drifted apart"
        print(f"{name:<12}{seconds * 1e3:8.1f} ms per step; MPJPE {before:.0f} -> {after:.0f} mm")
    print("both processes hold the same parameters")


if __name__ == "__main__":
    main()
