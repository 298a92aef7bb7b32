"""The demo: the generated motion, keypoint files good and bad, and the whole run at small sizes."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CAPTURED
from torch import Tensor

from hotkernels import demo, explain
from hotkernels.bench.timing import Timing
from hotkernels.demo import frames, hourglass, measure
from hotkernels.demo.frames import Prepared
from hotkernels.demo.measure import Pair
from hotkernels.demo.motion import (
    Array,
    Keypoints,
    generate_motion,
    load_keypoints,
    looks_like_pixels,
    normalise,
)
from hotkernels.demo.report import Result, report

SMALL = ["--seconds", "3", "--frames", "60", "--keep", "20", "--channels", "32", "--rounds", "2"]


def poses(T: int = 12, seed: int = 0) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, (T, 17, 2))


# ---- Keypoint files


@pytest.mark.parametrize("key", ["keypoints_2d", "positions_2d"])
def test_load_plain_array(tmp_path: Path, key: str) -> None:
    xy = poses().astype(np.float32)
    xy[3, 2] = np.inf
    np.savez(tmp_path / "a.npz", **{key: xy}, image_size=np.array([640, 480]), fps=np.array(25))
    loaded = load_keypoints(tmp_path / "a.npz")
    assert loaded.image_size == (640, 480)
    assert loaded.fps == 25
    assert np.isnan(loaded.xy[3, 2]).all()
    np.testing.assert_array_equal(loaded.xy[4], xy[4].astype(np.float64))


@pytest.mark.parametrize("size", [[640], [640, 480, 3], ["640", "480"], [0, 480], [640, np.nan], [np.inf, 480]])
@pytest.mark.parametrize("fps", [[25, 30], "25"])
def test_an_image_size_or_rate_of_another_kind_is_left_alone(tmp_path: Path, size: list[Any], fps: Any) -> None:
    np.savez(tmp_path / "a.npz", keypoints_2d=poses(), image_size=np.array(size), fps=np.array(fps))
    loaded = load_keypoints(tmp_path / "a.npz")
    assert (loaded.image_size, loaded.fps) == (None, None)


def test_load_nested_pickle_only_when_asked(tmp_path: Path) -> None:
    tree = {"S1": {"Walk": [poses(seed=1), poses(seed=2)]}, "S5": {"Sit": [poses(seed=3)]}}
    np.savez(tmp_path / "a.npz", positions_2d=np.array(tree, dtype=object))
    with pytest.raises(ValueError, match=r"demo: --keypoints must be .* as a pickle, which --allow-pickle reads"):
        load_keypoints(tmp_path / "a.npz")
    first = load_keypoints(tmp_path / "a.npz", allow_pickle=True)
    np.testing.assert_array_equal(first.xy, poses(seed=1))
    assert first.source == "a.npz/S1/Walk/0"
    for name, seed in (("S1/Walk/1", 2), ("S5/Sit/0", 3)):
        named = load_keypoints(tmp_path / "a.npz", allow_pickle=True, sequence=name)
        np.testing.assert_array_equal(named.xy, poses(seed=seed))
    with pytest.raises(ValueError, match=r"demo: --sequence must be .* with one of S1, S5 after ''"):
        load_keypoints(tmp_path / "a.npz", allow_pickle=True, sequence="S9/Sit/0")


def test_a_pickle_is_not_run_unasked(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise SystemExit('the pickle ran')",))

    np.savez(tmp_path / "a.npz", keypoints_2d=np.array(Bomb(), dtype=object))
    with pytest.raises(ValueError, match="--allow-pickle"):
        load_keypoints(tmp_path / "a.npz")


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Every way a file can be wrong: its path and what the sentence must hold."""
    good = io.BytesIO()
    np.savez_compressed(good, keypoints_2d=poses(300))
    whole = bytearray(good.getvalue())
    damaged = whole.copy()
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    no_stream, other_method = whole.copy(), whole.copy()
    no_stream[60:68] = b"\xff" * 8
    for at in (8, whole.index(b"PK\x01\x02") + 10):  # where a zip archive says how it is compressed
        other_method[at : at + 2] = (99).to_bytes(2, "little")
    contents = {
        "no deflate stream": (bytes(no_stream), "not readable as one"),
        "another compression": (bytes(other_method), "not readable as one"),
        "truncated": (bytes(whole[: len(whole) // 2]), "no zip archive"),
        "damaged": (bytes(damaged), "not readable as one"),
        "empty": (b"", "no zip archive"),
        "text": (b"frame,x,y\n1,2,3\n", "no zip archive"),
        "pickle": (pickle.dumps(poses()), "no zip archive"),
    }
    out = {"missing": (folder / "missing.npz", "no such file"), "folder": (folder, "a folder")}
    for name, (content, reason) in contents.items():
        (folder / f"{name}.npz").write_bytes(content)
        out[name] = (folder / f"{name}.npz", reason)
    arrays = {
        "other_keys": ({"poses": poses(), "fps": 5}, "with the keys poses, fps"),
        "no_keys": ({}, r"with the keys \(none\)"),
        "joints": ({"keypoints_2d": np.zeros((9, 16, 2))}, r"float64 \[9, 16, 2\] under keypoints_2d"),
        "confidence": ({"keypoints_2d": np.zeros((9, 17, 3))}, r"\[9, 17, 3\]"),
        "one_frame": ({"keypoints_2d": np.zeros((1, 17, 2))}, r"float64 \[1, 17, 2\]"),
        "words": ({"keypoints_2d": np.full((9, 17, 2), "x")}, r"<U1 \[9, 17, 2\]"),
    }
    for name, (content, reason) in arrays.items():
        np.savez(folder / f"{name}.npz", **content)
        out[name] = (folder / f"{name}.npz", reason)
    with (folder / "plain.npz").open("wb") as file:
        np.save(file, poses())
    out["plain"] = (folder / "plain.npz", "no zip archive")
    return out


@pytest.mark.parametrize("content", [b"\x80\x04garbage", b"", b"cno_such_module\nX\n.", b"cnumpy\nno_such\n."])
def test_a_bad_pickle_gets_one_sentence(content: bytes, tmp_path: Path) -> None:
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("positions_2d.npy", array.getvalue() + content)
    with pytest.raises(ValueError, match=r"(?s)demo: --keypoints must be an \.npz file .*, got .*not readable as one"):
        load_keypoints(tmp_path / "a.npz", allow_pickle=True)


def test_every_bad_file_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (path, reason) in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=rf"(?s)demo: --keypoints must be an \.npz file .*, got .*{reason}"):
            load_keypoints(path)
        assert demo.main(["--keypoints", str(path), "--out", str(tmp_path / "out")]) == 2, name
        told = capsys.readouterr().err
        assert told.startswith("demo: --keypoints must be an .npz file with 2D keypoints [T, 17, 2] under"), name
        assert told.count("\n") == 1, name


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--keep", "300"], "demo: --keep must be in [1, --frames = 243], got 300"),
        (["-k", "244"], "demo: -k must be in [1, --frames = 243], got 244"),
        (["--channels", "12"], "demo: --channels must be a multiple of 8, got 12"),
        (["--seconds", "0.05"], "demo: --seconds must be in [0.1, 3600], got 0.05"),
        (["--seconds", "nan"], "demo: --seconds must be in [0.1, 3600], got nan"),
        (["--rounds", "1"], "demo: --rounds must be at least 2, got 1"),
        (["--rounds", "0"], "demo: --rounds must be at least 2, got 0"),
        (["--sequence", "S9/Walk"], "demo: --sequence must be of a file of --keypoints, got 'S9/Walk'"),
        (["--seed", "-1"], "demo: --seed must be in [0, 9223372036854775807], got -1"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(argv) == 2
    assert capsys.readouterr().err.strip() == message


@pytest.mark.parametrize("whole", [0, 1])
def test_a_sequence_without_whole_frames(whole: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xy = poses()
    xy[whole:, 0] = np.nan
    np.savez(tmp_path / "a.npz", keypoints_2d=xy)
    assert demo.main(["--keypoints", str(tmp_path / "a.npz"), "--out", str(tmp_path)]) == 2
    assert f"at least 2 frames that have all 17 joints, got {whole}" in capsys.readouterr().err


def test_poses_without_a_height(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", keypoints_2d=np.zeros((50, 17, 2)))
    assert demo.main(["--keypoints", str(tmp_path / "a.npz"), "--out", str(tmp_path)]) == 2
    assert "demo: --keypoints must be poses with a height, got joints that all" in capsys.readouterr().err


def test_somebody_who_does_not_move(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", keypoints_2d=np.repeat(poses(1), 90, 0))
    assert demo.main(["--keypoints", str(tmp_path / "a.npz"), "--out", str(tmp_path), *SMALL]) == 0
    choices = json.loads((tmp_path / "demo.json").read_text())["choices"]
    assert all(choice["error"] < 1e-12 for choice in choices.values())


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    for out in ("out", "out/a"):
        assert demo.main([*SMALL, "--out", str(tmp_path / out)]) == 2
        assert "demo: --out must be a folder that can be written" in capsys.readouterr().err


def test_a_defect_shows_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no error of the user's."""

    def run(*args: Any) -> Any:
        raise ValueError("of something inside")

    monkeypatch.setattr(demo, "run", run)
    with pytest.raises(ValueError, match="of something inside"):
        demo.main([*SMALL, "--out", str(tmp_path / "a" / "b")])
    assert (tmp_path / "a" / "b").is_dir()


def test_pixels_and_normalised() -> None:
    assert looks_like_pixels(np.array([[0.0, 500.0]]))
    assert looks_like_pixels(np.array([[-500.0, 0.0]]))
    assert not looks_like_pixels(np.array([[np.nan, -1.2]]))
    np.testing.assert_allclose(normalise(np.array([[0.0, 0.0], [1000, 500], [500, 250]]), 1000, 500),
                               [[-1, -0.5], [1, 0.5], [0, 0]])  # fmt: skip


# ---- The pieces


@pytest.mark.parametrize(("length", "window", "starts"), [(9, 9, [0]), (10, 4, [0, 4, 6]), (12, 4, [0, 4, 8])])
def test_windows_cover_everything(length: int, window: int, starts: list[int]) -> None:
    assert frames.window_starts(length, window) == starts
    assert {f for s in starts for f in range(s, s + window)} == set(range(length))


def test_bringing_back_is_linear_and_clamped() -> None:
    xy = np.arange(10.0)[:, None, None] * np.ones((1, 17, 2))
    back = frames.interpolate(xy, np.array([2, 5, 8]), 10)
    np.testing.assert_allclose(back[2:9], xy[2:9], atol=1e-12)
    assert (back[:2] == 2).all()
    assert (back[9:] == 8).all()


def test_bringing_back_overlapping_windows() -> None:
    xy = poses(10)
    everything = [torch.arange(4)] * 3
    np.testing.assert_array_equal(frames.bring_back(xy, everything, [0, 4, 6], 4), xy)
    nothing = [torch.arange(4), torch.arange(0), torch.arange(4)]
    back = frames.bring_back(xy, nothing, [0, 4, 6], 4)
    assert np.isnan(back[4:8]).all()
    np.testing.assert_array_equal(back[8:], xy[8:])


def test_uniform_and_random_choices_keep_to_valid_frames() -> None:
    valid = torch.ones(20, dtype=torch.bool)
    valid[[0, 7, 8]] = False
    for kept in (frames.spread(valid, 6), frames.draw(valid, 6, torch.Generator())):
        assert len(set(kept.tolist())) == 6
        assert valid[kept].all()
        assert (kept.diff() > 0).all()
    assert frames.spread(valid, 6)[[0, -1]].tolist() == [1, 19]
    assert len(frames.spread(valid, 19)) == 17


def test_embedding_is_seeded_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (frames.FrameEmbedding(16, seed)(torch.ones(2, 17, 2)) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert one.shape == (2, 17, 16)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_standardised_tokens_are_centred_and_scaled_by_one_number() -> None:
    tokens, valid = torch.randn(50, 8) * torch.arange(1.0, 9) + 5, torch.ones(50, dtype=torch.bool)
    valid[10:20] = False
    tokens[10:20] = 1e4
    out = frames.standardise(tokens, valid)[valid]
    torch.testing.assert_close(out.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    assert float(out.square().mean()) == pytest.approx(1)
    scale = out.std(0) / tokens[valid].std(0)
    torch.testing.assert_close(scale, scale[:1].expand(8))


def prepared(xy: Array, *options: str) -> Prepared:
    argv = ["--channels", "16", "--keep", "5", *options]
    return frames.prepare(Keypoints(xy, "", (1000, 500)), demo.parse(argv), lambda: None)


def test_a_token_is_the_mean_of_its_joints() -> None:
    xy, there = poses(160), torch.arange(160) != 100
    xy[100, 3] = np.nan
    p = prepared(xy, "--frames", "80")
    assert p.starts == [0, 80]
    assert torch.equal(p.valid.flatten(), there)
    assert np.isnan(p.xy[100]).all()
    assert frames.joint_error(p.xy, p.xy) == 0
    joints = p.joint_tokens([0, 1])
    torch.testing.assert_close(frames.standardise(joints.mean(2).flatten(0, 1), there), p.x.flatten(0, 1))
    assert torch.equal(p.joint_tokens([1])[0], joints[1])


def test_a_sequence_shorter_than_a_window_keeps_the_same_share() -> None:
    p = prepared(poses(12), "--frames", "60", "--keep", "20", "-k", "15")
    assert (p.starts, p.keep, p.k) == ([0], 4, 12)
    assert prepared(poses(12), "--frames", "60", "--keep", "1").keep == 1
    assert prepared(poses(12), "--frames", "12").notes == []


def test_the_definition_knows_mask_noise_and_k() -> None:
    xy = poses(120)
    xy[5:9] = np.nan
    p = prepared(xy, "--frames", "60", "-k", "3")
    noise = 0.03 * torch.rand(p.valid.shape)
    kept = frames.chosen_by_hotkernels(p.x.double(), p.valid, p.keep, p.k, noise)
    assert torch.equal(frames.definition(p, noise).index.sort().values, torch.stack(kept))


def test_the_image_is_as_wide_and_high_as_given_or_as_the_file_says() -> None:
    xy = 250 * (poses(20) + 1)
    for options, size in (((), (1000, 500)), (("--width", "800"), (800, 500)), (("--height", "700"), (1000, 700))):
        p = prepared(xy, "--frames", "20", *options)
        np.testing.assert_allclose(p.poses, normalise(xy, *size), rtol=0, atol=1e-6)
        assert p.notes[0].endswith("(as given)" if options else "(from the file)")


# What each figure of a choice is, in windows of 4 frames of which the last one is missing.
CHOSEN = [torch.tensor([0, 3]), torch.tensor([0, 2])]
JUDGED = {
    "error": 5 / 7,
    "error_percent": 100 * 5 / 7 / 20,
    "score": (4 * 9 * 1 * 3) ** (1 / 4),
    "best": 3 / 5,
    "coverage": (4 + 8 + 1) / 3 / 7,
}


def hand_made() -> tuple[Any, Any]:
    """A window with one frame a distance of 5 off the line between those kept, and one along a line."""
    xy = np.zeros((8, 17, 2))
    xy[1], xy[7] = (3, 4), np.nan
    x = torch.zeros(2, 4, 9)
    x[..., 0] = torch.tensor([[0.0, 6, 10, 2], [0, 1, 5, 1000]])
    valid = torch.tensor([[True] * 4, [True] * 3 + [False]])
    exact = SimpleNamespace(
        index=torch.tensor([[0, 1, 2], [0, 2, -1]]), score=torch.tensor([[4.0, 1, 1, 9], [1, 2, 3, 7]])
    )
    return SimpleNamespace(xy=xy, height=20.0, starts=[0, 4], x=x, valid=valid), exact


def test_what_a_choice_is_judged_by() -> None:
    choice = frames.judge(*hand_made(), CHOSEN)
    assert vars(choice) == pytest.approx(JUDGED)
    twice = frames.Choice(**{name: 3 * value for name, value in JUDGED.items()})
    assert vars(frames.mean_choice([choice, choice, twice])) == pytest.approx({n: 5 / 3 * v for n, v in JUDGED.items()})


def test_figures_are_in_ms_and_mib_the_published_ones_first(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    def interleaved(
        contenders: dict[str, Callable[[], float]], seconds: float, least: int, tick: Any
    ) -> dict[str, Timing]:
        return {name: Timing(call(), 8.0, 9.0, least) for name, call in contenders.items()}

    monkeypatch.setattr(measure, "interleaved", interleaved)
    monkeypatch.setattr(measure, "peak_memory", lambda call: call())
    calls = {"a": (lambda: 0.25, torch.get_num_threads), "b": (lambda: 4, lambda: 2)}
    before = torch.get_num_threads()
    assert measure.times(calls, 3, 2, lambda: None) == {"a": Pair(250, 3000), "b": Pair(4000, 2000)}
    assert measure.peaks((lambda: 3 << 20, lambda: torch.get_num_threads() << 20)) == Pair(3, 1)
    assert measure.peaks((lambda: 3 << 20, lambda: None)) is None
    assert torch.get_num_threads() == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_on_a_slow_terminal_only() -> None:
    for stream, waited, shown in ((Terminal(), 3, True), (Terminal(), 0, False), (io.StringIO(), 3, False)):
        bar = measure.Progress(4, stream)
        bar.start -= waited
        bar.tick()
        assert ("25 %" in stream.getvalue()) == shown
        bar.close()
        assert stream.getvalue().endswith("\r") == shown


# ---- The hourglass


def hourglass_input() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 30, 17, 32, generator=torch.Generator().manual_seed(0))
    return x, torch.stack([torch.arange(0, 30, 3), torch.arange(10)])


def test_hourglasses_share_their_weights_and_answers() -> None:
    x, index = hourglass_input()
    eager, ours = hourglass.build(32, 30, 10, 2, seed=0)
    eager.load_state_dict(ours.state_dict(), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, index), eager(x, index))
        # Joints attend within a frame, frames within a joint: each stage is its own proof.
        kept = eager.prune(x, index)
        attended = eager.attend(kept)
        torch.testing.assert_close(ours.prune(x, index), kept)
        torch.testing.assert_close(ours.attend(kept), attended)
        torch.testing.assert_close(ours.recover(attended), eager.recover(attended))
        assert (ours(x, index) - ours(x, index.flip(0))).abs().max() > 0.01
        assert (ours(x, index) - ours(x.roll(1, 0), index)).abs().max() > 0.01


def test_the_comparison_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, index = hourglass_input()
    same = hourglass.compare(x, index, 2, 0, 2, lambda: None)
    assert same.difference < 1e-5
    assert max(same.float64_error.eager, same.float64_error.hotkernels) < 1e-5
    assert list(same.times_ms) == ["prune", "attend", "recover", "whole"]
    recover = hourglass.Hourglass.recover
    monkeypatch.setattr(hourglass.Hourglass, "recover", lambda self, x: recover(self, 1.1 * x))
    monkeypatch.setattr(hourglass.HourglassEager, "recover", recover)
    worse = hourglass.compare(x, index, 2, 0, 2, lambda: None)
    assert worse.difference > 1e-3
    assert worse.float64_error.hotkernels > 1e-3 > worse.float64_error.eager


def test_what_the_comparison_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {}
    x, index = hourglass_input()
    monkeypatch.setattr(hourglass, "_relative", lambda value, to: (value.shape, to.dtype))
    monkeypatch.setattr(hourglass, "times", lambda calls, *rest: measured.update(calls))
    monkeypatch.setattr(hourglass, "peaks", lambda calls: measured.update(memory=calls))
    told = hourglass.compare(x, index, 2, 0, 2, lambda: None)
    assert told.difference == (x.shape, torch.float32)
    assert told.float64_error == Pair(*[(x[:1].shape, torch.float64)] * 2)
    for kind in (hourglass.Hourglass, hourglass.HourglassEager):
        for stage in ("prune", "attend", "recover", "forward"):
            monkeypatch.setattr(kind, stage, lambda self, x, stage=stage: (stage, type(self)))
    stages = {stage: stage for stage in ("prune", "attend", "recover")} | {"whole": "forward", "memory": "forward"}
    both = (hourglass.HourglassEager, hourglass.Hourglass)
    assert {name: [call() for call in pair] for name, pair in measured.items()} == {
        name: [(stage, kind) for kind in both] for name, stage in stages.items()
    }


def test_relative_difference() -> None:
    assert hourglass._relative(torch.tensor([1.0, -9.0, 3.0]), torch.tensor([1.0, -8.0, 3.0])) == 1 / 8


# ---- The report and the picture


def test_the_report_says_which_figure_is_whose() -> None:
    def choice(x: float) -> frames.Choice:
        return frames.Choice(4 * x, 2 * x, 0.5 * x, 0.1 * x, 0.3 / x)

    result = Result(
        source="a", unit="pixels", skeleton_height=300.0, frames=90, missing_frames=0, windows=2, window=60, keep=20,
        k=3, channels=32, seed=0, backend="cpp", instruction_set="avx2", identical=0.75,
        times_ms={1: Pair(9, 3), 2: Pair(6, 2)},
        choices={"hotkernels": choice(1), "eager": choice(2), "uniform": choice(0.8), "random": choice(0.4)},
        memory_mib=Pair(8, 3),
        hourglass=hourglass.Comparison([2, 60, 17, 32], 20, 8, 1e-6, Pair(2e-7, 3e-7), {"whole": Pair(2, 8)}, None),
    )  # fmt: skip
    lines = [" ".join(line.split()) for line in report(result).splitlines()]
    for line in (
        "choosing 20 frames of 60, 2 windows at once: dpc_knn of [2, 60, 32], k = 3, cpp backend, avx2",
        "1 thread 9.0 ms 3.0 ms 3.0x as fast",
        "2 threads 6.0 ms 2.0 ms 3.0x as fast",
        "extra memory 8.0 MiB 3.0 MiB",
        "hourglass, 60 -> 20 -> 60 frames of 17 joints: [2, 60, 17, 32], 8 heads, float32, 1 thread",
        "whole 2.0 ms 8.0 ms 4.0x as long",
        "extra memory: not measured (this system has no /proc/self/clear_refs)",
        "outputs, with the same untrained weights and kept frames, differ by 1.0e-06 of the largest;",
        "from float64 (one window): eager 2.0e-07, hotkernels 3.0e-07",
        "score best coverage error",
        "hotkernels 0.500000 10.0% 0.300000 4 pixels (2.00 %)",
        "eager PyTorch 1.000000 20.0% 0.150000 8 pixels (4.00 %)",
        "eager keeps 75.0% of the frames that hotkernels keeps (same noise); where they",
        "differ, float32 rounding decided its choice; against eager: score -50.0%, coverage +100.0%",
    ):
        assert line in lines
    headings = ("choosing", "hourglass", "what was chosen")
    assert [word for line in lines for word in headings if line.startswith(word)] == [*headings]


def test_the_picture_shows_the_busiest_window_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = pytest.importorskip("hotkernels.demo.picture")
    xy = 250 * (poses(60) + 1)
    xy[:30] = xy[:1] + np.arange(30)[:, None, None]
    p = prepared(xy, "--frames", "30")
    assert picture.busiest_window(p) == 1
    drawn = []
    monkeypatch.setattr(picture.Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    chosen = {"hotkernels": [torch.arange(5)] * 2, "uniform": [torch.arange(0, 30, 6)] * 2}
    run = SimpleNamespace(source="", windows=2, k=2, channels=16, unit="pixels")
    picture.draw_choice(tmp_path / "a.png", run, p, chosen, torch.rand(2, 30), None)
    top, _, errors = drawn[0].axes
    told = [text.get_text() for text in errors.get_legend().get_texts()]
    lost = (frames.joint_error(xy[30:], frames.interpolate(xy[30:], kept[1].numpy(), 30)) for kept in chosen.values())
    assert told == [f"{who}, mean {error:.2g}" for who, error in zip(("dpc_knn", "uniform"), lost, strict=True)]
    heads = [line.get_ydata()[0] for line in top.lines if line.get_marker() == "o"]
    scale = 2.7 / np.ptp(xy[30:, :, 1], axis=1).max()
    assert heads[0] == pytest.approx((xy[30, :, 1].max() - xy[30, 10, 1]) * scale)


# ---- The whole run


def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([*SMALL, "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for word in ("choosing 20 frames of 60, 3 windows", "uniform", "random", "1 thread", "coverage", "hourglass"):
        assert word in told
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert set(saved["choices"]) == {"eager", "hotkernels", "uniform", "random"}
    assert (saved["windows"], saved["window"], saved["keep"], saved["frames"]) == (3, 60, 20, 150)
    ours, eager = saved["choices"]["hotkernels"], saved["choices"]["eager"]
    assert ours["score"] > 0.9 * eager["score"]
    assert ours["score"] > saved["choices"]["uniform"]["score"]
    assert saved["identical"] > 0.7
    assert ours["best"] >= eager["best"] - 0.1
    assert saved["hourglass"]["shape"] == [2, 60, 17, 32]
    assert saved["hourglass"]["difference"] < 1e-5
    if importlib.util.find_spec("matplotlib"):  # the picture needs the extra "plot"
        assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_the_demo_times_and_compares_the_published_code_and_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order, with the published noise; the random choices are several, and the same on every run."""
    keypoints, args = Keypoints(poses(120), ""), demo.parse([*SMALL, "--keypoints", "a.npz"])
    monkeypatch.setattr(demo, "chosen_by_eager", lambda *call: 3)
    monkeypatch.setattr(demo, "chosen_by_hotkernels", lambda *call: 2)
    monkeypatch.setattr(
        demo, "times", lambda calls, n, *rest: {name: (n, *(c() for c in calls[name])) for name in calls}
    )
    monkeypatch.setattr(demo, "peaks", lambda calls: [call() for call in calls])
    monkeypatch.setattr(demo, "compare", lambda x, index, *rest: (x, index))
    monkeypatch.setattr(demo, "mean_choice", lambda choices: choices)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    (result, p, chosen, score), (again, *_) = (demo.run(keypoints, args) for _ in range(2))
    noise = 1e-6 * torch.rand(2, 60, generator=torch.Generator().manual_seed(args.seed))
    assert torch.equal(score, frames.definition(p, noise).score)
    assert result.times_ms == {1: (1, 3, 2), 4: (4, 3, 2)}
    assert result.memory_mib == [3, 2]
    x, index = result.hourglass
    assert torch.equal(x, p.joint_tokens([0, 1]))
    assert torch.equal(index, torch.stack(chosen["hotkernels"]))
    same = [torch.isin(a, b) for a, b in zip(chosen["hotkernels"], chosen["eager"], strict=True)]
    assert result.identical == float(torch.cat(same).double().mean())
    assert len({choice.error for choice in result.choices["random"]}) == frames.RANDOM_DRAWS
    assert result.choices == again.choices
    assert result.backend == explain("dpc_knn", p.x).chosen


@pytest.mark.parametrize("slower", [True, False])
def test_threads_that_slow_both_down_are_no_gain(slower: bool, monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    torch.set_num_threads(2)

    def times(calls: Any, n: int, rounds: int, tick: Any) -> dict[str, Pair]:
        return {"choose": Pair(100.0 * n if slower else 100.0 / n, 10.0 * n)}

    monkeypatch.setattr(demo, "times", times)
    args = demo.parse(SMALL)
    told = demo.report(demo.run(demo.load(args), args)[0])
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "1 thread 100.0 ms 10.0 ms 10.0x as fast" in lines
    assert f"2 threads {'200.0 ms 20.0 ms 10.0' if slower else '50.0 ms 20.0 ms 2.5'}x as fast" in lines
    assert ("on 2 threads both are slower than on 1: too little work or a busy machine" in lines) == slower


def test_demo_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "hotkernels.demo.picture", raising=False)
    assert demo.main([*SMALL, "--out", str(tmp_path)]) == 0
    assert "no picture: " in capsys.readouterr().out
    assert not (tmp_path / "demo.png").exists()
    assert (tmp_path / "demo.json").exists()


def test_demo_with_missing_frames_and_few_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xy = generate_motion(1, seconds=1).keypoints_2d
    xy[10:14] = np.nan
    xy[30, 5] = np.nan
    np.savez(tmp_path / "a.npz", keypoints_2d=xy)
    assert demo.main(["--keypoints", str(tmp_path / "a.npz"), "--out", str(tmp_path), *SMALL]) == 0
    told = capsys.readouterr().out
    assert "5 frames lack a joint: masked" in told
    assert "50 frames are fewer than a window of 60: one window of 50, keeping 17" in told
    assert "assumed: see --width" in told
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert saved["missing_frames"] == 5
    assert saved["skeleton_height"] == pytest.approx(np.nanmedian(np.ptp(xy[..., 1], axis=1)))
    assert all(np.isfinite(list(choice.values())).all() for choice in saved["choices"].values())


def test_demo_with_fewer_whole_frames_than_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xy = generate_motion(1, seconds=1.2).keypoints_2d
    xy[15:] = np.nan
    np.savez(tmp_path / "a.npz", keypoints_2d=xy)
    assert demo.main(["--keypoints", str(tmp_path / "a.npz"), "--out", str(tmp_path), *SMALL]) == 0
    assert "hourglass: not run" in capsys.readouterr().out
    assert json.loads((tmp_path / "demo.json").read_text())["hourglass"] is None


@pytest.mark.parametrize("who", ["eager", "hotkernels"])
def test_no_missing_frame_is_kept(who: str) -> None:
    x = torch.randn(2, 30, 8)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, 5:28] = False
    noise = torch.rand(2, 30) * 1e-6
    chosen = frames.CHOOSERS[who](x, valid, 10, 2, noise)
    for kept, there in zip(chosen, valid, strict=True):
        assert there[kept].all()
        assert (kept.diff() > 0).all()
    x[~valid] = x[0, 0] + 1e-3  # near a frame that is there, whose density they would raise
    for kept, same in zip(chosen, frames.CHOOSERS[who](x, valid, 10, 2, noise), strict=True):
        assert torch.equal(kept, same)


def test_demo_on_a_captured_motion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not CAPTURED.exists():
        pytest.skip(f"no captured motion at {CAPTURED}")
    argv = ["--keypoints", str(CAPTURED), "--out", str(tmp_path), "--channels", "64", "--rounds", "2"]
    assert demo.main(argv) == 0
    assert "image of 1000 x 1000 (from the file)" in capsys.readouterr().out
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert saved["windows"] == 4
    ours, eager = saved["choices"]["hotkernels"], saved["choices"]["eager"]
    assert ours["score"] > 0.99 * eager["score"]
    assert ours["coverage"] < 1.02 * eager["coverage"]
    assert ours["best"] >= eager["best"]
    assert saved["hourglass"]["difference"] < 1e-5
