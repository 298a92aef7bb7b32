"""`make gpu`, as far as it goes without a GPU: its stages, what they survive, and what they say of what they saw."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import run_once
import torch

from hotkernels.backends import explain
from hotkernels.bench.timing import EventClock, captured
from hotkernels.bench.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # bench/ is no part of the package

from bench import __main__ as suite  # noqa: E402
from bench import gpu, gpu_rows, harness, supervise  # noqa: E402

FRAGILE = """
import os, sys, time
from pathlib import Path
from bench.supervise import LOST, Journal
journal = Journal(Path(sys.argv[1]))
if not journal.known:
    journal.write(tasks=5)
for task in ("first", "crashes", "hangs", "loses", "last"):
    if task in journal.known:
        continue
    journal.start(task)
    if task == "crashes":
        os.abort()
    if task == "hangs":
        print("here it hangs", flush=True)
        time.sleep(600)
    journal.end(task, "passed")
    if task == "loses":
        os._exit(LOST)
"""


def test_what_crashes_or_hangs_takes_nothing_else_along(tmp_path: Path) -> None:
    journal, log = tmp_path / "journal.jsonl", tmp_path / "log"
    command = [sys.executable, "-c", FRAGILE, str(journal)]
    deadline = time.monotonic() + 60
    assert supervise.supervise(command, journal, log, deadline, 3.0, ROOT, {"PYTHONPATH": str(ROOT)}) is None
    states = {entry["id"]: (entry["state"], entry.get("why")) for entry in supervise.results(journal)}
    assert [states[task][0] for task in ("first", "loses", "last")] == ["passed"] * 3
    assert states["crashes"] == ("failed", "the process died with status -6")
    assert states["hangs"] == ("failed", "hung for 3 s")
    assert supervise.missing(journal) == 0
    assert "here it hangs" in "\n".join(supervise.tail(log))


def test_a_slow_start_is_no_hang(tmp_path: Path) -> None:
    """Many processes import at once."""
    journal = tmp_path / "journal.jsonl"
    slow = "import sys, time; time.sleep(4.5); open(sys.argv[1], 'a').write('{}\\n')"
    command, deadline = [sys.executable, "-c", slow, str(journal)], time.monotonic() + 60
    assert supervise.supervise(command, journal, tmp_path / "log", deadline, 4.0, ROOT, {}) is None
    assert journal.read_text() == "{}\n"


def test_a_program_out_of_time_or_of_no_use_is_named(tmp_path: Path) -> None:
    journal, log, now = tmp_path / "journal.jsonl", tmp_path / "log", time.monotonic()
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert supervise.supervise(command, journal, log, now + 0.5, 60, ROOT, {}) == "out of time"
    command[-1] = "raise SystemExit(3)"
    told = supervise.supervise(command, journal, log, now + 60, 60, ROOT, {})
    assert told == "ended with status 3 without doing anything"
    assert supervise.run([*command[:2], "import time; time.sleep(60)"], log, 0.5, ROOT, {}) is None


def test_a_journal_of_a_program_started_twice(tmp_path: Path) -> None:
    """The second time it planned what was left; a line may be cut off."""
    journal = tmp_path / "journal.jsonl"
    states = [("a", "started"), ("a", "passed"), ("b", "started"), ("b", "skipped")]
    entries = [{"tasks": 4}, *({"id": task, "state": state} for task, state in states), {"tasks": 2}]
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"id": "c", "sta')
    assert [entry["id"] for entry in supervise.results(journal)] == ["a", "b"]
    assert supervise.missing(journal) == 2


SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift 2; done
"$@" || exit $?
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_every_stage_but_the_build_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other and at once; the last rows of the benchmark are the tiny ones of one op."""
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.setenv("COMMIT", "abc1234")
    monkeypatch.setattr(harness, "OPS", ["gather_tokens"])
    out = tmp_path / "out"
    stages = "doctor,tests,memcheck,warm,bench"
    argv = f"--device cpu --quick --stages {stages} --rows gather_tokens --out {out} --results {tmp_path / 'results'}"
    assert gpu.main(argv.split()) == 0, capsys.readouterr().out
    told = json.loads((out / "summary.json").read_text())
    assert [stage["state"] for stage in told["stages"]] == ["passed"] * 5
    assert {row["id"] for row in told["rows"]} == {"gather_tokens tiny-fwd", "gather_tokens tiny-fwd+bwd"}
    assert told["machine"]["commit"] == "abc1234"
    page = (out / "summary.md").read_text()
    assert "| gather_tokens | cpp-base | " in page
    assert "| tiny | 1x16x64 -> 4 | fwd | graph | " in page
    assert "ERROR SUMMARY: 0 errors" in page
    assert len(list((tmp_path / "results").iterdir())) == 2
    assert len(list(out.iterdir())) <= 8


