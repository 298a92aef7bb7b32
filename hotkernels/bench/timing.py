"""How long calls take, in turns, by the host's clock or a GPU's, and how much memory; on which machine."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import instruction_set
from ..doctor import processor, unfused

Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    lower: float
    """First quartile."""
    upper: float
    """Third quartile."""
    rounds: int


Clock = Callable[[Thunk, int], float]
"""Seconds per call, of so many calls in a row."""


def interleaved(
    contenders: dict[str, Thunk],
    seconds: float = 1.0,
    least: int = 5,
    tick: Callable[[], None] | None = None,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time contenders in turns, each for about `seconds` and at least `least` rounds; short calls run in a row.

    Every contender is called twice before its time counts. `tick` is called after every round. `clock`: the host's by
    default, or a GPU's `EventClock`.
    """
    clock = clock or host_clock
    once = {}
    for name, thunk in contenders.items():
        thunk()
        once[name] = clock(thunk, 1)
    rounds = max(least, int(min(200, seconds / max(max(once.values()), 2e-3))))
    repeats = {name: max(1, int(2e-3 / t)) for name, t in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, thunk in contenders.items():
            samples[name].append(clock(thunk, repeats[name]))
        if tick is not None:
            tick()
    timings = {}
    for name, times in samples.items():
        lower, _, upper = statistics.quantiles(times, n=4)
        timings[name] = Timing(statistics.median(times), lower, upper, rounds)
    return timings


def host_clock(thunk: Thunk, repeats: int) -> float:
    """The time that the host waits for the results."""
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        thunk()
    _wait()
    return (time.perf_counter() - start) / repeats


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class EventClock:
    """The time that a GPU takes for one call, by its own events, with nothing of the call's in the L2 cache.

    While the GPU fills its cache with something else, the host prepares the call: some 40 us of launching are hidden,
    not more. It reads, because what it would write goes back to memory later, during the call.
    """

    device = "cuda"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._other = torch.zeros(3 * cache // 4, dtype=torch.float32, device=self.device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, thunk: Thunk, repeats: int = 1) -> float:
        """Seconds; of one call, whatever `repeats` says: the second in a row would find its inputs in the cache."""
        torch.cuda.synchronize()
        self._other.sum()
        self._start.record()
        thunk()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3


def captured(thunk: Thunk, calls: int = 1) -> tuple[Any, Thunk]:
    """A CUDA graph of so many calls in a row: what the last one returned, which replays rewrite, and the replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and sets up whatever is set up once
        for _ in range(2):
            thunk()
    stream = torch.cuda.current_stream()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                out = thunk()
    except Exception:
        # A refused capture may leave its stream behind, and PyTorch 2.11 a random number generator that waits for its
        # end: the end of another will do.
        torch.cuda.set_stream(stream)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=EventClock.device)
        raise
    return out, graph.replay


def peak_memory(thunk: Thunk, device: str = "cpu") -> int | None:
    """The most memory, in bytes, that a call holds beyond what was held before it; None where nobody counts it.

    On a CPU, Linux counts resident pages. Its peak is reset before the call, and freed memory given back, so that
    the call cannot hide in pages that an earlier one left. Call `thunk` once before, for what it sets up only once.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        thunk()
        return torch.cuda.max_memory_allocated() - before
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (OSError, AttributeError, TypeError):  # not Linux, or another C library
        return None

    def peak() -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024

    before = peak()
    thunk()
    return peak() - before


def mebibytes(size: float) -> float:
    """Bytes in MiB, the unit in which all commands print memory."""
    return size / 2**20


def machine() -> dict[str, Any]:
    """What a time depends on: processor, threads, versions, date."""
    about = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "isa": instruction_set() or unfused(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hotkernels": __version__,
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about
