"""From keypoints to tokens, which frames to keep of them, and how well the others come back from those."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..baselines import cluster_dpc_knn_eager
from ..errors import fail
from ..models import strategies
from ..ops.dpc_knn import DensityPeaks, dpc_knn
from .motion import PARENTS, Array, Keypoints, looks_like_pixels, normalise

CHUNK = 64
"""Frames embedded at a time."""
RANDOM_DRAWS = 5


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


def embed_frames(embedding: FrameEmbedding, xy: Tensor, tick: Callable[[], None]) -> Tensor:
    """One token per frame, the mean over its joints as HoT takes it: [T, J, 2] -> [T, C]."""
    pooled = []
    for chunk in xy.split(CHUNK):
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
    poses: Tensor
    """[T, 17, 2] float32, normalised; 0 where a joint is missing."""
    embedding: FrameEmbedding
    notes: list[str]

    def joint_tokens(self, windows: Sequence[int]) -> Tensor:
        """The tokens of every joint [B, F, J, C] in some windows, as the embedding gives them."""
        F = self.x.shape[1]
        return torch.stack(
            [self.embedding(self.poses[start : start + F]) for start in (self.starts[i] for i in windows)]
        )


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
        image_width = args.width or (known[0] if known else 1000)
        image_height = args.height or (known[1] if known else 1000)
        where = "as given" if args.width or args.height else "from the file" if known else "assumed: see --width"
        notes.append(f"pixel coordinates, normalised for an image of {image_width} x {image_height} ({where})")
        scaled = normalise(xy, image_width, image_height)
    if not present.all():
        notes.append(f"{(~present).sum()} frames lack a joint: masked, never kept, not counted in errors")

    T = len(xy)
    window, keep, k = args.frames, args.keep, args.k
    if window > T:
        window, keep = T, max(1, round(keep * T / window))
        k = min(k, window)
        notes.append(f"{T} frames are fewer than a window of {args.frames}: one window of {T}, keeping {keep}")
    starts = window_starts(T, window)
    poses = torch.from_numpy(np.nan_to_num(scaled)).float()
    embedding = FrameEmbedding(args.channels, args.seed)
    valid = torch.from_numpy(present)
    tokens = standardise(embed_frames(embedding, poses, tick), valid)
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
        poses=poses,
        embedding=embedding,
        notes=notes,
    )


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


CHOOSERS = {"eager": chosen_by_eager, "hotkernels": chosen_by_hotkernels}


def interpolate(xy: Array, kept: Array, frames: int) -> Array:
    """Bring `frames` poses back from the kept ones: linear in time, constant before the first and after the last."""
    poses, index = torch.from_numpy(xy[kept]), torch.from_numpy(kept)
    return strategies.interpolate(poses[None], index[None], frames)[0].numpy()


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


# ---- How well


@dataclass
class Choice:
    """How one way to choose frames did, over all windows."""

    error: float
    """Mean distance per joint between the motion and the one brought back, in the input's unit."""
    error_percent: float
    """The same in percent of the skeleton's height."""
    score: float
    """Geometric mean of the kept frames' density-peak score, in float64."""
    best: float
    """Share of the frames that the definition in float64 keeps."""
    coverage: float
    """Mean distance from a frame to the nearest kept one, between embeddings, in float64."""


def definition(p: Prepared, noise: Tensor) -> DensityPeaks:
    """What the definition keeps in float64, and the score of every frame."""
    return dpc_knn(p.x.double(), p.keep, p.k, mask=p.valid, noise=noise, assign=False, backend="torch")


def joint_error(xy: Array, back: Array) -> float:
    """Mean distance per joint over the frames that the input has."""
    distance = np.linalg.norm(xy - back, axis=-1)
    return float(np.nanmean(distance))


def judge(p: Prepared, exact: DensityPeaks, chosen: list[Tensor]) -> Choice:
    """Measure one choice of frames against what the definition says in float64."""
    error = joint_error(p.xy, bring_back(p.xy, chosen, p.starts, p.x.shape[1]))
    distances = [
        torch.cdist(tokens[there].double(), tokens[kept].double(), compute_mode="donot_use_mm_for_euclid_dist")
        for tokens, there, kept in zip(p.x, p.valid, chosen, strict=True)
        if len(kept)
    ]
    nearest = torch.cat([d.amin(1) for d in distances]) / p.x.shape[2] ** 0.5
    scores = [row[kept] for row, kept in zip(exact.score.double(), chosen, strict=True) if len(kept)]
    there = exact.index >= 0
    best = [torch.isin(index[real], kept) for index, real, kept in zip(exact.index, there, chosen, strict=True)]
    return Choice(
        error=error,
        error_percent=100 * error / p.height,
        score=float(torch.cat(scores).log().mean().exp()),
        best=float(torch.cat(best).double().mean()),
        coverage=float(nearest.mean()),
    )


def mean_choice(choices: Sequence[Choice]) -> Choice:
    """The mean of several draws."""
    return Choice(**{name: float(np.mean([getattr(c, name) for c in choices])) for name in asdict(choices[0])})