def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **journals: list[dict[str, Any]]) -> gpu.Session:
    """A session whose stages left these journals."""
    monkeypatch.setattr(gpu, "about", lambda gpu: {"gpu": "NVIDIA Test", "cpu": "a cpu", "commit": "abc1234"})
    made = gpu.Session("cuda", False, gpu.STAGES, "", 510.0, tmp_path, tmp_path)
    for name, entries in journals.items():
        lines = [json.dumps(entry) + "\n" for entry in entries]
        made.journal(f"{name}-0").write_text("".join(lines))
    return made


def test_a_part_does_not_replace_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = harness.save(tmp_path, "Test(R) CPU @ 2 GHz", {}, "whole", [])
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "gather_tokens", "--rows", "tiny", "--out", str(tmp_path)])
    monkeypatch.setattr(harness, "header", lambda: {"cpu": "Test(R) CPU @ 2 GHz"})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert suite.main() == 0
    assert whole.read_text() == "whole"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {whole.stem + part + end for part in ("", "-quick-gather_tokens-tiny") for end in (".md", ".json")}


def test_a_run_publishes_only_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(harness, "save", lambda folder, *rest: folders.append(folder))
    monkeypatch.setattr(harness, "report", lambda rows, seconds: [])
    monkeypatch.setattr(harness, "header", lambda: {"cpu": "a cpu"})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for options in ([], ["--out", "bench/results"]):
        monkeypatch.setattr(sys, "argv", ["bench", *options])
        assert suite.main() == 0
    assert folders == [ROOT / "build/bench", Path("bench/results")]


def test_committed_results_are_of_whole_runs() -> None:
    for path in Path(harness.__file__).parent.glob("results/*.json"):
        rows = json.loads(path.read_text()).get("rows")
        if isinstance(rows, list) and "op" in rows[0]:
            assert {row["op"] for row in rows} == set(harness.OPS), path.name


def timed(**microseconds: float) -> dict[str, Any]:
    return {name.replace("_", " "): {"median": t * 1e-6} for name, t in microseconds.items()}


@pytest.mark.parametrize(
    ("stage", "states", "stopped", "verdict"),
    [
        ("tests", "passed passed", "", "passed"),
        ("tests", "passed failed", "", "failed"),
        ("tests", "passed skipped", "", "passed"),
        ("tests", "skipped skipped", "", "failed"),
        ("tests", "passed", "", "failed"),
        ("tests", "passed passed", "ended with status 3", "failed"),
        ("bench", "passed passed", "", "passed"),
        ("bench", "passed failed", "", "failed"),
        ("bench", "passed", "out of time", "passed"),
        ("bench", "passed passed", "ended with status 3", "failed"),
        ("bench", "", "out of time", "failed"),
        ("tune", "passed passed", "", "passed"),
        ("tune", "passed failed", "", "failed"),
        ("tune", "passed", "out of time", "failed"),
        ("tune", "", "", "failed"),
        ("warm", "failed", "out of time", "passed"),
    ],
)
def test_what_a_stage_passes_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, states: str, stopped: str, verdict: str
) -> None:
    """Of two tasks."""
    entries: list[dict[str, Any]] = [{"id": str(i), "state": state} for i, state in enumerate(states.split())]
    made = session(tmp_path, monkeypatch, **{stage: [{"tasks": 2}, *entries]})
    monkeypatch.setattr(made, "shards", lambda *command, **options: [f"process 0: {stopped}"] * bool(stopped))
    monkeypatch.setattr(gpu, "CACHE", tmp_path)
    assert getattr(gpu, stage)(made).state == verdict


