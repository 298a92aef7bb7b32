"""All that a run of the demo found, and the same as text."""

from __future__ import annotations

from dataclasses import dataclass, field

from .frames import RANDOM_DRAWS, Choice
from .hourglass import Comparison
from .measure import Pair


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
    times_ms: dict[int, Pair]
    """Of choosing frames in all windows at once, per number of threads."""
    memory_mib: Pair | None
    """Peak memory of that beyond its input, on one thread."""
    hourglass: Comparison | None
    """None where no window has as many whole frames as are kept."""
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def report(r: Result) -> str:
    """The result as text: what choosing costs, what the hourglass costs, then what was chosen."""
    served = f"{r.backend} backend" + (f", {r.instruction_set}" if r.backend == "cpp" else "")
    return "\n".join(
        [
            f"hotkernels demo: {r.source}, {r.frames} frames",
            *(f"  {note}" for note in r.notes),
            "",
            f"choosing {r.keep} frames of {r.window}, {r.windows} window{'s' * (r.windows > 1)} at once: dpc_knn of "
            f"[{r.windows}, {r.window}, {r.channels}], k = {r.k}, {served}",
            *_costs({f"{n} thread{'s' * (n > 1)}": t for n, t in r.times_ms.items()}, r.memory_mib),
            *_threads(r.times_ms),
            "",
            *_hourglass(r.hourglass),
            "",
            *_chosen(r),
        ]
    )


def _costs(times_ms: dict[str, Pair], memory_mib: Pair | None) -> list[str]:
    """A line per call, and one for the memory of the last."""
    rows = [(what, t, "ms", f"   {_ratio(t)}") for what, t in times_ms.items()]
    if memory_mib is not None:
        rows.append(("extra memory", memory_mib, "MiB", ""))
    lines = [f"{what:<14}{p.eager:>10.1f} {u:<3}{p.hotkernels:>12.1f} {u:<3}{said}" for what, p, u, said in rows]
    if memory_mib is None:
        lines.append("extra memory: not measured (this system has no /proc/self/clear_refs)")
    return [f"{'':<14}{'eager':>14}{'hotkernels':>16}", *(line.rstrip() for line in lines)]


def _threads(times_ms: dict[int, Pair]) -> list[str]:
    alone = times_ms[1]
    slower = [n for n, t in times_ms.items() if t.eager > alone.eager and t.hotkernels > alone.hotkernels]
    return [f"  on {n} threads both are slower than on 1: too little work or a busy machine" for n in slower]


def _hourglass(h: Comparison | None) -> list[str]:
    if h is None:
        return ["hourglass: not run: no window has as many whole frames as are kept"]
    _, F, J, _ = h.shape
    return [
        f"hourglass, {F} -> {h.keep} -> {F} frames of {J} joints: {h.shape}, {h.heads} heads, float32, 1 thread",
        *_costs(h.times_ms, h.memory_mib),
        f"  outputs, with the same untrained weights and kept frames, differ by {h.difference:.1e} of the largest;",
        f"  from float64 (one window): eager {h.float64_error.eager:.1e}, hotkernels {h.float64_error.hotkernels:.1e}",
        "  prune: choose frames and gather them; attend: between joints, then between kept frames, without the MLPs",
        "  (the same on both sides: a whole model gains less)",
    ]


def _chosen(r: Result) -> list[str]:
    lines = [
        "what was chosen (untrained tokens)",
        f"{'':<14}{'score':>10}{'best':>9}{'coverage':>11}   error",
    ]
    titles = {"eager": "eager PyTorch", "random": f"random, {RANDOM_DRAWS} x"}
    for who in ("hotkernels", "eager", "uniform", "random"):
        c = r.choices[who]
        error = f"{c.error:.4g} {r.unit} ({c.error_percent:.2f} %)"
        lines.append(f"{titles.get(who, who):<14}{c.score:>10.6f}{c.best:>9.1%}{c.coverage:>11.6f}   {error}")
    ours, eager = r.choices["hotkernels"], r.choices["eager"]
    return [
        *lines,
        f"  eager keeps {r.identical:.1%} of the frames that hotkernels keeps (same noise); where they",
        f"  differ, float32 rounding decided its choice; against eager: score {_change(ours.score, eager.score)}, "
        f"coverage {_change(ours.coverage, eager.coverage)}",
        "  score: of the kept frames by the float64 definition, geometric mean; best: share of the frames that this",
        "  definition keeps; coverage: mean distance from a frame's token to the nearest kept one, less is better",
        "  error: per joint, and in % of the skeleton's height, of the motion interpolated from the kept frames; it",
        "  rewards even spacing in time, of which dpc_knn knows nothing",
        "  tokens: MixSTE's first layer with random weights, mean over joints, centred and scaled to a variance of 1",
    ]


def _change(ours: float, other: float) -> str:
    return f"{(ours / other - 1 if other else 0.0):+.1%}"


def _ratio(t: Pair) -> str:
    ratio = t.eager / t.hotkernels
    return f"{ratio:.1f}x as fast" if ratio >= 1 else f"{1 / ratio:.1f}x as long"
