"""The benchmark's own promises: wrong answers get no time, memory is counted, turns are taken."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hotkernels.bench
from hotkernels.bench import main
from hotkernels.bench.timing import Timing, host_clock, interleaved, machine, peak_memory
from hotkernels.bench.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is no part of the package

from bench import __main__ as suite  # noqa: E402
from bench import harness, models  # noqa: E402

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
    ("gathered_attention", 40, {"k": 2, "regions": 4}),
    ("gathered_attention", 40, {"k": 3, "regions": 10}),
    ("recovery_attention", 10, {}),
    ("recovery_attention", 10, {"core": True}),
]


@pytest.mark.parametrize(
    ("commit", "lost", "told"),
    [
        ("abc", None, None),
        ("unknown", None, None),
        ("abc-dirty", None, "the tree has changes without a commit"),
        ("abc", "_C_cpu: gone", "nothing is fused: _C_cpu: gone"),
    ],
)
def test_what_nobody_could_repeat_is_not_published(
    commit: str,
    lost: str | None,
    told: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(hotkernels.backends.LIBRARIES, "_C_cpu", lost)
    parser = argparse.ArgumentParser()
    harness.check_out(parser, tmp_path, {"commit": commit})
    with contextlib.nullcontext() if told is None else pytest.raises(SystemExit):
        harness.check_out(parser, ROOT / "bench/results", {"commit": commit})
    said = capsys.readouterr().err
    assert told in said if told else not said


@pytest.mark.parametrize("op", FLOATING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_answers_pass(op: str, dtype: torch.dtype) -> None:
    work = WORKLOADS[op](SMALL[op], 10, dtype=dtype)
    assert work.check() is None
    if work.grad_of:
        assert work.check(backward=True) is None


@pytest.mark.parametrize(("op", "keys", "options"), ATTENTION)
@pytest.mark.parametrize("backward", [False, True])
def test_peers_give_the_answer_that_they_are_timed_for(
    op: str, keys: int, options: dict[str, Any], backward: bool
) -> None:
    """But for SDPA where each query has keys of its own: there it attends to all."""
    work = WORKLOADS[op](SMALL[op], keys, **options)
    eager = work.thunk(work.eager, backward)()
    for peer in (work.sdpa, None if backward else work.flex):  # which has no backward pass on CPUs
        if peer is not None and ("regions" in options or "k" not in options):
            torch.testing.assert_close(work.thunk(peer, backward)(), eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "keys", "options"), ATTENTION)
def test_attention_is_checked_in_every_form(op: str, keys: int, options: dict[str, Any]) -> None:
    work = WORKLOADS[op](SMALL[op], keys, **options)
    assert work.check() is None
    assert work.check(backward=True) is None
    dense_instead = "k" in options  # SDPA has no keys per query
    if work.sdpa is not None and not dense_instead:
        assert dataclasses.replace(work, ours=work.sdpa).check(backward=True) is None


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("dpc_knn", {"center": 20, "k": 3}),
        ("dpc_knn", {"smooth": True}),
        ("gather_tokens", {"pos": False}),
        ("merge_tokens", {"weighted": False}),
    ],
)
def test_right_answers_pass_in_other_forms(op: str, options: dict[str, Any]) -> None:
    work = WORKLOADS[op](SMALL[op] if op != "dpc_knn" else (2, 40, 8), 10, **options)
    assert work.check() is None
    assert not work.grad_of or work.check(backward=True) is None


@pytest.mark.parametrize(("op", "keys", "options"), [*ATTENTION, *((op, 10, {}) for op in WORKLOADS)])
def test_the_backend_that_is_asked_for_serves(op: str, keys: int, options: dict[str, Any]) -> None:
    """Here one that cannot serve tensors on a CPU."""

    def run() -> None:
        work = WORKLOADS[op](SMALL[op], keys, **options, backend="cuda")
        work.ours(*work.args)

    with pytest.raises(ValueError, match=r": backend must be "):
        run()


def test_a_best_score_of_0_is_reached() -> None:
    assert WORKLOADS["dpc_knn"]((4, 1, 8), 1, k=1).check() is None


@pytest.mark.parametrize(("op", "keys", "options"), [*ATTENTION, ("gather_tokens", 10, {}), ("merge_tokens", 10, {})])
def test_backward_is_that_of_every_floating_argument(op: str, keys: int, options: dict[str, Any]) -> None:
    work = WORKLOADS[op](SMALL[op], keys, **options)
    assert work.grad_of == tuple(i for i, arg in enumerate(work.args) if arg.is_floating_point())


@pytest.mark.parametrize(("op", "keys", "options"), [*ATTENTION, *((op, 10, {}) for op in FLOATING)])
def test_no_argument_repeats_the_numbers_of_another(op: str, keys: int, options: dict[str, Any]) -> None:
    args = [arg.flatten()[:8] for arg in WORKLOADS[op](SMALL[op], keys, **options).args if arg.is_floating_point()]
    assert not [(a, b) for a, b in itertools.combinations(args, 2) if torch.equal(a, b) or torch.equal(a.exp(), b)]


def test_tokens_are_chosen_as_hot_does() -> None:
    """Gathered in ascending order; the centre among them, where one is asked for."""
    work = WORKLOADS["dpc_knn"]((2, 40, 8), 10, center=20)
    for function in (work.eager, work.ours):
        assert (function(*work.args)[0] == 20).any(1).all()
    assert (WORKLOADS["gather_tokens"](SMALL["gather_tokens"], 10).args[1].diff() > 0).all()


@pytest.mark.parametrize(("backward", "times"), [(False, 2), (True, 3)])
def test_an_error_may_be_so_many_times_pytorchs_own(backward: bool, times: int) -> None:
    """In its own dtype, against float64; in float64 itself there is nothing to compare to but a few roundings."""

    def scaled(error: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x * (1 if x.dtype == torch.float64 else 1 + error)

    work = Workload("", (torch.linspace(-1, 1, 9),), scaled(1e-3), scaled((times - 0.1) * 1e-3), grad_of=(0,))
    assert work.check(backward) is None
    for error in ((times + 0.1) * 1e-3, -(times + 0.1) * 1e-3, torch.nan):
        assert "from float64" in (dataclasses.replace(work, ours=scaled(error)).check(backward) or "")
    exact = Workload("", (work.args[0].double(),), lambda x: x, lambda x: x * (1 + 1e-12), grad_of=(0,))
    assert "from float64" in (exact.check(backward) or "")


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


def test_times_are_medians_of_what_the_clock_says() -> None:
    """One call and one round by the clock come before; the slowest says how many rounds, each how many in a row."""
    called: list[str] = []
    asked: list[tuple[str, int]] = []
    said = {"a": iter([1e-3, 1, 2, 10, 4, 3]), "b": iter([0.5, *[7] * 5])}

    def clock(thunk: Callable[[], str], repeats: int) -> float:
        asked.append((name := thunk(), repeats))
        return next(said[name])

    ticks: list[None] = []
    timings = interleaved(
        {name: lambda name=name: (called.append(name), name)[1] for name in "ab"},
        2.6,
        least=2,
        tick=lambda: ticks.append(None),
        clock=clock,
    )
    assert timings == {"a": Timing(3, 1.5, 7, 5), "b": Timing(7, 7, 7, 5)}
    assert asked == [("a", 1), ("b", 1), *[("a", 2), ("b", 1)] * 5]
    assert called == ["a", "a", "b", "b", *"ab" * 5]
    assert len(ticks) == 5


def test_seconds_and_bytes_are_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", iter([1.0, 4.0]).__next__)
        assert host_clock(lambda: calls.append(None), 6) == 0.5
    assert len(calls) == 6
    told = iter(["VmPeak: 9 kB\nVmHWM:\t   100 kB\nVmRSS: 1 kB", "VmPeak: 9 kB\nVmHWM:\t   350 kB\nVmRSS: 1 kB"])
    done: list[str] = []
    monkeypatch.setattr(Path, "write_text", lambda path, text: done.append(f"{path} {text}"))
    monkeypatch.setattr(Path, "read_text", lambda path: (done.append(path.name), next(told))[1])
    assert peak_memory(lambda: done.append("call")) == 250 * 1024
    assert done == ["/proc/self/clear_refs 5", "status", "call", "status"]
    done.clear()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000 + 10 * len(done))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000 + 100 * len(done))
    assert peak_memory(lambda: done.append("call"), "cuda:0") == 5200 - 1010


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted on Linux only")
def test_peak_memory_sees_what_is_freed_again() -> None:
    assert peak_memory(lambda: torch.ones(1 << 24).sum()) >= 60 << 20  # of 64 MiB; Linux counts pages in batches
    assert peak_memory(lambda: None) < 1 << 20


def test_peak_memory_counts_what_goes_into_freed_pages() -> None:
    freed, between = [bytearray(60_000) for _ in range(500)], bytearray(60_000)  # the heap does not shrink below it
    freed.clear()
    assert peak_memory(lambda: [bytearray(60_000) for _ in range(500)]) >= 20 << 20
    assert between


def test_machine_is_described() -> None:
    assert {"date", "cpu", "threads", "isa", "torch", "hotkernels"} <= machine().keys()


def said_by(calls: dict[str, Callable[[], float]], *rest: Any, **options: Any) -> dict[str, Timing]:
    """In the place of interleaved: a call's result is its time."""
    return {name: Timing(t := call(), 0.5 * t, 2 * t, 7) for name, call in calls.items()}


