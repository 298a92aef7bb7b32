"""Whole models: as published, with operators swapped in, and in native layout.

    python -m bench.models            # HoT-MixSTE on 2 sequences of 243 frames; a few minutes on one core
    python -m bench.models vit        # blocks of a ViT whose attention calls SDPA, as timm's

Answers first, HoT-MixSTE's on the same kept frames; then medians of interleaved runs, each choosing frames itself.
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
from torch.nn import functional as F  # noqa: N812

import hotkernels
from bench.harness import check_out, header
from hotkernels.baselines import AttentionEager
from hotkernels.bench.timing import interleaved, mebibytes, peak_memory
from hotkernels.models import HoTMixSTE
from hotkernels.models.eager import HoTMixSTEEager, MixSTEBlock

OPTIONS: dict[str, Any] = {"frames": 243, "token_num": 81, "layer_index": 3, "channels": 512, "depth": 8}
# Images, tokens, channels, heads of ViT-Ti, -S, -B; and a few tokens, as of a pose.
VIT = ((1, 17, 192, 3), (1, 197, 192, 3), (4, 197, 384, 6), (1, 577, 768, 12))
VIT_BLOCKS = 4


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


def passes(model: nn.Module, x: Tensor, half: bool = False) -> dict[str, Callable[[], Any]]:
    """A forward pass in evaluation, and a training step without the optimizer; under autocast to bfloat16 if `half`."""

    def learn(mode: bool) -> None:
        if model.training != mode:  # walking through all modules would be a part of every call
            model.train(mode)

    def call() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            return model(x)

    @torch.no_grad()
    def forward() -> Tensor:
        learn(False)
        return call()

    def training_step() -> None:
        learn(True)
        model.zero_grad(set_to_none=True)
        call().float().square().mean().backward()

    return {"forward": forward, "training step": training_step}


class SdpaAttention(AttentionEager):
    """Self-attention as timm calls it, by PyTorch's fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each sequence of x [B, N, C]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


def build_vit(channels: int, heads: int) -> dict[str, nn.Module]:
    """Blocks of a ViT with the same parameters: by SDPA, and swapped."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*[MixSTEBlock(channels, heads, 4 * channels, 0.0) for _ in range(VIT_BLOCKS)])
    for block in blocks:
        block.attn = SdpaAttention(channels, heads, qkv_bias=True)
    swapped = copy.deepcopy(blocks)
    hotkernels.swap(swapped)
    return {"sdpa": blocks, "swapped": swapped}


def measure(models: dict[str, nn.Module], x: Tensor, args: argparse.Namespace, label: str = "") -> dict[str, Any]:
    """Print a row per pass, and return them for a file; ratios are to the first model."""
    thunks = {name: passes(model, x) for name, model in models.items()}
    rows: dict[str, Any] = {}
    for which in ("forward", "training step"):
        calls = {name: thunk[which] for name, thunk in thunks.items()}
        times = interleaved(calls, args.seconds, least=args.rounds)
        extra = [peak_memory(call) for call in calls.values()]
        first, *others = medians = [times[name].median for name in calls]
        memory = " / ".join("?" if b is None else f"{mebibytes(b):.0f}" for b in extra)
        cells = [f"{t:.3g}" for t in medians] + [f"{first / t:.2f}x" for t in others] + [memory]
        print(f"| {label}{which} | " + " | ".join(cells) + " |", flush=True)
        rows[which] = {name: asdict(times[name]) | {"extra_bytes": b} for name, b in zip(calls, extra, strict=True)}
        for model in models.values():
            model.zero_grad(set_to_none=True)
    return rows


def print_title(names: list[str]) -> None:
    """The head of a table."""
    columns = ["pass", *(f"{name} s" for name in names), *(f"{names[0]} / {name}" for name in names[1:]), "extra MiB"]
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))


def main(argv: list[str] | None = None) -> int:
    """Run, print, save; 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", choices=("hot-mixste", "vit"), default="hot-mixste")
    parser.add_argument("--batch", type=int, default=2, help="sequences of HoT-MixSTE (%(default)s)")
    parser.add_argument("--channels", type=int, default=OPTIONS["channels"], help="its width (%(default)s)")
    parser.add_argument("--depth", type=int, default=OPTIONS["depth"], help="its pairs of blocks (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each, at least (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each, at least (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where to write all figures (default: nowhere)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    saved: dict[str, Any] = {"machine": header()}
    if args.out:
        check_out(parser, args.out.parent, saved["machine"])
    print("; ".join(f"{name} {value}" for name, value in saved["machine"].items()))
    wrong = _vit(args, saved) if args.model == "vit" else _hot_mixste(args, saved)
    if wrong:
        print(f"WRONG: {wrong}")
        return 1
    if args.out:
        args.out.write_text(json.dumps(saved) + "\n")
    return 0


def _hot_mixste(args: argparse.Namespace, saved: dict[str, Any]) -> str | None:
    options = saved["options"] = OPTIONS | {"channels": args.channels, "depth": args.depth}
    x = torch.rand(args.batch, 243, 17, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    models, saved["swap_s"] = build(options)
    print(f"HoT-MixSTE {list(x.shape)}, {options}; swapping took {saved['swap_s']:.2f} s")
    wrong = check(models, x, options["token_num"])
    if not wrong:
        print_title([*models])
        saved["rows"] = measure(models, x, args)
    return wrong


def _vit(args: argparse.Namespace, saved: dict[str, Any]) -> str | None:
    print(f"{VIT_BLOCKS} blocks of a ViT: images x tokens x channels")
    saved["rows"] = {}
    for images, tokens, channels, heads in VIT:
        models, x = build_vit(channels, heads), torch.randn(images, tokens, channels)
        with torch.no_grad():
            expected, got = (model(x) for model in models.values())
        if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4):
            return f"the swapped blocks differ by {float((got - expected).abs().max()):.2g}"
        if not saved["rows"]:
            print_title([*models])
        label = f"{images}x{tokens}x{channels}"
        saved["rows"][label] = measure(models, x, args, f"{label} ")
    return None


if __name__ == "__main__":
    raise SystemExit(main())
