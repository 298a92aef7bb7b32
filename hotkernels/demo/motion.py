"""17-joint human motion in Human3.6M's joint order: the skeleton, keypoint files, and a seeded motion without one.

Coordinates: 3D in metres, in the camera's frame (x right, y down, z forward); 2D in pixels, or normalised as
VideoPose3D does it, x to [-1, 1] and y by the same factor.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import fail

Array = NDArray[np.float64]

JOINTS = (
    "hip", "right hip", "right knee", "right foot", "left hip", "left knee", "left foot", "spine", "thorax", "neck",
    "head", "left shoulder", "left elbow", "left wrist", "right shoulder", "right elbow", "right wrist",
)  # fmt: skip
PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 8, 11, 12, 8, 14, 15)
RIGHT, LEFT = (1, 2, 3, 14, 15, 16), (4, 5, 6, 11, 12, 13)
_KEYS = ("keypoints_2d", "positions_2d")


@dataclass(frozen=True)
class Keypoints:
    """A sequence of 2D poses, and where it comes from."""

    xy: Array
    """[T, 17, 2]; NaN where a joint was not detected."""
    source: str
    image_size: tuple[int, int] | None = None
    """Width and height in pixels, if known."""
    fps: float | None = None


@dataclass(frozen=True)
class Motion:
    """A generated motion and its view through a fixed camera."""

    positions_3d: Array
    """[T, 17, 3] metres, in the camera's frame."""
    keypoints_2d: Array
    """[T, 17, 2] pixels."""
    fps: float
    image_size: tuple[int, int]


# ---- Keypoint files


def load_keypoints(path: str | Path, *, allow_pickle: bool = False, sequence: str | None = None) -> Keypoints:
    """Read a 2D keypoint sequence [T, 17, 2] from an .npz.

    Args:
        path: holds `keypoints_2d`, or `positions_2d`, as a plain array. `image_size` (width, height) and `fps` are
            read where they are there.
        allow_pickle: also read VideoPose3D's `positions_2d`, a pickled {subject: {action: [cameras]}}. Unpickling runs
            code from the file: for files that you trust only.
        sequence: which of those, as "SUBJECT/ACTION/CAMERA"; None: the first.

    Raises:
        ValueError: ``demo: --keypoints must be ..., got ...``, in one sentence, whatever is wrong with the file.
    """
    expected = f"an .npz file with 2D keypoints [T, 17, 2] under {' or '.join(_KEYS)}"
    path = Path(path)
    if not path.is_file():
        fail("demo", "--keypoints", expected, f"{path} ({'a folder' if path.is_dir() else 'no such file'})")
    if not zipfile.is_zipfile(path):
        fail("demo", "--keypoints", expected, f"{path} (no zip archive: cut short, damaged or of another kind)")
    try:
        with np.load(path) as archive:
            key = next((key for key in _KEYS if key in archive), None)
            if key is None:
                fail("demo", "--keypoints", expected, f"{path} with the keys {', '.join(archive.files) or '(none)'}")
            size = archive.get("image_size")
            fps = archive.get("fps")
            pickled = False
            try:
                value = archive[key]
            except ValueError as error:
                pickled = "allow_pickle" in str(error)
                if not pickled:
                    raise
        name = ""
        if pickled:
            if not allow_pickle:
                what = "a pickle, which --allow-pickle reads (it runs code from the file: only if you trust it)"
                fail("demo", "--keypoints", expected, f"{path} with {key} as {what}")
            with np.load(path, allow_pickle=True) as trusted:
                value, name = _pick(trusted[key], sequence)
    except (OSError, EOFError, LookupError, ValueError, ImportError, AttributeError, NotImplementedError,
            zipfile.BadZipFile, zlib.error, pickle.UnpicklingError) as error:  # fmt: skip
        if str(error).startswith("demo: "):
            raise
        fail("demo", "--keypoints", expected, f"{path} (not readable as one: {' '.join(str(error).split())})")
    if value.ndim != 3 or value.shape[1:] != (17, 2) or len(value) < 2 or value.dtype.kind not in "fiu":
        actual = f"{value.dtype} {list(value.shape)} under {key}"
        fail("demo", "--keypoints", f"{expected}, T >= 2, as numbers", actual)
    xy = value.astype(np.float64)
    xy[~np.isfinite(xy)] = np.nan
    image = None
    if size is not None and size.shape == (2,) and size.dtype.kind in "fiu" and 1 <= size.min() <= size.max() < np.inf:
        image = int(size[0]), int(size[1])
    return Keypoints(
        xy,
        f"{path.name}{name}",
        image,
        None if fps is None or fps.size != 1 or fps.dtype.kind not in "fiu" else float(fps.reshape(())),
    )