@pytest.mark.parametrize(
    ("code", "loaded", "verdict"),
    [
        (0, ("_C_cpu", "_C_cuda", "triton"), "passed"),
        (0, ("_C_cpu", "triton"), "failed"),
        (1, ("_C_cpu", "_C_cuda", "triton"), "failed"),
    ],
)
def test_all_libraries_must_load_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, loaded: tuple[str, ...], verdict: str
) -> None:
    made = session(tmp_path, monkeypatch)
    made.log("doctor").write_text("".join(f"  {name:<12}loaded\n" for name in loaded))
    monkeypatch.setattr(made, "run", lambda *command, **options: code)
    assert gpu.doctor(made) == gpu.Outcome("doctor", verdict, f"loaded: {', '.join(loaded)}")


@pytest.mark.parametrize("state", ["passed", "failed", "skipped", "hazards"])
def test_only_a_failed_stage_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(gpu, "doctor", lambda session: gpu.Outcome("doctor", state, ""))
    monkeypatch.setattr(gpu, "warm", lambda session: gpu.Outcome("warm", "passed", ""))
    out, results = tmp_path / "out", tmp_path / "results"
    argv = ["--device", "cpu", "--quick", "--stages", "doctor,warm", "--out", str(out), "--results", str(results)]
    assert gpu.main(argv) == (state == "failed")
    assert (out / "summary.md").exists()
    assert len(list(out.glob("*-quick-doctor-warm.md"))) == 1, "a part does not replace the whole"
    assert not results.exists(), "nothing was measured or proved"


def test_the_summary_says_what_passed_what_failed_and_who_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def test(name: str, op: str, state: str, why: str = "") -> dict[str, Any]:
        return {"id": name, "state": state, "op": op, "backend": "cuda", "why": why}

    row = {
        "op": "dpc_knn", "row": "hot", "x": "1x243x512", "pass": "fwd", "backend": "cuda", "bytes": 1_000_000,
        "call": timed(ours=30, eager=90, sdpa_flash=20), "graph": timed(ours=10, eager=80), "in a row": {},
        "host": {"ours": 2e-5, "eager": 1e-4}, "refused": {"flex": "no such case"}, "extra_bytes": {"ours": 1 << 20},
    }  # fmt: skip
    model = {
        "x": "[1, 243, 17, 2] bf16",
        "wrong": None,
        "forward": {"call": timed(eager=3000, swapped=2000, native=1000), "graph": timed(swapped=1500, native=500)},
    }
    made = session(
        tmp_path,
        monkeypatch,
        tests=[
            {"tasks": 5},
            test("a", "dpc_knn", "passed"),
            test("b", "merge_tokens", "failed", "off by 0.25"),
            test("c", "merge_tokens", "failed", "off by 0.50"),
            test("d", "gpu", "passed"),
            test("e", "merge_tokens", "passed"),
        ],
        bench=[
            {"id": "bandwidth", "state": "passed", "result": {"copy": 4e12, "empty graph": 2e-6}},
            {"id": "dpc_knn hot-fwd", "state": "passed", "result": row},
            {"id": "model hot_mixste", "state": "passed", "result": model},
            {"id": "merge_tokens hot-fwd", "state": "failed", "why": "wrong by 0.5", "result": {}},
        ],
    )
    page = gpu.summary(made)
    for line in (
        "| dpc_knn | cuda | 1 | 0 | 0 |",
        "| merge_tokens | cuda | 1 | 2 | 0 |",
        "- 2x, e.g. `b`: off by 0.25",
        "- 1x, e.g. `merge_tokens hot-fwd`: wrong by 0.5",
        "A copy moves 4000 GB/s, read and written; an empty graph takes 2.0 us.",
        "| hot | 1x243x512 | fwd | call | 30.0 | 90.0 (3.00x) | 20.0 (0.67x) |  | ours 20, eager 100 |",
        "| hot | 1x243x512 | fwd | graph | 10.0 | 80.0 (8.00x) |  | 2% |  |",
        "- memory, hot: ours 1 MiB",
        "- could not take part: flex: no such case",
        "| hot_mixste | [1, 243, 17, 2] bf16 | forward | call | 3.000 | 2.000 | 1.000 |",
        "| hot_mixste | [1, 243, 17, 2] bf16 | forward | graph |  | 1.500 | 0.500 |",
    ):
        assert f"\n{line}\n" in page, line
    runs = [line for line in page.splitlines() if line.startswith("    (")]
    assert len(runs) == 1, "only what passed, and is a kernel"
    assert runs[0].startswith("    ('dpc_knn', 'cuda'): \"NVIDIA Test, 20")
    assert runs[0].endswith(', abc1234",')
    assert gpu.save(made)[0].name.startswith("nvidia-test-20")
    made.journal("tests-1").write_text('{"tasks": 1}\n')
    assert "GPU_RUNS" not in gpu.summary(made), "not all tests ran"


