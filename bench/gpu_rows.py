"""The GPU benchmark, one row after the other: `make gpu` runs it; by itself: python -m bench.gpu_rows --journal FILE.

Each row is a workload of bench_<op>.py with `gpu=True`, checked, then timed three ways: as a call (CUDA events, L2
flushed), replayed from a CUDA graph (the same), and, where it is short, as 20 calls within one graph. All contenders
take turns. Then the copy bandwidth, and HoT-MixSTE as a whole.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from bench import models
from bench.harness import Row, import_rows
from bench.supervise import LOST, Journal
from hotkernels.backends import explain
from hotkernels.bench.timing import Clock, EventClock, Thunk, captured, host_clock, interleaved, peak_memory
from hotkernels.bench.workloads import Workload

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
# Seconds of a replay under which 20 calls are also timed within one graph: launching is no longer a part of that.
SHORT = 300e-6
IN_A_ROW = 20
# Seconds of a call over which nobody asks what it costs the host.
SLOW = 2e-3


class Bench:
    """How things are measured on a device: a GPU, or a CPU, where there are no graphs, to test this program."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.gpu = torch.device(device).type == "cuda"
        self.clock: Clock = EventClock() if self.gpu else host_clock

    def graph(self, thunk: Thunk, calls: int = 1) -> Thunk:
        """The replay of a graph of so many calls."""
        return captured(thunk, calls)[1] if self.gpu else lambda: [thunk() for _ in range(calls)]

    def times(self, thunks: dict[str, Thunk]) -> dict[str, Any]:
        """Name -> Timing as a dict."""
        if not thunks:
            return {}
        return {n: asdict(t) for n, t in interleaved(thunks, self.seconds, least=5, clock=self.clock).items()}

    def host_seconds(self, thunk: Thunk, calls: int = 20) -> float:
        """What a call costs the host, not waiting for the GPU: few enough calls to fit its queue."""
        samples = []
        for _ in range(7):
            self.wait()
            start = time.perf_counter()
            for _ in range(calls):
                thunk()
            samples.append((time.perf_counter() - start) / calls)
        self.wait()
        return statistics.median(samples)

    def wait(self) -> None:
        """Wait for the device; raises what it has to say."""
        if self.gpu:
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Give memory back between rows."""
        torch._dynamo.reset()  # rows share code: their shapes would pile up to the recompilation limit
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()


def functions(work: Workload, row: Row) -> dict[str, Callable[..., Any]]:
    """Everyone who takes part in a row; `ours` first."""
    several = {"ours": work.ours}
    for name, call in work.contenders(row.contenders).items():
        several[name] = call
        if name == "compile" and not row.backward:
            several["compile graphs"] = torch.compile(work.eager, dynamic=False, mode="reduce-overhead")
        elif name == "sdpa":
            several |= {kind: functools.partial(_with_kernel, call, kernel) for kind, kernel in SDPA.items()}
            if work.flex is not None:
                several["flex"] = torch.compile(work.flex, dynamic=False)
    return several


def _with_kernel(attend: Callable[..., Any], kernel: SDPBackend, *args: Tensor) -> Any:
    with sdpa_kernel(kernel):
        return attend(*args)


def _in_graphs_of_its_own(thunk: Thunk) -> Thunk:
    """For reduce-overhead: says that results of the last call are no longer needed."""

    def call() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return thunk()

    return call


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Whether float32 products may be rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def usable(thunks: dict[str, Thunk], bench: Bench, refused: dict[str, str]) -> dict[str, Thunk]:
    """Those that run; the others' reasons go to `refused`."""
    good = {}
    for name, thunk in thunks.items():
        try:
            thunk()
            bench.wait()
            good[name] = thunk
        except Exception as error:  # whatever a contender has against this case
            refused[name] = " ".join(str(error).split())[:200] or type(error).__name__
    return good


