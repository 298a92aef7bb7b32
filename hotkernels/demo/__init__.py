"""The main job on real input: keep 81 of 243 frames of a motion by density peaks, and bring the others back.

Runs hotkernels beside the published eager code on the same input and noise, and reports what each chose and cost; then
HoT's hourglass, which brings frames back by attention, from the published modules and from ours with the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..backends import choose, instruction_set
from ..doctor import unfused
from ..errors import check_int, count, fail
from .frames import (
    CHOOSERS,
    CHUNK,
    RANDOM_DRAWS,
    Prepared,
    chosen_by_eager,
    chosen_by_hotkernels,
    definition,
    draw,
    judge,
    mean_choice,
    prepare,
    spread,
)
from .hourglass import compare
from .measure import Progress, peaks, times
from .motion import Keypoints, generate_motion, load_keypoints
from .report import Result, report

_HOURGLASS_WINDOWS = 2
"""As many as HoT evaluates at a time: a sequence and its mirror image. All of them would take a minute."""


def run(keypoints: Keypoints, args: argparse.Namespace) -> tuple[Result, Prepared, dict[str, list[Tensor]], Tensor]:
    """The whole demo but the printing: the result, the input as used, the kept frames per way, and the scores."""
    current = torch.get_num_threads()
    counts = [1] if current == 1 else [1, current]
    progress = Progress(-(-len(keypoints.xy) // CHUNK) + args.rounds * (len(counts) + 1) + 4)
    with torch.inference_mode():
        p = prepare(keypoints, args, progress.tick)
        B, F, C = p.x.shape
        generator = torch.Generator().manual_seed(args.seed)
        noise = torch.rand(B, F, generator=generator) * 1e-6
        call = (p.x, p.valid, p.keep, p.k, noise)

        chosen = {who: function(*call) for who, function in CHOOSERS.items()}
        chosen["uniform"] = [spread(there, p.keep) for there in p.valid]
        draws = [[draw(there, p.keep, generator) for there in p.valid] for _ in range(RANDOM_DRAWS)]
        exact = definition(p, noise)
        progress.tick()

        choices = {who: judge(p, exact, kept) for who, kept in chosen.items()}
        choices["random"] = mean_choice([judge(p, exact, kept) for kept in draws])
        shared = sum(int(torch.isin(a, b).sum()) for a, b in zip(chosen["hotkernels"], chosen["eager"], strict=True))
        progress.tick()

        choosing = (lambda: chosen_by_eager(*call), lambda: chosen_by_hotkernels(*call))
        times_ms = {n: times({"choose": choosing}, n, args.rounds, progress.tick)["choose"] for n in counts}
        memory_mib = peaks(choosing)
        progress.tick()

        full = [i for i, kept in enumerate(chosen["hotkernels"]) if len(kept) == p.keep][:_HOURGLASS_WINDOWS]
        hourglass = None
        if full:
            index = torch.stack([chosen["hotkernels"][i] for i in full])
            hourglass = compare(p.joint_tokens(full), index, p.k, args.seed, args.rounds, progress.tick)
    progress.close()
    result = Result(
        source=keypoints.source,
        unit=p.unit,
        skeleton_height=p.height,
        frames=len(p.xy),
        missing_frames=int(np.isnan(p.xy).any((1, 2)).sum()),
        windows=B,
        window=F,
        keep=p.keep,
        k=p.k,
        channels=C,
        seed=args.seed,
        backend=choose("dpc_knn", p.x, None),
        instruction_set=instruction_set(),
        choices=choices,
        identical=shared / max(1, sum(len(kept) for kept in chosen["hotkernels"])),
        times_ms=times_ms,
        memory_mib=memory_mib,
        hourglass=hourglass,
        notes=[*p.notes, *filter(None, [unfused()])],
        versions={"hotkernels": __version__, "torch": torch.__version__, "numpy": np.__version__},
    )
    return result, p, chosen, exact.score


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hotkernels demo",
        description="Keep the frames of a motion that stand for all of it, bring the others back, and say how well; "
        "then the same by attention, published code and hotkernels side by side.",
    )
    add = parser.add_argument
    add("--keypoints", metavar="FILE.npz", help="2D keypoints [T, 17, 2] under keypoints_2d or positions_2d, in "
        "Human3.6M's joint order, NaN where a joint is missing; without it, a generated motion")  # fmt: skip
    add("--allow-pickle", action="store_true", help="also read VideoPose3D's pickled {subject: {action: [cameras]}}. "
        "Unpickling runs code from the file: only for files that you trust")  # fmt: skip
    add("--sequence", metavar="SUBJECT/ACTION/CAMERA", help="which sequence of a pickled file (default: the first)")
    add("--width", type=count, help="of the image in pixels (default: the file's image_size, or 1000)")
    add("--height", type=count, help="of the image in pixels (default: the file's image_size, or 1000)")
    add("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="for demo.png and demo.json (%(default)s)")
    add("--seed", type=int, default=0, help="of the weights, the noise and the generated motion (%(default)s)")
    add("--seconds", type=float, default=20.0, help="of generated motion, at 50 Hz (%(default)s)")
    add("--frames", type=count, default=243, help="per window (%(default)s)")
    add("--keep", type=count, default=81, help="frames kept of each window (%(default)s)")
    add("-k", type=count, default=2, help="nearest neighbours in the density, itself included (%(default)s)")
    add("--channels", type=count, default=512, help="of a token, a multiple of 8 (%(default)s)")
    add("--rounds", type=int, default=7, help="timed runs of each, at least 2 (%(default)s)")
    args = parser.parse_args(argv)
    check_int("demo", "--keep", args.keep, 1, args.frames, "--frames = ")
    check_int("demo", "-k", args.k, 1, args.frames, "--frames = ")
    check_int("demo", "--seed", args.seed, 0, 2**63 - 1)
    check_int("demo", "--rounds", args.rounds, 2, None)
    if args.channels % 8:
        fail("demo", "--channels", "a multiple of 8", args.channels)
    if args.sequence is not None and args.keypoints is None:
        fail("demo", "--sequence", "of a file of --keypoints", repr(args.sequence))
    if not 0.1 <= args.seconds <= 3600:
        fail("demo", "--seconds", "in [0.1, 3600]", args.seconds)
    return args


def load(args: argparse.Namespace) -> Keypoints:
    """The keypoints of the command line: from its file, or generated."""
    if args.keypoints is not None:
        return load_keypoints(args.keypoints, allow_pickle=args.allow_pickle, sequence=args.sequence)
    motion = generate_motion(args.seed, args.seconds)
    name = f"a generated motion (seed {args.seed}: walk, turn, sit down, gesture, get up)"
    return Keypoints(motion.keypoints_2d, name, motion.image_size, motion.fps)


def main(argv: Sequence[str]) -> int:
    """Run the demo; 0, or 2 with one sentence on stderr for an input that does not fit."""
    try:
        args = parse(argv)
        keypoints = load(args)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail("demo", "--out", "a folder that can be written", f"{args.out} ({error.strerror})")
        result, prepared, chosen, score = run(keypoints, args)
    except ValueError as error:
        # Ours are of the one form and need no traceback; any other is a defect and shows where it is.
        if not str(error).startswith("demo: "):
            raise
        print(error, file=sys.stderr)
        return 2
    print(report(result))
    (args.out / "demo.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    saved = [str(args.out / "demo.json")]
    try:
        from .picture import draw_choice
    except ImportError as error:
        print(f"no picture: {error} (pip install 'hotkernels[plot]')")
    else:
        draw_choice(args.out / "demo.png", result, prepared, chosen, score, keypoints.fps)
        saved.append(str(args.out / "demo.png"))
    print("saved " + " and ".join(saved))
    return 0