def test_the_build_goes_on_without_pip_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = session(tmp_path, monkeypatch)
    commands = []

    def run(name: str, *command: str, seconds: float, **env: str) -> int | None:
        commands.append((command, env))
        made.log(name).write_text("fatal error: no such header")
        return codes.pop(0)

    monkeypatch.setattr(made, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "lacking", lambda: ["ninja"])
    monkeypatch.delenv("HOTKERNELS_CUDA_ARCHS", raising=False)
    codes = [1, 0]
    assert gpu.build(made).detail == "missing: ninja; built by setup.build_library; for sm_90a"
    assert [command[1] for command, _ in commands] == ["-m", "-c"]
    assert commands[0][1] == {"HOTKERNELS_BUILD_CUDA": "1", "HOTKERNELS_CUDA_ARCHS": "90a"}
    codes = [1, 1]
    assert gpu.build(made) == gpu.Outcome("build", "failed", "missing: ninja; fatal error: no such header")
    codes = [None, 0]
    assert gpu.build(made).detail == "missing: ninja; out of time", "another way would take as long"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert gpu.architecture() == "120"


@pytest.mark.parametrize(
    ("code", "log", "state"),
    [
        (0, "ERROR SUMMARY: 0 errors", "passed"),
        (9, "ERROR SUMMARY: 3 errors", "failed"),
        (1, "Error: Device not supported", "skipped"),
        (None, "", "failed"),
    ],
)
def test_what_a_sanitizer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None, log: str, state: str
) -> None:
    made = session(tmp_path, monkeypatch)
    made.log("memcheck").write_text(log)
    made.log("racecheck").write_text(log)
    monkeypatch.setattr(made, "run", lambda *command, **options: code)
    monkeypatch.setattr(gpu, "find", lambda tool: None)
    assert gpu.sanitize(made, "memcheck").state == "skipped"
    monkeypatch.setattr(gpu, "find", lambda tool: tool)
    assert gpu.sanitize(made, "memcheck").state == state
    assert gpu.sanitize(made, "racecheck").state == ("hazards" if code == 9 else state)


def test_a_stage_that_breaks_is_a_failed_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = session(tmp_path, monkeypatch)
    monkeypatch.setattr(gpu, "doctor", lambda session: 1 / 0)
    assert gpu.stage(made, "doctor").state == "failed"
    assert "ZeroDivisionError" in (tmp_path / "summary.md").read_text()


