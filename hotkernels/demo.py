"""The main job on real input: keep 81 of 243 frames of a motion by density peaks, and bring the others back.

Runs hotkernels beside the published eager code on the same input and noise, and reports what each chose and cost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from . import __version__
from .backends import choose, instruction_set
from .baselines import cluster_dpc_knn_eager
from .errors import check_int, fail
from .motion import (
    PARENTS,
    Array,
    Keypoints,
    generate_motion,
    load_keypoints,
    looks_like_pixels,
    normalise,
)
from .ops.dpc_knn import dpc_knn

_RANDOM_DRAWS = 5


# ---- What is reported


@dataclass
class Choice:
    """How one way to choose frames did, over all windows."""

    error: float
    """Mean distance per joint between the motion and the one brought back, in the input's unit."""
    error_percent: float
    """The same in percent of the skeleton's height."""
    score: float
    """Geometric mean of the kept frames' density-peak score, in float64."""
    total_score: float
    """Mean over windows of the sum of those scores. One frame, the densest, can hold a third of it."""
    coverage: float
    """Mean distance from a frame to the nearest kept one, between embeddings, in float64."""


@dataclass
class Timing:
    """Medians of interleaved runs over all windows at once, in milliseconds."""

    threads: int
    eager_ms: float
    hotkernels_ms: float


@dataclass
class Memory:
    """Peak resident memory beyond the input of one call, each in a process of its own, in MiB."""

    eager_mib: float
    hotkernels_mib: float


@dataclass
class Result:
    """All that a run reports; demo.json is this."""

    source: str
    unit: str
    skeleton_height: float
    frames: int
    missing_frames: int
    windows: int
    window: int
    keep: int
    k: int
    channels: int
    seed: int
    backend: str
    instruction_set: str | None
    choices: dict[str, Choice]
    identical: float
    """Share of the frames kept by hotkernels that the eager reference keeps too."""
    timings: list[Timing]
    memory: Memory | None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


# ---- From keypoints to one token per frame


class FrameEmbedding(nn.Module):
    """Pose to tokens as MixSTE's first layer does it, with seeded weights: [T, J, 2] -> [T, J, C].

    Linear(2, C) per joint, an embedding of which joint it is, one spatial block (attention between the joints of a
    frame, 8 heads, MLP of 2 C) and a LayerNorm. Untrained; without the block, the mean over joints would only know
    where the body is, not its pose.
    """

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(2, channels)
            self.joint = nn.Parameter(0.02 * torch.randn(1, len(PARENTS), channels))
            self.block = nn.TransformerEncoderLayer(
                channels, 8, 2 * channels, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
            )
            self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.eval().requires_grad_(False)

    def forward(self, xy: Tensor) -> Tensor:
        """Embed [T, J, 2] in [-1, 1]."""
        return self.norm(self.block(self.embed(xy) + self.joint))


def embed_frames(xy: Tensor, channels: int, seed: int, tick: Callable[[], None]) -> Tensor:
    """One token per frame, the mean over its joints as HoT takes it: [T, J, 2] -> [T, C]."""
    embedding, pooled = FrameEmbedding(channels, seed), []
    for chunk in xy.split(64):
        pooled.append(embedding(chunk).mean(1))
        tick()
    return torch.cat(pooled)


def standardise(tokens: Tensor, valid: Tensor) -> Tensor:
    """Centre tokens [T, C] in time, and scale them by one number to a variance of 1 over time and channels.

    Untrained features hardly vary: neighbouring frames by less than the published noise of 1e-6 in the density, and
    by so much less than their mean that the published code would choose among its own rounding errors.
    """
    centred = tokens - tokens[valid].mean(0)
    return centred / centred[valid].square().mean().sqrt().clamp(min=1e-12)


def window_starts(frames: int, window: int) -> list[int]:
    """Where the windows begin; the last one ends with the sequence and may overlap the one before."""
    return [*range(0, frames - window, window), frames - window]


# ---- Choosing frames, and bringing the others back


def spread(valid: Tensor, keep: int) -> Tensor:
    """Uniform choice: `keep` of the valid frames of one window, evenly spaced from the first to the last. [<= keep]."""
    there = valid.nonzero()[:, 0]
    return there[torch.linspace(0, len(there) - 1, min(keep, len(there))).round().long()]


