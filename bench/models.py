"""HoT-MixSTE on 2 sequences of 243 frames: as published, with operators swapped in, and in native layout.

    python -m bench.models            # a few minutes on one core

Answers first, on the same kept frames; then medians of interleaved runs, each choosing frames itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hotkernels
from bench.harness import header
from hotkernels.bench.timing import interleaved, peak_memory
from hotkernels.models import HoTMixSTE
from hotkernels.models.eager import HoTMixSTEEager

OPTIONS: dict[str, Any] = {"frames": 243, "token_num": 81, "layer_index": 3, "channels": 512, "depth": 8}


def build(options: dict[str, Any], device: str = "cpu") -> tuple[dict[str, nn.Module], float]:
    """The three with the same parameters, and the seconds that swapping took."""
    torch.manual_seed(0)
    eager = HoTMixSTEEager(**options).eval().to(device)
    with torch.no_grad():
        for p in (eager.pos_embed_token, eager.x_token, eager.Spatial_pos_embed, eager.Temporal_pos_embed):
            p.normal_(0, 0.02)
    native = HoTMixSTE(**options, select="cluster_random").eval().to(device)
    native.load_state_dict(eager.state_dict())
    swapped = copy.deepcopy(eager)
    start = time.perf_counter()
    hotkernels.swap(swapped)
    return {"eager": eager, "swapped": swapped, "native": native}, time.perf_counter() - start


def check(models: dict[str, nn.Module], x: Tensor, token_num: int) -> str | None:
    """What is wrong with an answer on the same kept frames, or None; float32 rounding through all layers is allowed."""
    index = torch.stack([torch.randperm(x.shape[1])[:token_num].sort().values for _ in x]).to(x.device)
    with torch.no_grad():
        expected = models["eager"](x, index)
        for name, model in models.items():
            gap = float((model(x, index) - expected).abs().max() / expected.abs().max())
            if not gap < 1e-4:
                return f"{name} differs from the published model by {gap:.2g} of the largest coordinate"
    return None


def passes(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """A forward pass in evaluation, and a training step without the optimizer."""

    @torch.no_grad()
    def forward() -> Tensor:
        return model.eval()(x)

    def training_step() -> None:
        model.train().zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    return {"forward": forward, "training step": training_step}


def main(argv: list[str] | None = None) -> int:
    """Run, print, save; 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=2, help="sequences (%(default)s)")
    parser.add_argument("--channels", type=int, default=OPTIONS["channels"])
    parser.add_argument("--depth", type=int, default=OPTIONS["depth"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    options = OPTIONS | {"channels": args.channels, "depth": args.depth}
    x = torch.rand(args.batch, 243, 17, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    models, seconds = build(options)
    about = header()
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    print(f"HoT-MixSTE {list(x.shape)}, {options}; swapping took {seconds:.2f} s")
    wrong = check(models, x, options["token_num"])
    if wrong:
        print(f"WRONG: {wrong}")
        return 1
    thunks = {name: passes(model, x) for name, model in models.items()}
    rows: dict[str, Any] = {}
    print("\n| pass | eager s | swapped s | native s | eager / swapped | eager / native | extra MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for which in ("forward", "training step"):
        calls = {name: thunk[which] for name, thunk in thunks.items()}
        times = interleaved(calls, 0.0, least=args.rounds)
        extra = [peak_memory(call) for call in calls.values()]
        medians = [times[name].median for name in calls]
        megabytes = " / ".join("?" if b is None else f"{b / 2**20:.0f}" for b in extra)
        print(
            f"| {which} | " + " | ".join(f"{t:.2f}" for t in medians) + f" | {medians[0] / medians[1]:.2f}x "
            f"| {medians[0] / medians[2]:.2f}x | {megabytes} |",
            flush=True,
        )
        rows[which] = {name: asdict(times[name]) | {"extra_bytes": b} for name, b in zip(calls, extra, strict=True)}
        for model in models.values():
            model.zero_grad(set_to_none=True)
    if args.out:
        args.out.write_text(json.dumps({"machine": about, "options": options, "swap_s": seconds, "rows": rows}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