def test_the_fastest_blocks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"64 x 32": {"median": 30e-6}, "128 x 32": {"median": 20e-6}}
    found = {"chosen": "64 x 32", "times": times, "refused": {"256 x 32": "out of memory"}}
    gone = {"chosen": "1", "times": {}, "refused": {"1": "another answer"}}
    entry = {"id": "a row", "state": "passed", "result": {"choices": {"long_blocks": found, "short_pairs": gone}}}
    made = session(tmp_path, monkeypatch, **{"tune-0": [entry]})
    assert "| a row | long_blocks | 64 x 32 | 30.0 | 128 x 32 | 20.0 | 1.50x | 2, 1 refused |" in gpu.summary(made)
    assert "short_pairs" not in gpu.summary(made)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("bench.gpu: needs a machine with a GPU, got none (torch ")
    with pytest.raises(SystemExit):
        gpu.main(["--stages", "build,bake"])
    assert "got bake" in capsys.readouterr().err


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda as far as clocks and graphs use it: an event is a point in time, a graph remembers nothing."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return (end.at - self.at) * 1e3

    restored: list[Any] = []
    ended: list[Any] = []

    @contextlib.contextmanager
    def capture(graph: Any) -> Iterator[None]:
        yield
        ended.append(graph)

    graph = SimpleNamespace(replay=lambda: None, restored=restored, ended=ended)
    properties = SimpleNamespace(
        L2_cache_size=1 << 20, major=9, minor=0, multi_processor_count=132, total_memory=1 << 37
    )
    pretend = {
        "Event": Event, "Stream": Stream, "current_stream": Stream, "synchronize": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(), "graph": capture,
        "set_stream": restored.append,
        "CUDAGraph": lambda: graph, "current_device": lambda: 0, "device_count": lambda: 1,
        "get_device_properties": lambda device: properties, "empty_cache": lambda: None,
    }  # fmt: skip
    for name, value in pretend.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(EventClock, "device", "cpu")  # not torch.zeros: Dynamo may look at torch now, once and for all
    return graph