def pretend(wrong: str | None = None) -> Workload:
    """Contenders whose result is what said_by takes for their time, in seconds."""
    functions = {name: lambda x, t=t: t for name, t in (("eager", 6e-3), ("ours", 2e-3), ("sdpa", 4e-3))}
    return Workload("it", (torch.ones(1),), **functions, wrong=lambda theirs, ours: wrong)


def test_the_command_says_whose_time_and_memory_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[Any] = []

    def build(*args: Any, k: int = 5, dtype: torch.dtype = torch.float32, **rest: Any) -> Workload:
        built.append((args, k, dtype, rest))
        return pretend()

    monkeypatch.setitem(WORKLOADS, "dpc_knn", build)
    monkeypatch.setattr(hotkernels.bench, "interleaved", said_by)
    monkeypatch.setattr(hotkernels.bench, "peak_memory", lambda call, device: int(call() * 1e3) << 20)
    assert main(["--shape", "2,40,8", "-k", "3", "--dtype", "float16", "--backend", "cpp"]) == 0
    assert built == [(((2, 40, 8), 10), 3, torch.float16, {"device": "cpu", "backend": "cpp"})]
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-3:] == [
        "eager 6.000 ms [3.000, 12.000] 1.00x 6.0 MiB extra",
        "ours 2.000 ms [1.000, 4.000] 3.00x 2.0 MiB extra",
        "sdpa 4.000 ms [2.000, 8.000] 1.50x 4.0 MiB extra",
    ]
    monkeypatch.setitem(WORKLOADS, "dpc_knn", lambda *args, **options: pretend(f"{torch.get_num_threads()} wrong"))
    assert main(["--shape", "2,40,8", "--threads", "3"]) == 1
    assert capsys.readouterr().out.endswith("\nWRONG: 3 wrong\n")


