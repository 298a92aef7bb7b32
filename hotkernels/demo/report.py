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
        f"{'kept by':<14}{'error of the motion brought back':>34}{'score':>12}{'best':>9}{'coverage':>11}",
    ]
    titles = {"eager": "eager PyTorch", "random": f"random, {RANDOM_DRAWS} x"}
    for who in ("hotkernels", "eager", "uniform", "random"):
        c = r.choices[who]
        error = f"{c.error:.4g} {r.unit} ({c.error_percent:.2f} %)"
        figures = f"{c.score:>12.6f}{c.best:>9.1%}{c.coverage:>11.6f}"
        lines.append(f"{titles.get(who, who):<14}{error:>34}{figures}")
    ours = r.choices["hotkernels"]
    uniform, drawn = (_than(ours.error, r.choices[who].error) for who in ("uniform", "random"))
    lines += [
        f"  error: mean distance per joint; in % of the skeleton's height, {r.skeleton_height:.4g} {r.unit}",
        "  score: of the kept frames by the float64 definition, geometric mean; best: share of the frames that this",
        "  definition keeps",
        "  coverage: mean distance between the tokens of a frame and of the nearest kept one; less is better",
        f"  error of dpc_knn's choice: {uniform} uniform's, {drawn} random's",
    ]
    if ours.error > r.choices["uniform"].error:
        lines.append("  (interpolating in time rewards even spacing in time; dpc_knn looks at the tokens only)")
    eager = r.choices["eager"]
    lines += [
        f"  hotkernels against eager, same noise: {r.identical:.1%} of the kept frames are the same; "
        f"score {_change(ours.score, eager.score)}, coverage {_change(ours.coverage, eager.coverage)}",
        "  (they differ where densities are closer than float32 tells apart)",
        "",
    ]
    alone = r.times_ms[1]
    for threads, t in r.times_ms.items():
        counted = f"{threads} thread{'s' * (threads > 1)}"
        times = f"eager {t.eager:.2f} ms, hotkernels {t.hotkernels:.2f} ms"
        slower = t.eager > alone.eager and t.hotkernels > alone.hotkernels
        said = "both slower than on 1: too little work or a busy machine" if slower else _ratio(t)
        lines.append(f"time to choose, {counted}, [{r.windows}, {r.window}, {r.channels}]: {times}: {said}")
    lines += [_memory("peak extra memory", r.memory_mib), "", *_hourglass(r.hourglass)]
    return "\n".join(lines)


def _hourglass(h: Comparison | None) -> list[str]:
    if h is None:
        return ["hourglass: not run: no window has as many whole frames as are kept"]
    _, F, J, _ = h.shape
    lines = [
        f"hourglass, {F} -> {h.keep} -> {F} frames of {J} joints by attention: {h.shape}, {h.heads} heads, float32,",
        "  the same untrained weights on both sides; 1 thread",
        f"{'':<14}{'eager':>12}{'hotkernels':>14}",
    ]
    lines += [f"{s:<14}{t.eager:>9.1f} ms{t.hotkernels:>11.1f} ms   {_ratio(t)}" for s, t in h.times_ms.items()]
    return [
        *lines,
        _memory("  peak extra memory of the whole, output included", h.memory_mib),
        f"  largest difference of their outputs, same frames kept: {h.difference:.1e} of the largest output;",
        f"  from float64 (one window): eager {h.float64_error.eager:.1e}, hotkernels {h.float64_error.hotkernels:.1e}",
        "  prune: choose frames, each side by itself, and gather them; attend: between joints, then between kept",
        "  frames, with norms and residuals, without MLPs (the same on both sides: a whole model gains less)",
        "  untrained, it brings back no poses: this shows same answers and cost; errors above are interpolation's",
    ]


def _memory(what: str, m: Pair | None) -> str:
    if m is None:
        return f"{what}: not measured (this system has no /proc/self/clear_refs)"
    return f"{what}: eager {m.eager:.1f} MiB, hotkernels {m.hotkernels:.1f} MiB"


def _ratio(t: Pair) -> str:
    ratio = t.eager / t.hotkernels
    return f"{ratio:.1f}x as fast" if ratio >= 1 else f"{1 / ratio:.1f}x as long"