def _pick(tree: Any, sequence: str | None) -> tuple[Array, str]:
    """One sequence out of VideoPose3D's {subject: {action: [cameras]}}, and its name."""
    names = sequence.split("/") if sequence is not None else []
    node, path = tree.item() if isinstance(tree, np.ndarray) and tree.ndim == 0 else tree, ""
    while isinstance(node, (dict, list, tuple)):
        keys = [str(key) for key in node] if isinstance(node, dict) else [str(i) for i in range(len(node))]
        name = names.pop(0) if names else keys[0] if keys else ""
        if name not in keys:
            fail("demo", "--sequence", f"SUBJECT/ACTION/CAMERA with one of {', '.join(keys)} after '{path}'", sequence)
        node = list(node.values() if isinstance(node, dict) else node)[keys.index(name)]
        path += f"/{name}"
    return np.asarray(node), path


def normalise(xy: Array, width: int, height: int) -> Array:
    """Pixels to [-1, 1] in x, and y by the same factor, as VideoPose3D does it."""
    return xy * (2 / width) - np.array([1.0, height / width])


def looks_like_pixels(xy: Array) -> bool:
    """Whether coordinates are beyond what normalised ones reach, even for a body half outside the image."""
    return bool(np.nanmax(np.abs(xy)) > 3)


# ---- A motion to run without a file


def generate_motion(seed: int = 0, seconds: float = 20.0, fps: float = 50.0) -> Motion:
    """Generate somebody who walks, turns, sits down, gestures, gets up and walks on, seen by a fixed camera.

    Joint-angle curves drive a skeleton of constant bones; its feet drive it through the room, so that the foot that
    bears the weight stays in place. Smooth throughout, and the same for a seed on every run.
    """
    rng = np.random.default_rng(seed)
    T = max(2, round(seconds * fps))
    world = _act(rng, T, fps)
    return Motion(*_film(rng, world), fps, (1000, 1000))


def _rotation(axis: int, angle: Array) -> Array:
    """Rotation matrices [T, 3, 3] about a coordinate axis."""
    out = np.zeros((len(angle), 3, 3))
    a, b = (axis + 1) % 3, (axis + 2) % 3
    out[:, axis, axis] = 1
    out[:, a, a] = out[:, b, b] = np.cos(angle)
    out[:, b, a] = np.sin(angle)
    out[:, a, b] = -out[:, b, a]
    return out


def _scenes(rng: np.random.Generator, T: int, fps: float) -> dict[str, Array]:
    """The script: what the person wants at each frame, before inertia. Curves [T] of walk, turn, sit and gesture."""
    curves = {name: np.zeros(T) for name in ("walk", "turn", "sit", "gesture")}
    side = rng.choice([-1.0, 1.0])
    frame = 0
    while frame < T:
        # Seconds, walk (of full stride), turn (radians over the scene), sit, gesture.
        for length, walk, turn, sit, gesture in (
            (0.5, 0.0, 0.0, 0.0, 0.0),
            (rng.uniform(2.2, 3.0), 1.0, 0.0, 0.0, 0.0),
            (rng.uniform(1.6, 2.0), 0.7, side * rng.uniform(2.6, 3.4), 0.0, 0.0),
            (rng.uniform(1.8, 2.6), 1.0, 0.0, 0.0, 0.0),
            (rng.uniform(1.2, 1.5), 0.45, -side * rng.uniform(1.2, 1.8), 0.0, 0.0),
            (0.8, 0.0, 0.0, 0.0, 0.0),
            (1.4, 0.0, 0.0, 1.0, 0.0),
            (rng.uniform(1.8, 2.6), 0.0, 0.0, 1.0, 1.0),
            (1.0, 0.0, 0.0, 1.0, 0.0),
            (1.6, 0.0, 0.0, 0.0, 0.0),
            (rng.uniform(1.6, 2.2), 0.9, side * rng.uniform(0.8, 1.4), 0.0, 0.0),
        ):
            end = min(T, frame + round(length * fps))
            for name, value in (("walk", walk), ("turn", turn / length), ("sit", sit), ("gesture", gesture)):
                curves[name][frame:end] = value
            frame = end
    return curves


