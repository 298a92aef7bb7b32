"""What the demo measures of the published code and of ours, on the benchmark's clock and memory count."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from ..bench.timing import interleaved, mebibytes, peak_memory

Calls = tuple[Callable[[], Any], Callable[[], Any]]
"""The published code's call, and ours."""


@dataclass
class Pair:
    """One figure of the published eager code, and of hotkernels."""

    eager: float
    hotkernels: float


def times(calls: dict[str, Calls], threads: int, rounds: int, tick: Callable[[], None]) -> dict[str, Pair]:
    """Median milliseconds of each call, all of them taking turns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        contenders = {f"{name} {who}": call for name, pair in calls.items() for who, call in enumerate(pair)}
        found = interleaved(contenders, seconds=0, least=rounds, tick=tick)
    finally:
        torch.set_num_threads(before)
    return {name: Pair(*(1e3 * found[f"{name} {who}"].median for who in range(2))) for name in calls}


def peaks(calls: Calls) -> Pair | None:
    """Peak extra memory of each call in MiB, on one thread; None where nobody counts it. To be called once before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        eager, ours = (peak_memory(call) for call in calls)
    finally:
        torch.set_num_threads(before)
    return None if eager is None or ours is None else Pair(mebibytes(eager), mebibytes(ours))


class Progress:
    """A bar on stderr; only on a terminal, and only once the work has taken two seconds."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done, self.shown = total, 0, False
        self.stream = sys.stderr if stream is None else stream
        self.start = time.monotonic()

    def tick(self) -> None:
        """One step is done."""
        self.done += 1
        if self.stream.isatty() and time.monotonic() - self.start > 2:
            self.shown = True
            filled = min(30, 30 * self.done // self.total)
            self.stream.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] {min(100, 100 * self.done // self.total)} %")
            self.stream.flush()

    def close(self) -> None:
        """Wipe the bar."""
        if self.shown:
            self.stream.write("\r" + " " * 40 + "\r")
            self.stream.flush()