def graphs(thunks: dict[str, Thunk], bench: Bench, refused: dict[str, str], calls: int = 1) -> dict[str, Thunk]:
    """The replays of those that can be captured."""
    replays = {}
    for name, thunk in thunks.items():
        if name == "compile graphs":
            continue
        try:
            replays[name] = bench.graph(thunk, calls)
        except Exception as error:  # a refused capture
            refused[f"{name} in a graph"] = " ".join(str(error).split())[:200]
    return replays


def bytes_moved(work: Workload, out: Any) -> int:
    """Of each argument read once and each result written once."""
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves((work.args, out)) if isinstance(t, Tensor))


def measure(row: Row, bench: Bench, warm: bool = False) -> dict[str, Any]:
    """Check a row, then time its contenders. `warm`: only let those compile that will have to."""
    refused: dict[str, str] = {}
    with precision(row.tf32):
        work = row.build(device=bench.device)
        thunks = {name: work.thunk(f, row.backward) for name, f in functions(work, row).items()}
        if "compile graphs" in thunks:
            thunks["compile graphs"] = _in_graphs_of_its_own(thunks["compile graphs"])
        if warm:
            compiled = {n: t for n, t in thunks.items() if n in ("compile", "compile graphs", "flex")}
            return {"compiled": list(usable(compiled, bench, refused)), "refused": refused}
        result: dict[str, Any] = {"op": row.op, "row": row.name, "x": work.what, "pass": row.passes}
        result["backend"] = explain(row.op, work.args[0]).chosen
        result["wrong"] = work.check(row.backward)
        if result["wrong"] is not None:
            return result
        thunks = usable(thunks, bench, refused)
        if "ours" not in thunks:
            return result | {"wrong": refused["ours"]}
        result["call"] = bench.times(thunks)
        result["graph"] = bench.times(graphs(thunks, bench, refused))
        short = {n: thunks[n] for n, t in result["graph"].items() if t["median"] < SHORT}
        several = bench.times(graphs(short, bench, refused, IN_A_ROW))
        result["in a row"] = {
            n: {key: t[key] / IN_A_ROW for key in ("median", "lower", "upper")} for n, t in several.items()
        }
        quick = [n for n in ("ours", "eager", "compile", "sdpa") if result["call"].get(n, {}).get("median", 1) < SLOW]
        result["host"] = {n: bench.host_seconds(thunks[n]) for n in quick}
        if not row.backward:
            result["bytes"] = bytes_moved(work, thunks["ours"]())
        if row.memory:
            result["extra_bytes"] = {n: peak_memory(t, bench.device) for n, t in thunks.items()}
        result["refused"] = refused
        result["wrong"] = refused.get("ours in a graph")
    return result


def bandwidth(bench: Bench, quick: bool) -> dict[str, Any]:
    """Bytes per second of a copy, reads and writes counted, and the time of a graph that does next to nothing."""
    source = torch.ones(1 << 20 if quick else 1 << 30, dtype=torch.int8, device=bench.device)
    target, tiny = torch.empty_like(source), torch.zeros(1, device=bench.device)
    times = bench.times({"copy": lambda: target.copy_(source), "empty": bench.graph(lambda: tiny.add_(1))})
    return {"copy": 2 * source.numel() / times["copy"]["median"], "empty graph": times["empty"]["median"]}


# ---- HoT-MixSTE ------------------------------------------------------------------------------------------------------


def model_rows(quick: bool) -> dict[str, dict[str, Any]]:
    """Name -> what to build."""
    small = {"frames": 27, "token_num": 9, "channels": 32, "depth": 4} if quick else {}
    return {
        f"hot_mixste_b{batch}_{precision}": {"batch": batch, "precision": precision, "options": models.OPTIONS | small}
        for batch in (1, 16)
        for precision in ("bf16", "tf32")
    }


