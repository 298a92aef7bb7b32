"""The benchmark's own promises: wrong answers get no time, memory is counted, turns are taken."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from hotkernels.bench import WORKLOADS, interleaved, machine, main, peak_memory

SMALL = {
    "dpc_knn": (2, 40, 8),
    "gather_tokens": (2, 40, 3, 8),
    "merge_tokens": (2, 40, 8),
    "gathered_attention": (2, 40, 64),
    "recovery_attention": (2, 40, 3, 64),
    "invert_index": (2, 40, 3),
}
FLOATING = sorted(WORKLOADS.keys() - {"invert_index"})
ATTENTION = [
    ("gathered_attention", 40, {}),
    ("gathered_attention", 10, {}),
    ("gathered_attention", 10, {"k": 5}),
    ("gathered_attention", 10, {"k": 5, "local": True, "inverted": True, "heads": 4}),
    ("recovery_attention", 10, {}),
    ("recovery_attention", 10, {"core": True}),
]


@pytest.mark.parametrize("op", FLOATING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_answers_pass(op: str, dtype: torch.dtype) -> None:
    work = WORKLOADS[op](SMALL[op], 10, dtype=dtype)
    assert work.check() is None
    if work.grad_of:
        assert work.check(backward=True) is None


@pytest.mark.parametrize(("op", "keys", "options"), ATTENTION)
def test_attention_is_checked_in_every_form(op: str, keys: int, options: dict[str, Any]) -> None:
    work = WORKLOADS[op](SMALL[op], keys, **options)
    assert work.check() is None
    assert work.check(backward=True) is None
    dense_instead = "k" in options  # SDPA has no keys per query
    if work.sdpa is not None and not dense_instead:
        assert dataclasses.replace(work, ours=work.sdpa).check(backward=True) is None


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("op", [op for op in FLOATING if op != "dpc_knn"])
def test_wrong_values_are_seen(op: str, backward: bool) -> None:
    work = WORKLOADS[op](SMALL[op], 10)
    worse = dataclasses.replace(work, ours=lambda x, *rest: work.ours(x * 1.001, *rest))
    assert "from float64" in (worse.check(backward) or "")


def test_a_wrong_inverse_is_seen() -> None:
    work = WORKLOADS["invert_index"](SMALL["invert_index"], 10)
    assert work.check() is None
    backwards = dataclasses.replace(work, ours=lambda index: [t.flip(-1) for t in work.ours(index)])
    assert "another inverse" in (backwards.check() or "")


def test_wrong_clusters_are_seen() -> None:
    work = WORKLOADS["dpc_knn"]((2, 40, 8), 10, k=3)
    first = torch.arange(10).expand(2, -1)
    some = dataclasses.replace(work, ours=lambda x, noise: (first, work.ours(x, noise)[1]))
    assert "best score" in (some.check() or "")
    apart = dataclasses.replace(work, ours=lambda x, noise: (work.ours(x, noise)[0], work.ours(x, noise)[1].roll(1, 1)))
    assert "farther away" in (apart.check() or "")


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    slow = torch.randn(700, 700)
    timings = interleaved({n: lambda n=n: (calls.append(n), slow @ slow) for n in "ab"}, seconds=0.0, least=4)
    assert timings["a"].rounds == 4
    assert timings["a"].lower <= timings["a"].median <= timings["a"].upper
    changes = sum(one != other for one, other in itertools.pairwise(calls))
    assert changes >= 2 * 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted on Linux only")
def test_peak_memory_sees_what_is_freed_again() -> None:
    assert peak_memory(lambda: torch.ones(1 << 24).sum()) >= 60 << 20  # of 64 MiB; Linux counts pages in batches
    assert peak_memory(lambda: None) < 1 << 20


def test_machine_is_described() -> None:
    assert {"date", "cpu", "threads", "isa", "torch", "hotkernels"} <= machine().keys()


@pytest.mark.parametrize("op", WORKLOADS)
def test_command_prints_ratios(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    shape = ",".join(map(str, SMALL[op]))
    assert main(["--op", op, "--shape", shape, "--clusters", "10", "--seconds", "0.01"]) == 0
    assert "1.00x" in (out := capsys.readouterr().out)
    assert "ours" in out
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shape", "2,x"], "invalid shape value"),
        (["--shape", "2,40"], "--shape must be B,N,C"),
        (["--op", "recovery_attention", "--shape", "2,40,8"], "--shape must be B,F,J,C, got 3 sizes"),
        (
            ["--op", "gathered_attention", "--shape", "2,40,8", "--heads", "3"],
            "heads must be a divisor of C = 8, got 3",
        ),
        (["--shape", "2,40,8", "--clusters", "41"], "--clusters must be in [1, N = 40], got 41"),
        (["--shape", "2,40,8", "--backend", "abacus"], "backend must be"),
        (["--shape", "2,40,8", "-k", "41"], "dpc_knn: k must be in"),
        (["--shape", "2,40,8", "--device", "moon"], "invalid device value"),
        (["--shape", "2,40,8", "--threads", "0"], "invalid count value"),
        (["--shape", "2,40,8", "--backward"], "has no backward"),
        (["--op", "merge_tokens", "--shape", "2,40,8", "-k", "3"], "has no option 'k'"),
    ],
)
def test_wrong_commands_say_why(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