def test_events_and_graphs(pretended: SimpleNamespace) -> None:
    assert 0.01 < EventClock()(lambda: time.sleep(0.01)) < 0.1
    calls: list[int] = []
    out, replay = captured(lambda: calls.append(1) or len(calls), calls=3)
    assert (out, len(calls), replay) == (5, 5, pretended.replay)
    assert (len(pretended.ended), len(pretended.restored)) == (1, 0)
    with pytest.raises(ZeroDivisionError):
        captured(lambda: calls.append(1) or 1 // (len(calls) < 8))
    assert len(pretended.restored) == 1, "a refused capture leaves its stream behind"
    assert len(pretended.ended) == 2, "a refused capture leaves the generator waiting"
    bench = gpu_rows.Bench("cuda", 0.01)
    assert isinstance(bench.clock, EventClock)
    assert bench.graph(lambda: None) is pretended.replay
    bench.forget()
    assert gpu.about(True).items() >= {"capability": "9.0", "multiprocessors": 132, "gpus": 1}.items()


def test_a_row_of_the_gpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of 20 in a row are of one; bytes are of all arguments and the result; nothing wrong is timed."""
    bench = gpu_rows.Bench("cpu", 0.001)
    monkeypatch.setattr(
        bench, "times", lambda thunks: {n: {"median": 2e-4, "lower": 1e-4, "upper": 4e-4} for n in thunks}
    )
    monkeypatch.setattr(bench, "host_seconds", lambda thunk: 1e-5)
    monkeypatch.setattr(gpu_rows, "peak_memory", lambda thunk, device: thunk)
    work = WORKLOADS["gather_tokens"]((2, 40, 3, 8), 10)
    row = harness.Row("gather_tokens", "a", False, lambda device: work, contenders=("eager", "ours"), memory=True)
    result = gpu_rows.measure(row, bench)
    assert result["wrong"] is None
    assert list(result["call"]) == list(result["graph"]) == list(result["extra_bytes"]) == ["ours", "eager"]
    assert len(set(result["extra_bytes"].values())) == 2
    assert result["in a row"]["ours"] == pytest.approx({"median": 1e-5, "lower": 5e-6, "upper": 2e-5})
    assert result["host"] == {"ours": 1e-5, "eager": 1e-5}
    assert result["backend"] == explain("gather_tokens", work.args[0]).chosen
    assert result["bytes"] == 4 * 2 * 40 * 3 * 8 + 8 * 2 * 10 + 4 * 10 * 8 + 4 * 2 * 10 * 3 * 8  # x, index, pos, result
    work = dataclasses.replace(work, ours=lambda x, *rest: work.eager(1.1 * x, *rest))
    result = gpu_rows.measure(row, bench)
    assert "from float64" in result["wrong"]
    assert "call" not in result
    monkeypatch.setattr(bench, "times", lambda thunks: {"copy": {"median": 0.5}, "empty": {"median": 3e-6}})
    assert gpu_rows.bandwidth(bench, True) == {"copy": 2 * (1 << 20) / 0.5, "empty graph": 3e-6}


def test_what_a_call_costs_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gpu_rows.Bench("cpu", 0.001)
    seconds = iter(itertools.accumulate(itertools.chain.from_iterable((0, t) for t in (1, 2, 3, 4, 50, 60, 70))))
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: float(next(seconds)))
        assert bench.host_seconds(lambda: None) == 4 / 20


def test_who_takes_part_in_a_row_of_the_gpu_benchmark() -> None:
    work = WORKLOADS["gathered_attention"]((2, 40, 64), 40)
    forward = harness.Row(
        "gathered_attention", "a", False, lambda: work, contenders=("eager", "compile", "sdpa", "ours")
    )
    several = ["ours", "eager", "compile", "compile graphs", "sdpa", *gpu_rows.SDPA, "flex"]
    assert list(gpu_rows.functions(work, forward)) == several
    several.remove("compile graphs")
    assert list(gpu_rows.functions(work, dataclasses.replace(forward, backward=True))) == several
    few = gpu_rows.functions(work, dataclasses.replace(forward, contenders=("sdpa", "ours")))
    assert list(few) == ["ours", "sdpa", *gpu_rows.SDPA, "flex"]
    assert (few["ours"], few["sdpa"]) == (work.ours, work.sdpa)
    state = torch.backends.cuda
    enabled = (
        state.flash_sdp_enabled,
        state.mem_efficient_sdp_enabled,
        state.cudnn_sdp_enabled,
        state.math_sdp_enabled,
    )
    asked = gpu_rows.functions(dataclasses.replace(work, sdpa=lambda qkv: [ask() for ask in enabled]), forward)
    assert [asked[name](*work.args) for name in gpu_rows.SDPA] == torch.eye(4, dtype=torch.bool).tolist()


def test_shards_do_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward rows, the models, then backward rows, of which the journal has some already."""
    monkeypatch.setattr(gpu_rows, "measure", lambda row, bench, warm: {"wrong": "" if row.backward else "wrong"})
    monkeypatch.setattr(gpu_rows, "measure_model", lambda **options: {})
    monkeypatch.setattr(gpu_rows, "bandwidth", lambda bench, quick: {})
    monkeypatch.setattr(gpu_rows.Bench, "forget", lambda bench: None)
    bench = gpu_rows.Bench("cpu", 0.001)
    every = list(gpu_rows.tasks(bench, True, False, ""))
    assert every[0] == "bandwidth"
    kinds = ["model" if task.startswith("model ") else task.endswith("+bwd") for task in every[1:]]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [False, "model", True]
    paths = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for i, path in enumerate(paths):
        argv = ["--device", "cpu", "--quick", "--journal", str(path), "--shard", f"{i}/3"]
        status = gpu_rows.main(argv)
        failed = {entry["id"] for entry in supervise.results(path) if entry["state"] == "failed"}
        assert status == bool(failed)
        assert failed == {entry["id"] for entry in supervise.results(path) if entry["id"].endswith("-fwd")}
        assert gpu_rows.main(argv) == 0, "nothing is left to do"
        assert supervise.missing(path) == 0
    done = [entry["id"] for path in paths for entry in supervise.results(path)]
    assert sorted(done) == sorted(every)


def test_a_contender_that_cannot_take_part_says_why() -> None:
    bench, refused = gpu_rows.Bench("cpu", 0.001), {}

    def fails() -> None:
        raise RuntimeError("no kernel\nfor this")

    assert list(gpu_rows.usable({"good": list, "bad": fails}, bench, refused)) == ["good"]
    assert refused == {"bad": "no kernel for this"}
    bench.graph = lambda thunk, calls: fails()
    assert gpu_rows.graphs({"good": list, "compile graphs": list}, bench, refused) == {}
    assert refused["good in a graph"] == "no kernel for this"


TUNE = """
import functools
import json
import os
from bench import gpu_tune
from bench.gpu_rows import Bench
from bench.harness import Row
from hotkernels.bench.workloads import gathered_attention_workload
def two(name, choice):
    return [choice, choice._replace(M=16)]  # of 17 queries
gpu_tune.neighbours = two
workload = functools.partial(gathered_attention_workload, (1, 17, 64), 17, heads=1)
row = Row("gathered_attention", "tiny", True, workload, gpu=True)
print(json.dumps(gpu_tune.tune(row, Bench("cpu", 0.001))))
ran, usable = [], gpu_tune.usable
gpu_tune.usable = lambda variants, *more: (ran.append(list(variants)), usable(variants, *more))[1]
gpu_tune.tune(row, Bench("cpu", 0.001), share=(1, 2))
print(json.dumps(ran))
"""


def test_blocks_are_timed_beside_those_chosen() -> None:
    """Every choice that a row makes, by its name; blocks that give another answer are not."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", TUNE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    timed, compiled = map(json.loads, run.stdout.splitlines())
    choices = timed["choices"]
    assert {name: found["chosen"] for name, found in choices.items()} == {
        "long_blocks": "32 x 32, 2 warps, 1 stages",
        "fused_blocks": "32 x 32, 4 warps, 1 stages",
    }
    assert set(choices["long_blocks"]["times"]) == {"32 x 32, 2 warps, 1 stages", "16 x 32, 2 warps, 1 stages"}
    assert choices["fused_blocks"]["refused"] == {"16 x 32, 4 warps, 1 stages": "another answer"}
    assert list(choices["fused_blocks"]["times"]) == ["32 x 32, 4 warps, 1 stages"]
    assert "wrong" not in timed
    assert sorted(compiled) == [["16 x 32, 2 warps, 1 stages"], ["16 x 32, 4 warps, 1 stages"]]  # one of two each


def test_neighbours_are_half_and_twice() -> None:
    pytest.importorskip("triton")
    from bench import gpu_tune
    from hotkernels.ops.gathered_attention.launches import Blocks

    assert gpu_tune.neighbours("short_pairs", 2) == [2, 1, 4, 8]
    near = gpu_tune.neighbours("long_blocks", Blocks(128, 16, 8, 2))
    assert near[0] == Blocks(128, 16, 8, 2)
    assert len(near) == len(set(near)) == 20
    assert {b.M for b in near} == {64, 128, 256}
    assert {b.N for b in near} == {16, 32}
    assert {b.num_warps for b in near} == {4, 8, 16}
    assert {b.M for b in gpu_tune.neighbours("fused_blocks", Blocks(256, 64, 8, 1))} == {256}
    assert {b.M for b in gpu_tune.neighbours("long_blocks", Blocks(256, 64, 8, 1))} == {128, 256}


def test_make_gpu_calls_it() -> None:
    command = ["make", "-n", "gpu", "OUT=there", "ARGS=--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert '-m bench.gpu --out "there" --quick' in done.stdout


def test_a_call_that_fails_costs_no_other_its_turn_under_a_sanitizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(op: Any, backend: str, dtype: torch.dtype, case: str, device: str) -> None:
        if (op.name, dtype, case) == ("invert_index", torch.float32, "small"):
            raise ValueError("of another device")

    monkeypatch.setattr(run_once, "once", once)
    monkeypatch.setattr(sys, "argv", ["run_once.py", "--device", "cpu"])
    assert run_once.main() == 1
    told = capsys.readouterr().out
    assert "FAILED: invert_index, cpp, torch.float32, small\n" in told
    assert re.search(r"^(\d+) of \1 calls, 1 failed: each op", told, re.M)