@pytest.mark.parametrize("backward", [True, False])
def test_the_command_checks_and_times_gradients_if_asked(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    asked: list[Any] = []
    check, thunk = Workload.check, Workload.thunk
    monkeypatch.setattr(Workload, "check", lambda self, *args: asked.append(args[:1]) or check(self, *args))
    monkeypatch.setattr(Workload, "thunk", lambda self, f, *args: asked.append(args[:1]) or thunk(self, f, *args))
    before = torch.get_num_threads()
    assert main(["--op", "merge_tokens", "--shape", "2,40,8", "--seconds", "0", *["--backward"] * backward]) == 0
    assert {*asked} == {(backward,)}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", [1]), ("cuda", []), ("cpu:0", [])])
def test_the_command_measures_the_gpu_that_it_is_told(
    monkeypatch: pytest.MonkeyPatch, device: str, chosen: list[int]
) -> None:
    current: list[int] = []
    clocks: list[list[int]] = []
    monkeypatch.setattr(hotkernels.bench, "_device", lambda text: text)
    monkeypatch.setattr(hotkernels.bench, "EventClock", lambda: clocks.append(list(current)))
    monkeypatch.setattr(hotkernels.bench, "interleaved", said_by)
    monkeypatch.setattr(hotkernels.bench, "peak_memory", lambda call, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    monkeypatch.setitem(WORKLOADS, "dpc_knn", lambda *args, **options: pretend())
    assert main(["--shape", "2,40,8", "--device", device]) == 0
    assert current == chosen
    assert clocks == ([] if device.startswith("cpu") else [chosen])


def test_a_row_says_whose_time_and_memory_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    row = harness.Row("an_op", "a_row", False, pretend, memory=True, contenders=("eager", "sdpa", "ours"))
    monkeypatch.setattr(harness, "interleaved", said_by)
    monkeypatch.setattr(harness, "peak_memory", lambda call: int(call() * 1e3) << 20)
    result = harness.run(row, 0.0)
    assert dict(zip(harness.COLUMNS, harness.cells(result), strict=True)) == {
        "row": "a_row", "x": "it", "pass": "fwd", "eager ms": "6.000", "compile ms": "", "sdpa ms": "4.000",
        "ours ms": "2.000", "eager / ours": "3.00x", "compile / ours": "", "sdpa / ours": "2.00x",
        "extra MiB": "6 / 4 / 2",
    }  # fmt: skip
    result["seconds"]["eager"]["median"] = 0.5
    assert harness.cells(result)[3] == "500.0"


def test_a_wrong_row_gets_no_time_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build() -> Workload:
        return pretend("off by one")

    rows = [harness.Row("an_op", name, False, build, quick=name == "a", cpu=name != "c") for name in "abc"]
    result = harness.run(rows[0], 0.0)
    assert "seconds" not in result
    assert harness.cells(result)[:5] == ["a", "it", "fwd", "WRONG: off by one", ""]
    monkeypatch.setattr(harness, "import_rows", lambda ops: rows)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for options, ran in ((["--quick"], "a"), ([], "ab"), (["--rows", "b"], "b"), (["--rows", "c"], "")):
        monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path / ran), *options])
        assert suite.main() == bool(ran)
        (saved,) = (tmp_path / ran).glob("*.json")
        assert [row["row"] for row in json.loads(saved.read_text())["rows"]] == list(ran)


