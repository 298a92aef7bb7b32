"""The demo's picture: the kept poses along the time line, the score they were kept for, and what was lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from .frames import Prepared, interpolate
from .motion import PARENTS, Array

if TYPE_CHECKING:
    from .report import Result

_INK, _FAINT, _OURS, _UNIFORM = "#22252b", "#8a8f98", "#c8432b", "#3b6fb6"
_WIDTH, _POSES = 14.0, 3.0  # inches of the time line, and of the row of poses above it


def busiest_window(p: Prepared) -> int:
    """The window in which the body moves most."""
    window = p.x.shape[1]
    steps = [np.abs(np.diff(p.xy[start : start + window], axis=0)) for start in p.starts]
    return int(np.argmax([float(np.nanmean(s)) if np.isfinite(s).any() else 0.0 for s in steps]))


def draw_choice(
    path: Path, r: Result, p: Prepared, chosen: dict[str, list[Tensor]], score: Tensor, fps: float | None
) -> None:
    """Draw the busiest window of a run into a file."""
    which = busiest_window(p)
    first, F = p.starts[which], p.x.shape[1]
    xy = p.xy[first : first + F]
    kept = {who: chosen[who][which].numpy() for who in ("hotkernels", "uniform")}
    if not len(kept["hotkernels"]):
        return
    per_frame = {who: np.linalg.norm(xy - interpolate(xy, k, F), axis=-1).mean(-1) for who, k in kept.items()}
    curve = np.where(p.valid[which].numpy(), score[which].numpy(), np.nan)

    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 11, "axes.edgecolor": _FAINT}):
        figure = Figure(figsize=(_WIDTH + 1.2, 7.4), facecolor="white")
        poses, scores, errors = figure.subplots(3, 1, sharex=True, height_ratios=[_POSES, 1.7, 1.2])
        figure.subplots_adjust(left=0.065, right=0.985, top=0.89, bottom=0.08, hspace=0.2)
        title = f"{len(kept['hotkernels'])} of {F} frames, kept by density peaks"
        figure.text(0.065, 0.955, title, size=17, weight="bold", color=_INK)
        about = f"{r.source}: window {which + 1} of {r.windows}, k = {r.k}, C = {r.channels}"
        figure.text(0.065, 0.918, about, size=11, color=_FAINT)

        _draw_poses(poses, xy, kept["hotkernels"], F)

        frames = np.arange(F)
        scores.set_yscale("log")
        shown = curve[np.isfinite(curve) & (curve > 0)]
        low = shown.min() / 2 if len(shown) else 1e-6
        scores.fill_between(frames, curve, low, color=_INK, alpha=0.07, lw=0)
        scores.plot(frames, curve, color=_INK, lw=0.9, label="every frame")
        scores.plot(kept["hotkernels"], curve[kept["hotkernels"]], "o", ms=4.5, color=_OURS, label="kept")
        scores.set_ylim(low)
        scores.set_ylabel("score", color=_INK)

        for who, colour in (("hotkernels", _OURS), ("uniform", _UNIFORM)):
            label = f"{'dpc_knn' if who == 'hotkernels' else who}, mean {np.nanmean(per_frame[who]):.2g}"
            errors.plot(frames, per_frame[who], color=colour, lw=1.4, label=label)
        errors.set_ylim(0)
        errors.set_ylabel(f"error [{'px' if r.unit == 'pixels' else '1'}]", color=_INK)
        seconds = "" if fps is None else f", {fps:g} per second"
        errors.set_xlabel(f"frame of the window{seconds}", color=_INK)
        for axes in (scores, errors):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=_FAINT)
            axes.yaxis.set_label_coords(-0.042, 0.5)
            axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, ncols=2, borderaxespad=0)
        figure.savefig(path, dpi=130)


def _draw_poses(axes: matplotlib.axes.Axes, xy: Array, kept: np.ndarray, F: int) -> None:
    """All kept poses, each over its frame, faint; and as many of them as stand free of one another, bold."""
    there = xy[~np.isnan(xy).any((1, 2)), :, 1]
    scale = 0.9 * _POSES / np.ptp(there, axis=1).max()  # inches per unit
    frames_per_inch = (F + 4) / _WIDTH
    colours = matplotlib.colormaps["plasma"]
    free_from, first, last = -np.inf, -2.0, F + 1.0
    for frame in kept:
        pose = xy[frame] - xy[frame, 0]
        x = frame + pose[:, 0] * scale * frames_per_inch
        y = (pose[:, 1].max() - pose[:, 1]) * scale
        bold = x.min() >= free_from
        if bold:
            free_from = x.max() + 0.06 * frames_per_inch
            first, last = min(first, x.min() - 1), max(last, x.max() + 1)
        bones = [[(x[j], y[j]), (x[parent], y[parent])] for j, parent in enumerate(PARENTS) if parent >= 0]
        colour = colours(0.85 * frame / F)
        axes.add_collection(
            LineCollection(bones, colors=[colour], lw=2.4 if bold else 0.9, alpha=1 if bold else 0.28, capstyle="round")
        )
        if bold:
            axes.plot(x[10], y[10], "o", ms=6, color=colour)
        axes.plot([frame, frame], [-0.2, -0.08], color=colour, lw=1.4, solid_capstyle="round")
    axes.set_xlim(first, last)
    axes.set_ylim(-0.22, _POSES)
    axes.axis("off")
