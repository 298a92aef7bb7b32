"""Every example in bench/examples runs, at a tiny size, and the short form of bench/convergence.py learns alike."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hotkernels.demo.motion import generate_motion, normalise

ROOT = Path(__file__).parents[1]
TINY = {
    "swap_hot": "--frames 27 --channels 32 --depth 2",
    "swap_tcformer": "--size 64 --channels 32",
    "merge_video_tokens": "--frames 2 --channels 64",
    "point_cloud": "--points 256 --channels 32",
}


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None
) -> Callable[[str, str], tuple[Any, str]]:
    """Call main() of a module with a command line: its result and what it printed."""
    monkeypatch.syspath_prepend(str(ROOT))

    def call(module: str, arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", [module, *arguments.split()])
        result = importlib.import_module(module).main()
        return result, capsys.readouterr().out

    return call


@pytest.mark.parametrize("name", sorted(TINY))
def test_example(name: str, run: Callable[[str, str], tuple[Any, str]]) -> None:
    _, out = run(f"bench.examples.{name}", f"{TINY[name]} --rounds 2")
    assert re.search(r"x as (fast|long)", out), out
    gaps = re.findall(r"(?:difference|, of a gradient)[^:]*: ([\d.e+-]+)", out)
    covered = re.findall(r"eager ([\d.]+), ours ([\d.]+)", out)  # by chosen tokens, which need not be the same
    assert len(gaps) == {"point_cloud": 2, "merge_video_tokens": 0}.get(name, 1), out
    assert len(covered) == (3 if name == "merge_video_tokens" else 0), out
    assert all(float(gap) < 1e-4 for gap in gaps), out
    assert all(float(ours) < 1.05 * float(eager) for eager, ours in covered), out


def test_every_example_is_tested() -> None:
    found = {path.stem for path in (ROOT / "bench/examples").glob("[a-z]*.py")}
    assert found == {*TINY, "train_ddp"}


def test_two_processes() -> None:
    """As a process of its own: it starts two more."""
    options = ["--frames", "27", "--channels", "32", "--steps", "1"]
    command = [sys.executable, "-m", "bench.examples.train_ddp", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "both processes hold the same parameters" in done.stdout


def test_convergence(
    tmp_path: Path, run: Callable[[str, str], tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    convergence = importlib.import_module("bench.convergence")
    windows, motions = convergence.windows, []
    monkeypatch.setattr(convergence, "windows", lambda seeds, *rest: (motions.append(seeds), windows(seeds, *rest))[1])
    arguments = "--seeds 1 --steps 20 --frames 27 --channels 32 --depth 2 --motions 2 --seconds 6"
    result, _ = run("bench.convergence", f"{arguments} --out {tmp_path}")
    trained, unseen = map(set, motions)
    assert unseen - trained == unseen != set()
    (learnt,) = result["runs"]
    eager, ours = learnt["eager"], learnt["ours"]
    assert eager["losses"][-1] < 0.7 * eager["losses"][0]
    a, b = (convergence.smooth(run["losses"]) for run in (eager, ours))
    assert learnt["largest_gap_percent"] == pytest.approx(100 * float(((a - b).abs() / a).max()))
    assert learnt["largest_gap_percent"] < 2
    assert abs(eager["mpjpe_mm"] - ours["mpjpe_mm"]) < 0.05 * eager["mpjpe_mm"]
    assert {"cpu", "torch", "commit"} <= json.loads((tmp_path / "convergence.json").read_text())["machine"].keys()
    assert (tmp_path / "convergence.png").exists()


def test_convergence_is_measured_in_mm_on_windows_of_one_motion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    convergence = importlib.import_module("bench.convergence")
    inputs, targets = convergence.windows(range(2), 2.0, 27)
    assert len(inputs) == len(targets) == 2 * 9
    motion = generate_motion(1, 2.0)
    torch.testing.assert_close(inputs[10].double(), torch.tensor(normalise(motion.keypoints_2d, 1000, 1000)[9:36]))
    relative = motion.positions_3d - motion.positions_3d[:, :1]
    torch.testing.assert_close(targets[10].double(), torch.tensor(relative[9:36]))
    moved = targets[:17].clone()
    moved[16] += torch.tensor([0.03, 0.0, -0.04])  # metres, in the last window, which is the only one of its batch
    assert convergence.evaluate(torch.nn.Identity(), (moved, targets[:17])) == pytest.approx(50 / 17)
    assert convergence.smooth([1.0, 2.0, 6.0], 2).tolist() == [1.5, 4.0]


def test_whole_model_bench(run: Callable[[str, str], tuple[Any, str]]) -> None:
    wrong, out = run("bench.models", "--channels 32 --depth 4 --batch 1 --rounds 2 --seconds 0")
    assert not wrong
    assert "| training step |" in out