class Pretended(torch.nn.Module):
    """A model that gives its one parameter times x."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        return self.factor * x


def test_the_models_line_says_whose_time_and_memory_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, threads: None
) -> None:
    several = {name: Pretended() for name in ("eager", "swapped", "native")}
    seconds = dict(zip(several.values(), (6.0, 3.0, 2.0), strict=True))
    monkeypatch.setattr(models, "build", lambda options: (several, 0.0))
    passes = {"forward": 1, "training step": 3}
    monkeypatch.setattr(
        models, "passes", lambda model, x: {name: lambda n=n: n * seconds[model] for name, n in passes.items()}
    )
    monkeypatch.setattr(models, "interleaved", said_by)
    monkeypatch.setattr(models, "peak_memory", lambda call: None if call() == 9 else int(call()) << 20)
    assert models.main(["--out", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| forward | 6 | 3 | 2 | 2.00x | 3.00x | 6 / 3 / 2 |",
        "| training step | 18 | 9 | 6 | 2.00x | 3.00x | 18 / ? / 6 |",
    ]
    saved = json.loads((tmp_path / "a.json").read_text())["rows"]["training step"]
    assert [saved[name]["median"] for name in several] == [18, 9, 6]
    several["swapped"] = Pretended(1.001)
    assert models.main([]) == 1
    assert "\nWRONG: swapped differs from the published model by 0.001 of" in capsys.readouterr().out


def test_the_vit_line_is_of_blocks_that_call_sdpa(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, threads: None
) -> None:
    monkeypatch.setattr(models, "VIT", ((1, 5, 16, 2), (2, 7, 32, 4)))
    assert models.main(["vit", "--rounds", "2", "--seconds", "0", "--out", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert "| pass | sdpa s | swapped s | sdpa / swapped | extra MiB |" in out
    assert [line.split(" | ")[0] for line in out.splitlines()[-4:]] == [
        f"| {label} {which}" for label in ("1x5x16", "2x7x32") for which in ("forward", "training step")
    ]
    assert list(json.loads((tmp_path / "a.json").read_text())["rows"]) == ["1x5x16", "2x7x32"]
    both = models.build_vit(32, 4)
    assert {type(block.attn).__name__ for block in both["swapped"]} == {"FusedSdpaAttention"}
    monkeypatch.setattr(models, "build_vit", lambda *size: {"sdpa": Pretended(), "swapped": Pretended(1.1)})
    assert models.main(["vit"]) == 1
    assert "\nWRONG: the swapped blocks differ by 0." in capsys.readouterr().out


@pytest.mark.parametrize("half", [False, True])
def test_a_forward_pass_evaluates_and_a_training_step_learns(half: bool) -> None:
    """In any order; the gradient of a step is that of the step alone."""
    model, modes = Pretended(3.0), []
    model.register_forward_hook(lambda module, *rest: modes.append((module.training, torch.is_grad_enabled())))
    model.register_forward_hook(lambda *rest: halves.append(torch.is_autocast_enabled("cpu")))
    halves: list[bool] = []
    calls = models.passes(model, torch.ones(4, 1), half)
    assert calls["forward"]().tolist() == [[3.0]] * 4
    for _ in range(2):
        calls["training step"]()
        assert model.factor.grad == 6  # of the mean of squares
    calls["forward"]()
    assert modes == [(False, False), (True, True), (True, True), (False, False)]
    assert halves == [half] * 4
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("op", WORKLOADS)
def test_command_prints_ratios(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    shape = ",".join(map(str, SMALL[op]))
    assert main(["--op", op, "--shape", shape, "--clusters", "10", "--seconds", "0.01"]) == 0
    assert "1.00x" in (out := capsys.readouterr().out)
    assert "ours" in out
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("op", "options", "told"),
    [
        ("merge_tokens", [], "2x40x8 -> 10, weighted, float32, forward"),
        ("merge_tokens", ["--dtype", "bfloat16", "--backward"], "2x40x8 -> 10, weighted, bfloat16, forward + backward"),
        ("invert_index", [], "2x40x3 into 40, int64, forward"),
        ("invert_index", ["--clusters", "100"], "2x40x3 into 100, int64, forward"),
    ],
)
def test_command_names_the_call(op: str, options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the dtype of its input; an index may point to more tokens than there are queries."""
    shape = ",".join(map(str, SMALL[op]))
    assert main(["--op", op, "--shape", shape, "--seconds", "0", *options]) == 0
    assert f"\n{op} {told}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shape", "2,x"], "must be sizes of at least 1, as in 16,243,512, got '2,x'"),
        (["--shape", "2,0,8"], "must be sizes of at least 1"),
        (["--shape", "2,40"], "--shape must be B,N,C"),
        (["--op", "recovery_attention", "--shape", "2,40,8"], "--shape must be B,F,J,C, got 3 sizes"),
        (
            ["--op", "gathered_attention", "--shape", "2,40,8", "--heads", "3"],
            "heads must be a divisor of C = 8, got 3",
        ),
        (["--shape", "2,40,8", "--clusters", "41"], "--clusters must be in [1, N = 40], got 41"),
        (["--shape", "2,40,8", "--backend", "abacus"], "backend must be"),
        (["--shape", "2,40,8", "-k", "41"], "dpc_knn: k must be in"),
        (["--shape", "1,99999999999,999999999"], "--shape must be one that fits the memory, got (1, 99999999999,"),
        (["--shape", "1,99999999999999999999,9"], "must be sizes of at least 1"),
        (["--shape", "2,40,8", "--device", "moon"], "must be cpu or cuda, got 'moon'"),
        (["--shape", "2,40,8", "--device", "meta"], "must be cpu or cuda, got 'meta'"),
        pytest.param(
            ["--shape", "2,40,8", "--device", "cuda"],
            "must be a device that is here, got 'cuda' (torch has no CUDA)",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA"),
        ),
        (["--shape", "2,40,8", "--device", "cpu:x"], "must be a device that is here, got 'cpu:x' (Invalid device"),
        (["--shape", "2,40,8", "--seconds", "nan"], "must be a number of at least 0, got 'nan'"),
        (["--shape", "2,40,8", "--seconds", "inf"], "must be a number of at least 0, got 'inf'"),
        (["--shape", "2,40,8", "--seconds", "-1"], "must be a number of at least 0, got '-1'"),
        (["--shape", "2,40,8", "--seconds", "soon"], "must be a number of at least 0, got 'soon'"),
        (["--shape", "2,40,8", "--threads", "1000000"], "four to each core, got 1000000"),
        (["--shape", "2,40,8", "--threads", "0"], "must be at least 1, got 0"),
        (["--shape", "2,40,8", "--backward"], "has no backward"),
        (["--op", "merge_tokens", "--shape", "2,40,8", "-k", "3"], "has no option 'k'"),
        (
            ["--op", "gathered_attention", "--shape", "2,40,64", "--clusters", "9", "-k", "3"],
            "(keys per query), not both",
        ),
        (["--op", "recovery_attention", "--shape", "2,40,3,512", "--heads", "1"], "num_heads must be at least"),
        (["--op", "invert_index", "--shape", "2,40"], "--shape must be B,Nq,K, got 2 sizes"),
        (["--op", "invert_index", "--shape", "2,40,3", "--dtype", "float32"], "invert_index has no option 'dtype'"),
    ],
)
def test_wrong_commands_say_why(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