def _smooth(curve: Array, width: int) -> Array:
    """Running mean under a Hann window: a step becomes a smooth transition of `width` frames."""
    window = np.hanning(width + 2)[1:-1]
    padded = np.pad(curve, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, window / window.sum(), mode="valid")


def _act(rng: np.random.Generator, T: int, fps: float) -> Array:
    """Forward kinematics of the script: joints [T, 17, 3] in metres, in a room with z up and the floor at 0."""
    time = np.arange(T) / fps
    want = _scenes(rng, T, fps)
    inertia = {"walk": 0.9, "turn": 0.8, "sit": 1.5, "gesture": 0.9}
    walk, turn, sit, gesture = (_smooth(want[name], round(inertia[name] * fps)) for name in inertia)

    def sway(size: float) -> Array:
        """Slow, small, never repeating: what keeps a standing body from being a statue."""
        rates, phases = rng.uniform(0.15, 0.7, 3), rng.uniform(0, 2 * np.pi, 3)
        return size / 3 * np.sin(2 * np.pi * rates[:, None] * time + phases[:, None]).sum(0)

    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(turn) / fps
    cadence = rng.uniform(0.8, 1.0)  # strides (two steps) per second
    phase = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.cumsum(cadence * (0.35 + 0.65 * walk)) / fps
    stride = rng.uniform(0.32, 0.42)  # radians of hip flexion

    # Joint angles. Flexion brings a limb forward, by a negative turn about the axis that points left.
    def leg(at: Array, wobble: Array) -> tuple[Array, Array]:
        swing = np.exp(2.2 * (np.cos(at - 1.62 * np.pi) - 1))  # the knee bends while its foot is in the air
        rising = 4 * sit * (1 - sit)
        hip = walk * (0.12 + stride * np.cos(at)) + 1.45 * sit - 0.1 * rising + wobble
        knee = 0.06 + walk * (0.08 + 0.95 * swing) + 1.5 * sit + 0.12 * rising
        return hip, knee

    def arm(at: Array, lift: Array) -> tuple[Array, Array]:
        shoulder = -0.8 * stride * walk * np.cos(at) + 0.42 * sit + sway(0.05) + 1.1 * lift
        elbow = 0.25 + walk * (0.25 - 0.2 * np.cos(at)) + 0.75 * sit + sway(0.06)
        return shoulder, elbow + lift * (0.55 + 0.45 * np.sin(2 * np.pi * 1.3 * time))

    lean = 0.04 + 0.05 * walk + 4 * sit * (1 - sit) * 0.55 + sway(0.03)
    twist = 0.16 * walk * np.cos(phase) + 0.25 * np.clip(turn, -1, 1)
    look = 0.35 * np.clip(turn, -1, 1) + sway(0.2)

    # Bones in metres, for the drawn height.
    tall = rng.uniform(0.92, 1.08)
    thigh, shank, upper_arm, forearm = 0.445 * tall, 0.435 * tall, 0.285 * tall, 0.25 * tall

    def offset(x: float, y: float, z: float) -> Array:
        return np.array([x, y, z]) * tall

    joints = np.zeros((T, 17, 3))
    body = _rotation(2, heading)
    pelvis = body @ _rotation(2, -0.4 * twist) @ _rotation(0, 0.05 * walk * np.sin(phase))
    lower = body @ _rotation(1, lean * 0.6) @ _rotation(2, 0.4 * twist)
    upper = body @ _rotation(1, lean) @ _rotation(2, twist)
    head = upper @ _rotation(2, look) @ _rotation(1, -0.5 * lean + sway(0.06))

    def attach(joint: int, frame: Array, bone: Array) -> None:
        joints[:, joint] = joints[:, PARENTS[joint]] + frame @ bone

    for hip, side, at in ((1, -1.0, phase), (4, 1.0, phase + np.pi)):
        flexion, knee = leg(at, sway(0.02))
        upper_leg = pelvis @ _rotation(0, -0.03 * side + sway(0.01)) @ _rotation(1, -flexion)
        attach(hip, pelvis, offset(0, 0.125 * side, 0))
        attach(hip + 1, upper_leg, np.array([0, 0, -thigh]))
        attach(hip + 2, upper_leg @ _rotation(1, knee), np.array([0, 0, -shank]))
    attach(7, lower, offset(0, 0, 0.235))
    attach(8, upper, offset(0, 0, 0.25))
    attach(9, head, offset(0.03, 0, 0.11))
    attach(10, head, offset(0.0, 0, 0.115))
    # A right arm swings with the left leg; it is the right hand that gestures.
    for shoulder, side, at, lift in ((11, 1.0, phase + np.pi, 0 * gesture), (14, -1.0, phase, gesture)):
        raised, elbow = arm(at, lift)
        upper_arm_frame = upper @ _rotation(0, side * (0.12 + 0.1 * sit + 0.2 * lift)) @ _rotation(1, -raised)
        attach(shoulder, upper, offset(0, 0.15 * side, -0.02))
        attach(shoulder + 1, upper_arm_frame, np.array([0, 0, -upper_arm]))
        attach(shoulder + 2, upper_arm_frame @ _rotation(1, -elbow), np.array([0, 0, -forearm]))

    return joints + _tread(joints[:, [3, 6]], round(0.24 * fps))[:, None]