def draw(valid: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """Random choice: `keep` of the valid frames of one window, ascending. [<= keep]."""
    there = valid.nonzero()[:, 0]
    return there[torch.randperm(len(there), generator=generator)[:keep]].sort().values


def chosen_by_eager(x: Tensor, valid: Tensor, keep: int, k: int, noise: Tensor) -> list[Tensor]:
    """The published code's choice per window, ascending, without the masked frames it falls back to."""
    mask = None if bool(valid.all()) else valid.float()
    index = cluster_dpc_knn_eager(x, keep, k, noise, mask)[0].sort().values
    return [row[there[row]] for row, there in zip(index, valid, strict=True)]


def chosen_by_hotkernels(x: Tensor, valid: Tensor, keep: int, k: int, noise: Tensor) -> list[Tensor]:
    """The choice of `hotkernels.dpc_knn` per window, ascending."""
    index = dpc_knn(x, keep, k, mask=valid, noise=noise, ordered=True).index
    return [row[row >= 0] for row in index]


def interpolate(xy: Array, kept: Array, frames: int) -> Array:
    """Bring `frames` poses back from the kept ones: linear in time, constant before the first and after the last."""
    flat = xy[kept].reshape(len(kept), -1)
    time = np.arange(frames)
    return np.stack([np.interp(time, kept, column) for column in flat.T], 1).reshape(frames, *xy.shape[1:])


def bring_back(xy: Array, chosen: list[Tensor], starts: list[int], window: int) -> Array:
    """The whole motion [T, J, 2] from the frames kept in each window; NaN where a window had none to keep."""
    out = np.full_like(xy, np.nan)
    done = 0
    for start, kept in zip(starts, chosen, strict=True):
        part = slice(start, start + window)
        if len(kept):
            back = interpolate(xy[part], kept.numpy(), window)
            out[done : start + window] = back[done - start :]
        done = start + window
    return out


def joint_error(xy: Array, back: Array) -> float:
    """Mean distance per joint over the frames that the input has."""
    distance = np.linalg.norm(xy - back, axis=-1)
    return float(np.nanmean(distance))


def judge(
    xy: Array, height: float, x: Tensor, score: Tensor, valid: Tensor, chosen: list[Tensor], starts: list[int]
) -> Choice:
    """Measure one choice of frames. `score` [B, F] float64 is the definition's score of every frame."""
    window = x.shape[1]
    error = joint_error(xy, bring_back(xy, chosen, starts, window))
    distances = [
        torch.cdist(tokens[there].double(), tokens[kept].double(), compute_mode="donot_use_mm_for_euclid_dist")
        for tokens, there, kept in zip(x, valid, chosen, strict=True)
        if len(kept)
    ]
    nearest = torch.cat([d.amin(1) for d in distances]) / x.shape[2] ** 0.5
    scores = [row[kept] for row, kept in zip(score, chosen, strict=True) if len(kept)]
    return Choice(
        error=error,
        error_percent=100 * error / height,
        score=float(torch.cat(scores).log().mean().exp()),
        total_score=float(np.mean([float(kept.sum()) for kept in scores])),
        coverage=float(nearest.mean()),
    )


def mean_choice(choices: Sequence[Choice]) -> Choice:
    """The mean of several draws."""
    return Choice(**{name: float(np.mean([getattr(c, name) for c in choices])) for name in asdict(choices[0])})


# ---- What it costs


def time_pair(eager: Callable[[], object], ours: Callable[[], object], threads: int, rounds: int, tick: Any) -> Timing:
    """Median times of two functions, run in turns so that a busy moment hits both."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times: tuple[list[float], list[float]] = ([], [])
    try:
        eager(), ours()
        for _ in range(rounds):
            for function, spent in zip((eager, ours), times, strict=True):
                start = time.perf_counter()
                function()
                spent.append(1e3 * (time.perf_counter() - start))
            tick()
    finally:
        torch.set_num_threads(before)
    return Timing(threads, float(np.median(times[0])), float(np.median(times[1])))


_CHOOSERS = {"eager": chosen_by_eager, "hotkernels": chosen_by_hotkernels}


def _resident(what: str) -> float:
    """VmHWM (peak) or VmRSS (current) resident memory of this process in MiB. Raises where there is no /proc."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"no {what} in /proc/self/status")
    return int(found[1]) / 1024


def _peak(who: str, x: np.ndarray, valid: np.ndarray, keep: int, k: int, noise: np.ndarray) -> float | None:
    """Peak resident memory in MiB that one call adds, None if this system does not tell. For a fresh process."""
    torch.set_num_threads(1)
    choose_frames = _CHOOSERS[who]
    tokens, there, added = torch.from_numpy(x), torch.from_numpy(valid), torch.from_numpy(noise)
    # What a first call loads (kernels, BLAS, thread pools) is no part of the memory that a call needs.
    choose_frames(tokens[:1, :8].clone(), there[:1, :8], 1, 1, added[:1, :8])
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the current size
        before = _resident("VmRSS")
        choose_frames(tokens, there, keep, k, added)
        return max(0.0, _resident("VmHWM") - before)
    except OSError:
        return None


def measure_memory(x: Tensor, valid: Tensor, keep: int, k: int, noise: Tensor) -> Memory | None:
    """Peak memory of both, each in a fresh process, where no earlier call has left memory to be used again."""
    call = (x.numpy(), valid.numpy(), keep, k, noise.numpy())
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        eager, ours = (pool.apply(_peak, (who, *call)) for who in _CHOOSERS)
    return None if eager is None or ours is None else Memory(eager, ours)


class Progress:
    """A bar on stderr; only on a terminal, and only once the work has taken two seconds."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done, self.shown = total, 0, False
        self.stream = sys.stderr if stream is None else stream
        self.start = time.monotonic()

    def tick(self) -> None:
        """One step is done."""
        self.done += 1
        if self.stream.isatty() and time.monotonic() - self.start > 2:
            self.shown = True
            filled = min(30, 30 * self.done // self.total)
            self.stream.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] {min(100, 100 * self.done // self.total)} %")
            self.stream.flush()

    def close(self) -> None:
        """Wipe the bar."""
        if self.shown:
            self.stream.write("\r" + " " * 40 + "\r")
            self.stream.flush()


# ---- The run


@dataclass
class Prepared:
    """The input, cut into windows: what the choosers see and what the report needs."""

    xy: Array
    """[T, 17, 2] in the input's unit, NaN in every joint of a missing frame."""
    unit: str
    height: float
    starts: list[int]
    keep: int
    k: int
    x: Tensor
    """[B, F, C] float32."""
    valid: Tensor
    """[B, F] bool."""
    notes: list[str]


def prepare(keypoints: Keypoints, args: argparse.Namespace, tick: Callable[[], None]) -> Prepared:
    """Normalise, embed and cut into windows."""
    xy, notes = keypoints.xy.copy(), []
    present = ~np.isnan(xy).any((1, 2))
    if present.sum() < 2:
        fail("demo", "--keypoints", "a sequence with at least 2 frames that have all 17 joints", int(present.sum()))
    xy[~present] = np.nan
    height = float(np.median(np.ptp(xy[present][..., 1], axis=1)))
    if height == 0:
        fail("demo", "--keypoints", "poses with a height", "joints that all have the same y")
    unit, scaled = "normalised units", xy
    if looks_like_pixels(xy):
        known, unit = keypoints.image_size, "pixels"
        width = args.width or (known[0] if known else 1000)
        height = args.height or (known[1] if known else 1000)
        where = "as given" if args.width or args.height else "from the file" if known else "assumed: see --width"
        notes.append(f"pixel coordinates, normalised for an image of {width} x {height} ({where})")
        scaled = normalise(xy, width, height)
    if not present.all():
        notes.append(f"{(~present).sum()} frames lack a joint: masked, never kept, not counted in errors")

    T = len(xy)
    window, keep, k = args.frames, args.keep, args.k
    if window > T:
        window, keep = T, max(1, round(keep * T / window))
        k = min(k, window)
        notes.append(f"{T} frames are fewer than a window of {args.frames}: one window of {T}, keeping {keep}")
    starts = window_starts(T, window)
    tokens = embed_frames(torch.from_numpy(np.nan_to_num(scaled)).float(), args.channels, args.seed, tick)
    valid = torch.from_numpy(present)
    tokens = standardise(tokens, valid)
    cut = [slice(start, start + window) for start in starts]
    return Prepared(
        xy=xy,
        unit=unit,
        height=height,
        starts=starts,
        keep=keep,
        k=k,
        x=torch.stack([tokens[part] for part in cut]),
        valid=torch.stack([valid[part] for part in cut]),
        notes=notes,
    )


def definition_score(p: Prepared, noise: Tensor) -> Tensor:
    """The score [B, F] of every frame by the definition in float64."""
    peaks = dpc_knn(p.x.double(), p.keep, p.k, mask=p.valid, noise=noise, assign=False, backend="torch")
    return peaks.score.double()


def run(keypoints: Keypoints, args: argparse.Namespace) -> tuple[Result, Prepared, dict[str, list[Tensor]], Tensor]:
    """The whole demo but the printing: the result, the input as used, the kept frames per way, and the scores."""
    current = torch.get_num_threads()
    counts = [1] if current == 1 else [1, current]
    progress = Progress(-(-len(keypoints.xy) // 64) + args.rounds * len(counts) + 3)
    with torch.inference_mode():
        p = prepare(keypoints, args, progress.tick)
        B, F, C = p.x.shape
        generator = torch.Generator().manual_seed(args.seed)
        noise = torch.rand(B, F, generator=generator) * 1e-6
        call = (p.x, p.valid, p.keep, p.k, noise)

        chosen = {who: function(*call) for who, function in _CHOOSERS.items()}
        chosen["uniform"] = [spread(there, p.keep) for there in p.valid]
        draws = [[draw(there, p.keep, generator) for there in p.valid] for _ in range(_RANDOM_DRAWS)]
        score = definition_score(p, noise)
        progress.tick()

        def measured(kept: list[Tensor]) -> Choice:
            return judge(p.xy, p.height, p.x, score, p.valid, kept, p.starts)

        choices = {who: measured(kept) for who, kept in chosen.items()}
        choices["random"] = mean_choice([measured(kept) for kept in draws])
        shared = sum(int(torch.isin(a, b).sum()) for a, b in zip(chosen["hotkernels"], chosen["eager"], strict=True))
        progress.tick()

        eager, ours = (lambda f=f: f(*call) for f in _CHOOSERS.values())
        timings = [time_pair(eager, ours, threads, args.rounds, progress.tick) for threads in counts]
    memory = measure_memory(p.x, p.valid, p.keep, p.k, noise)
    progress.tick()
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
        timings=timings,
        memory=memory,
        notes=p.notes,
        versions={"hotkernels": __version__, "torch": torch.__version__, "numpy": np.__version__},
    )
    return result, p, chosen, score


# ---- Telling


def _than(ours: float, other: float) -> str:
    """`12% less than`, `7.5 times`."""
    ratio = ours / other if other else 1.0
    if ratio >= 2:
        return f"{ratio:.1f} times"
    if abs(ratio - 1) < 0.005:
        return "the same as"
    return f"{abs(ratio - 1):.0%} {'less' if ratio < 1 else 'more'} than"


def _change(ours: float, other: float) -> str:
    return f"{(ours / other - 1 if other else 0.0):+.1%}"


def report(r: Result) -> str:
    """The result as text."""
    served = f"{r.backend} backend" + (f", {r.instruction_set}" if r.backend == "cpp" else "")
    lines = [
        f"hotkernels demo: {r.source}, {r.frames} frames",
        *(f"  {note}" for note in r.notes),
        f"  tokens: MixSTE's first layer, untrained (Linear(2, {r.channels}) per joint + joint embedding, one spatial",
        "  block, LayerNorm; mean over joints), centred and scaled to a variance of 1 over time",
        f"  {r.windows} window{'s' * (r.windows > 1)} of {r.window} frames; {r.keep} kept in each by dpc_knn "
        f"(k = {r.k}, {served}); the rest interpolated",
        "",
        f"{'kept by':<14}{'error of the motion brought back':>34}{'score':>12}{'total score':>13}{'coverage':>12}",
    ]
    titles = {"eager": "eager PyTorch", "random": f"random, {_RANDOM_DRAWS} x"}
    for who in ("hotkernels", "eager", "uniform", "random"):
        c = r.choices[who]
        error = f"{c.error:.4g} {r.unit} ({c.error_percent:.2f} %)"
        lines.append(f"{titles.get(who, who):<14}{error:>34}{c.score:>12.6f}{c.total_score:>13.4f}{c.coverage:>12.6f}")
    ours = r.choices["hotkernels"]
    uniform, drawn = (_than(ours.error, r.choices[who].error) for who in ("uniform", "random"))
    lines += [
        f"  error: mean distance per joint; in % of the skeleton's height, {r.skeleton_height:.4g} {r.unit}",
        "  score: of the kept frames by the float64 definition, geometric mean: what dpc_knn maximises; total: their",
        "  sum per window, where the one densest frame weighs most",
        "  coverage: mean distance between the tokens of a frame and of the nearest kept one; less is better",
        f"  error of dpc_knn's choice: {uniform} uniform's, {drawn} random's",
    ]
    if ours.error > r.choices["uniform"].error:
        lines.append("  (interpolating in time rewards even spacing in time; dpc_knn looks at the tokens only)")
    eager = r.choices["eager"]
    lines += [
        f"  hotkernels against eager, same noise: {r.identical:.1%} of the kept frames are the same; "
        f"score {_change(ours.score, eager.score)}, total {_change(ours.total_score, eager.total_score)}, "
        f"coverage {_change(ours.coverage, eager.coverage)}",
        "",
    ]
    for t in r.timings:
        threads = f"{t.threads} thread{'s' * (t.threads > 1)}"
        times = f"eager {t.eager_ms:.2f} ms, hotkernels {t.hotkernels_ms:.2f} ms"
        lines.append(f"time, {threads}, [{r.windows}, {r.window}, {r.channels}]: {times}: {_ratio(t)}")
    if r.memory is None:
        lines.append("peak extra memory: not measured (this system has no /proc/self/clear_refs)")
    else:
        m = r.memory
        lines.append(f"peak extra memory: eager {m.eager_mib:.1f} MiB, hotkernels {m.hotkernels_mib:.1f} MiB")
    return "\n".join(lines)


def _ratio(t: Timing) -> str:
    ratio = t.eager_ms / t.hotkernels_ms
    return f"{ratio:.1f}x as fast" if ratio >= 1 else f"{1 / ratio:.1f}x as long"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hotkernels demo",
        description="Keep the frames of a motion that stand for all of it, bring the others back, and say how well.",
    )
    add = parser.add_argument
    add("--keypoints", metavar="FILE.npz", help="2D keypoints [T, 17, 2] under keypoints_2d or positions_2d, in "
        "Human3.6M's joint order, NaN where a joint is missing; without it, a generated motion")  # fmt: skip
    add("--allow-pickle", action="store_true", help="also read VideoPose3D's pickled {subject: {action: [cameras]}}. "
        "Unpickling runs code from the file: only for files that you trust")  # fmt: skip
    add("--sequence", metavar="SUBJECT/ACTION/CAMERA", help="which sequence of a pickled file (default: the first)")
    add("--width", type=_positive, help="of the image in pixels (default: the file's image_size, or 1000)")
    add("--height", type=_positive, help="of the image in pixels (default: the file's image_size, or 1000)")
    add("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="for demo.png and demo.json (%(default)s)")
    add("--seed", type=int, default=0, help="of the weights, the noise and the generated motion (%(default)s)")
    add("--seconds", type=float, default=20.0, help="of generated motion, at 50 Hz (%(default)s)")
    add("--frames", type=_positive, default=243, help="per window (%(default)s)")
    add("--keep", type=_positive, default=81, help="frames kept of each window (%(default)s)")
    add("-k", type=_positive, default=2, help="nearest neighbours in the density, itself included (%(default)s)")
    add("--channels", type=_positive, default=512, help="of a token, a multiple of 8 (%(default)s)")
    add("--rounds", type=_positive, default=15, help="timed runs of each (%(default)s)")
    args = parser.parse_args(argv)
    check_int("demo", "--keep", args.keep, 1, args.frames, "--frames = ")
    check_int("demo", "-k", args.k, 1, args.frames, "--frames = ")
    check_int("demo", "--seed", args.seed, 0, 2**63 - 1)
    if args.channels % 8:
        fail("demo", "--channels", "a multiple of 8", args.channels)
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
