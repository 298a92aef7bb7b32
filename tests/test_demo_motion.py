"""The demo's generated motion: a plausible body that sits, turns and walks."""

from __future__ import annotations

import numpy as np
import pytest

from hotkernels.demo.motion import JOINTS, LEFT, PARENTS, RIGHT, Array, generate_motion


def test_the_skeleton_is_symmetric() -> None:
    other = dict(zip(RIGHT, LEFT, strict=True))
    for right, left in other.items():
        assert JOINTS[left] == JOINTS[right].replace("right", "left") != JOINTS[right]
        assert PARENTS[left] == other.get(PARENTS[right], PARENTS[right]) < left


@pytest.mark.parametrize("seed", range(4))
def test_motion_is_a_plausible_body(seed: int) -> None:
    motion = generate_motion(seed)
    joints = motion.positions_3d
    assert joints.shape == (1000, len(JOINTS), 3)
    assert motion.keypoints_2d.shape == (1000, len(JOINTS), 2)
    bones = np.stack([np.linalg.norm(joints[:, j] - joints[:, p], axis=-1) for j, p in enumerate(PARENTS) if p >= 0])
    np.testing.assert_allclose(bones, np.broadcast_to(bones[:, :1], bones.shape), rtol=0, atol=1e-9)
    assert 0.05 < bones.min() < bones.max() < 0.6
    np.testing.assert_allclose(bones[:3], bones[3:6], rtol=1e-9)  # the right leg and the left
    speed = np.linalg.norm(np.diff(joints, axis=0), axis=-1) * motion.fps
    assert 0.3 < speed[:, 0].mean() < 1.0  # standing and sitting included
    assert 1.0 < speed[:, 0].max() < 3.0
    assert speed.max() < 7.0  # a foot in mid-swing
    acceleration = np.linalg.norm(np.diff(joints, 2, axis=0), axis=-1) * motion.fps**2
    assert acceleration.max() < 80.0  # nothing jumps


def test_motion_sits_and_turns() -> None:
    joints = generate_motion(0).positions_3d
    height = np.ptp(joints[..., 1], axis=1)
    assert height.min() < 0.85 * height.max()  # sitting
    hips = joints[:, 4] - joints[:, 1]
    facing = np.unwrap(np.arctan2(hips[:, 2], hips[:, 0]))
    assert np.ptp(facing) > 2.0


@pytest.mark.parametrize("seed", range(4))
def test_motion_walks_as_a_body_does(seed: int) -> None:
    """Forwards and upright, each arm with the other leg, on a foot that stays; knees and elbows bend their way."""
    motion = generate_motion(seed)
    joints = motion.positions_3d
    ahead = np.cross(joints[:, 4] - joints[:, 1], joints[:, 8] - joints[:, 0])
    ahead /= np.linalg.norm(ahead, axis=-1, keepdims=True)
    velocity = np.gradient(joints, axis=0) * motion.fps
    walking = (velocity[:, 0] * ahead).sum(-1) > 0.6

    def before(joint: int, other: int) -> Array:
        return ((joints[:, joint] - joints[:, other]) * ahead).sum(-1)

    def together(joint: int, other: int) -> float:
        return np.corrcoef(before(joint, 8)[walking], before(other, 8)[walking])[0, 1]

    assert walking.mean() > 0.2
    assert all((before(hip + 1, hip) > before(hip + 2, hip + 1)).all() for hip in (1, 4))
    assert (before(12, 11) < before(13, 12)).all()
    assert (before(15, 14) < before(16, 15)).mean() > 0.8  # but where that hand is raised
    assert together(3, 6) < -0.5
    assert together(16, 6) > 0.2
    assert together(13, 3) > 0.2
    assert (joints[:, 10, 1] < joints[:, 0, 1]).all()
    assert (joints[:, 0, 1] < joints[:, [3, 6], 1].max(1)).all()
    assert (joints[:, 16, 1] < joints[:, 8, 1]).any()
    assert (joints[:, 13, 1] > joints[:, 8, 1]).all()
    slower_foot = np.linalg.norm(velocity[:, [3, 6]], axis=-1).min(1)
    assert slower_foot.mean() < 0.3
    np.testing.assert_allclose(motion.keypoints_2d, 500 + 1145 * joints[..., :2] / joints[..., 2:])


def test_motion_depends_on_the_seed_only() -> None:
    one, again, other = generate_motion(3), generate_motion(3), generate_motion(4)
    np.testing.assert_array_equal(one.keypoints_2d, again.keypoints_2d)
    assert np.abs(one.positions_3d - other.positions_3d).max() > 0.1


def test_motion_stays_in_the_picture() -> None:
    for seed in range(4):
        keypoints = generate_motion(seed, seconds=8).keypoints_2d
        assert keypoints.min() > 0
        assert keypoints.max() < 1000