def _tread(feet: Array, width: int) -> Array:
    """Where the pelvis goes [T, 3] if the lower of the two feet [T, 2, 3] stays where it stands.

    A body has mass and soft ankles: its path is smoothed over `width` frames.
    """
    softness = 0.02  # metres: over this difference in height the weight moves from foot to foot
    weight = np.exp(-(feet[..., 2] - feet[..., 2].min(1, keepdims=True)) / softness)
    ground = feet[..., 2].min(1) - softness * np.log(weight.sum(1))
    weight /= weight.sum(1, keepdims=True)
    step = ((weight[1:, :, None] + weight[:-1, :, None]) / 2 * np.diff(feet, axis=0)).sum(1)
    place = -np.concatenate([np.zeros((1, 3)), np.cumsum(step, axis=0)])
    place[:, 2] = -ground
    return np.stack([_smooth(place[:, axis], width) for axis in range(3)], 1)


def _film(rng: np.random.Generator, world: Array) -> tuple[Array, Array]:
    """Put a fixed camera where it sees everything: joints in its frame [T, 17, 3], and in pixels of 1000 x 1000."""
    focal, centre, margin = 1145.0, 500.0, 60.0  # about Human3.6M's cameras
    middle = (world.reshape(-1, 3).max(0) + world.reshape(-1, 3).min(0)) / 2
    around, distance = rng.uniform(0, 2 * np.pi), 3.5
    while True:
        eye = middle + distance * np.array([np.cos(around), np.sin(around), 0.12])
        forward = (middle - eye) / np.linalg.norm(middle - eye)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        camera = (world - eye) @ np.stack([right, np.cross(forward, right), forward]).T
        pixels = camera[..., :2] / np.maximum(camera[..., 2:], 1e-3) * focal + centre
        if camera[..., 2].min() > 1.0 and pixels.min() > margin and pixels.max() < 2 * centre - margin:
            return camera, pixels
        distance *= 1.05
