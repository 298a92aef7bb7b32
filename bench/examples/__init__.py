"""Runnable examples, one page each: `python -m bench.examples.<name>`. Each prints what it saved."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from hotkernels.bench.timing import interleaved, mebibytes, peak_memory
from hotkernels.doctor import unfused


def arguments(about: str | None, **options: int) -> argparse.Namespace:
    """The command line: an int per option, and the rounds to time; one thread."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    for name, default in ({"rounds": 5} | options).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="%(default)s")
    torch.set_num_threads(1)
    args = parser.parse_args()
    if why := unfused():
        print(why)
    return args


def saved(eager: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> None:
    """Time both in turns, count their memory, and say what came out."""
    calls = {"eager": eager, "hotkernels": ours}
    times = {name: t.median for name, t in interleaved(calls, 0.0, least=max(2, rounds)).items()}
    extra = {name: peak_memory(call) for name, call in calls.items()}
    for name in calls:
        memory = extra[name]
        held = "" if memory is None else f", {mebibytes(memory):.0f} MiB at most beyond the inputs"
        print(f"{name:<12}{times[name] * 1e3:9.1f} ms{held}")
    ratio = times["eager"] / times["hotkernels"]
    print(f"{ratio:.2f}x as fast" if ratio >= 1 else f"{1 / ratio:.2f}x as long: nothing saved at this size")