def measure_model(batch: int, precision: str, options: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """HoT-MixSTE as published, swapped, and in native layout: forward and training step, as calls and in graphs."""
    refused: dict[str, str] = {}
    several, _ = models.build(options, bench.device)
    x = torch.rand(batch, options["frames"], 17, 2, generator=torch.Generator().manual_seed(0)).to(bench.device) * 2 - 1
    result: dict[str, Any] = {"x": f"{list(x.shape)} {precision}"}
    result["wrong"] = models.check(several, x, options["token_num"])  # in float32, before TF32 is allowed
    if result["wrong"] is not None:
        return result
    half = precision == "bf16"
    torch.set_float32_matmul_precision("highest" if half else "high")
    thunks: dict[str, dict[str, Thunk]] = {"forward": {}, "training step": {}}
    for name, model in several.items():
        for which, thunk in models.passes(model, x, half).items():
            thunks[which][name] = thunk
    for which, group in thunks.items():
        good = usable(group, bench, refused)
        result[which] = {"call": bench.times(good), "graph": bench.times(graphs(good, bench, refused))}
    torch.set_float32_matmul_precision("highest")
    result["refused"] = refused
    return result


# ---- the program -----------------------------------------------------------------------------------------------------


def tasks(bench: Bench, quick: bool, warm: bool, rows: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Id -> what to do, the most wanted first: forward rows, the model, backward rows."""
    selected = [row for row in import_rows() if row.gpu and not (quick and row.name != "tiny")]
    work: dict[str, Callable[[], dict[str, Any]]] = {} if warm else {"bandwidth": lambda: bandwidth(bench, quick)}
    for backward in (False, True):
        for row in selected:
            if row.backward == backward:
                work[f"{row.op} {row}"] = functools.partial(measure, row, bench, warm)
        if not backward and not warm:
            for name, options in model_rows(quick).items():
                work[f"model {name}"] = functools.partial(measure_model, **options, bench=bench)
    return {task: function for task, function in work.items() if rows in task}


def arguments(program: str, about: str) -> argparse.ArgumentParser:
    """What this program and bench.gpu_tune are told."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about.split("\n")[0])
    parser.add_argument(
        "--journal", type=Path, required=True, help="JSON lines, added to; what is there is not repeated"
    )
    parser.add_argument("--device", default="cuda", help="default cuda; cpu: to test this program")
    parser.add_argument("--quick", action="store_true", help="tiny rows only, and a tiny model")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows with this in '<op> <row>-<pass>'")
    parser.add_argument("--seconds", type=float, default=0.2, help="per contender (default %(default)s)")
    parser.add_argument("--warm", action="store_true", help="only compile, to fill the compilers' caches")
    parser.add_argument("--shard", default="0/1", help="i/n: the i-th of n shares of the work")
    return parser


def run_tasks(work: dict[str, Callable[[], dict[str, Any]]], bench: Bench, journal: Journal) -> int:
    """Do what the journal does not have yet; 1 if an answer was wrong or a task failed."""
    if not journal.known:
        journal.write(tasks=len(work))
    failed = False
    for task, function in work.items():
        if task in journal.known:
            continue
        journal.start(task)
        begin = time.perf_counter()
        try:
            result = function()
            wrong = result.get("wrong")
        except Exception as error:  # the next row may fare better
            result, wrong = {}, f"{type(error).__name__}: {error}"[:400]
        bench_seconds = round(time.perf_counter() - begin, 1)
        failed |= bool(wrong)
        journal.end(task, "failed" if wrong else "passed", why=wrong or "", seconds=bench_seconds, result=result)
        print(f"{task}: {wrong or 'done'}, {bench_seconds} s", flush=True)
        try:
            bench.forget()
            bench.wait()
        except RuntimeError:
            os._exit(LOST)
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Run what the journal does not have yet; 1 if an answer was wrong or a row failed."""
    args = arguments("bench.gpu_rows", __doc__ or "").parse_args(argv)
    bench, journal = Bench(args.device, args.seconds), Journal(args.journal)
    part, parts = map(int, args.shard.split("/"))
    work = tasks(bench, args.quick, args.warm, args.rows)
    work = {task: function for task, function in work.items() if zlib.crc32(task.encode()) % parts == part}
    return run_tasks(work, bench, journal)


if __name__ == "__main__":
    raise SystemExit(main())
