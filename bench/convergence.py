"""Trains a small HoT-MixSTE twice from one seed, as published and in native layout: do they learn alike?

    python -m bench.convergence            # three seeds, a few minutes on one core
    python -m bench.convergence --seeds 1 --steps 20 --channels 16 --depth 2 --out convergence_out

The task is 2D-to-3D lifting of generated motion: windows of F frames in, joints relative to the hip in metres out.
Both models start from the same parameters and draw the same random numbers: batches, noise, stochastic depth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import header
from hotkernels.demo.motion import generate_motion, normalise
from hotkernels.models import HoTMixSTE
from hotkernels.models.eager import HoTMixSTEEager


def windows(seeds: range, seconds: float, frames: int) -> tuple[Tensor, Tensor]:
    """2D poses [W, F, 17, 2] in [-1, 1] and 3D poses [W, F, 17, 3] relative to the hip, of one motion per seed."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for seed in seeds:
        motion = generate_motion(seed, seconds)
        xy = torch.from_numpy(normalise(motion.keypoints_2d, *motion.image_size)).float()
        xyz = torch.from_numpy(motion.positions_3d - motion.positions_3d[:, :1]).float()
        for poses, into in ((xy, inputs), (xyz, targets)):
            into.append(poses.unfold(0, frames, frames // 3).movedim(-1, 1))
    return torch.cat(inputs), torch.cat(targets)


def mpjpe(poses: Tensor, target: Tensor) -> Tensor:
    """Mean distance per joint."""
    return (poses - target).norm(dim=-1).mean()


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], seed: int, steps: int, batch: int
) -> tuple[list[float], float]:
    """The loss of every step, and the seconds that all took."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    losses = []
    start = time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(len(data[0]), (batch,))
        loss = mpjpe(model(data[0][chosen]), data[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


@torch.no_grad()
def evaluate(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """MPJPE in mm."""
    torch.manual_seed(0)
    model.eval()
    # Of all windows: the mean of each batch's mean would favour those of the last one, which may be few.
    poses = torch.cat([model(x) for x in data[0].split(16)])
    return 1000 * float(mpjpe(poses, data[1]))


def smooth(losses: list[float], width: int = 20) -> Tensor:
    """Running mean."""
    return torch.tensor(losses).unfold(0, min(width, len(losses)), 1).mean(-1)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate both models for every seed."""
    data = windows(range(args.motions), args.seconds, args.frames)
    unseen = windows(range(1000, 1000 + max(1, args.motions // 4)), args.seconds, args.frames)
    options: dict[str, Any] = {
        "frames": args.frames, "token_num": args.frames // 3, "channels": args.channels, "depth": args.depth,
        "layer_index": 1,
    }  # fmt: skip
    runs = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        eager = HoTMixSTEEager(**options)
        ours = HoTMixSTE(**options, select="cluster_random")
        ours.load_state_dict(eager.state_dict())
        run: dict[str, Any] = {"seed": seed}
        models = [("eager", eager), ("ours", ours)]
        for name, model in reversed(models) if seed % 2 else models:  # so that neither always comes first
            losses, seconds = train(model, data, seed, args.steps, args.batch)
            run[name] = {"losses": losses, "seconds": seconds, "mpjpe_mm": evaluate(model, unseen)}
        a, b = (smooth(run[name]["losses"]) for name in ("eager", "ours"))
        run["largest_gap_percent"] = 100 * float(((a - b).abs() / a).max())
        runs.append(run)
        eager_mm, ours_mm = run["eager"]["mpjpe_mm"], run["ours"]["mpjpe_mm"]
        print(
            f"| {seed} | {eager_mm:.2f} | {ours_mm:.2f} | {ours_mm - eager_mm:+.2f} | {run['largest_gap_percent']:.2f} "
            f"| {run['eager']['seconds']:.0f} | {run['ours']['seconds']:.0f} |",
            flush=True,
        )
    return {"options": options, "steps": args.steps, "batch": args.batch, "windows": len(data[0]), "runs": runs}


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """The loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, run in enumerate(runs):
        for name, style in (("eager", "-"), ("ours", "--")):
            label = f"seed {run['seed']}, {name}: {run[name]['mpjpe_mm']:.1f} mm unseen"
            axes.plot(smooth([1000 * loss for loss in run[name]["losses"]]), style, color=f"C{i}", label=label)
    axes.set(xlabel="step", ylabel="training MPJPE in mm, running mean of 20", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run, print, save."""
    parser = argparse.ArgumentParser(prog="python -m bench.convergence", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="pairs of trainings (%(default)s)")
    add("--steps", type=int, default=300, help="of each training (%(default)s)")
    add("--batch", type=int, default=4, help="windows per step (%(default)s)")
    add("--frames", type=int, default=81, help="per window, of which a third is kept (%(default)s)")
    add("--channels", type=int, default=64, help="of the model (%(default)s)")
    add("--depth", type=int, default=4, help="its pairs of blocks (%(default)s)")
    add("--motions", type=int, default=12, help="to train on (%(default)s); a quarter as many are held out")
    add("--seconds", type=float, default=20.0, help="of each (%(default)s)")
    add("--out", type=Path, default=Path("convergence_out"), metavar="DIR", help="for curves and losses (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"HoT-MixSTE, {args.frames} frames, {args.frames // 3} kept, {args.channels} channels, depth {args.depth}, "
          f"{args.steps} steps of {args.batch}\n")  # fmt: skip
    print("| seed | eager mm | ours mm | difference | largest gap of the curves % | eager s | ours s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    result = {"machine": header()} | compare(args)
    errors = {name: [run[name]["mpjpe_mm"] for run in result["runs"]] for name in ("eager", "ours")}
    if args.seeds > 1:
        for name, values in errors.items():
            print(f"{name}: {statistics.mean(values):.2f} mm, spread between seeds {statistics.stdev(values):.2f}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "convergence.json").write_text(json.dumps(result) + "\n")
    try:
        draw(args.out / "convergence.png", result["runs"])
    except ImportError as error:
        print(f"no picture: {error} (pip install 'hotkernels[plot]')")
    return result


if __name__ == "__main__":
    main()
