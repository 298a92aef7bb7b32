"""What all benchmark files share: the list of rows, a run of them in turns, the table, and pytest-benchmark cases.

The workloads themselves and the clock are in hotkernels.bench, which also times a user's own shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from hotkernels.bench.timing import interleaved, machine, mebibytes, peak_memory
from hotkernels.bench.workloads import WORKLOADS, Workload
from hotkernels.doctor import unfused

OPS = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
CONTENDERS = ("eager", "compile", "sdpa", "ours")
COLUMNS = [
    "row",
    "x",
    "pass",
    *(f"{name} ms" for name in CONTENDERS),
    *(f"{name} / ours" for name in CONTENDERS[:-1]),
    "extra MiB",
]


@dataclass(frozen=True)
class Row:
    """One line of the table: a workload, forward alone or with its backward."""

    op: str
    name: str
    backward: bool
    build: Callable[..., Workload]  # takes `device`
    memory: bool = False  # whether to measure the peak memory of each contender
    quick: bool = True  # whether --quick runs it
    contenders: tuple[str, ...] = ("eager", "compile", "ours")
    cpu: bool = True  # whether `python -m bench` runs it
    gpu: bool = False  # whether `make gpu` runs it
    tf32: bool = False  # whether float32 products may be rounded to TF32

    @property
    def passes(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    def __str__(self) -> str:
        return f"{self.name}-{self.passes}"


ROWS: list[Row] = []


@dataclass(frozen=True)
class At:
    """A named workload: the arguments of an op's builder in hotkernels.bench.workloads, and flags of Row."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    flags: dict[str, Any]


FLAGS = {field.name for field in fields(Row) if field.default is not MISSING}


def at(name: str, *args: Any, **options: Any) -> At:
    """Name a workload after where it comes from; options that are flags of Row are its row's."""
    return At(name, args, options, {flag: options.pop(flag) for flag in FLAGS & options.keys()})


# A workload for `make gpu` alone.
at_gpu = functools.partial(at, cpu=False, gpu=True)


def rows(op: str, *workloads: At, backward: bool = False) -> Callable[..., None]:
    """Register the rows of an op and return their pytest-benchmark test, to be bound to a name that starts with test_.

    With `backward`, each workload has a second row that times forward and backward.
    """
    added = [
        Row(op, w.name, with_backward, functools.partial(WORKLOADS[op], *w.args, **w.options), **w.flags)
        for w in workloads
        for with_backward in ((False, True) if backward else (False,))
    ]
    ROWS.extend(added)

    cases = [pytest.param(row, name, id=f"{row}-{name}") for row in added if row.cpu for name in row.contenders]

    @pytest.mark.parametrize(("row", "contender"), cases)
    def test(row: Row, contender: str, benchmark: Any) -> None:
        torch.set_num_threads(1)
        wrong = _checked(row)
        assert wrong is None, wrong
        benchmark.group = f"{row.op}: {row}"
        benchmark(_thunks(row)[contender])

    return test


@functools.lru_cache(maxsize=1)
def _workload(row: Row) -> Workload:
    return row.build()


@functools.lru_cache(maxsize=1)
def _checked(row: Row) -> str | None:
    return _workload(row).check(row.backward)


@functools.lru_cache(maxsize=1)
def _thunks(row: Row) -> dict[str, Callable[[], Any]]:
    work = _workload(row)
    torch._dynamo.reset()  # rows share code: their shapes would pile up to the recompilation limit
    return {name: work.thunk(function, row.backward) for name, function in work.contenders(row.contenders).items()}


def run(row: Row, seconds: float) -> dict[str, Any]:
    """Check a row, then time its contenders in turns. Wrong answers get no times."""
    work, wrong = _workload(row), _checked(row)
    result: dict[str, Any] = {"op": row.op, "row": row.name, "x": work.what, "pass": row.passes, "wrong": wrong}
    if wrong is None:
        thunks = _thunks(row)
        result["seconds"] = {name: asdict(t) for name, t in interleaved(thunks, seconds, least=3).items()}
        if row.memory:
            result["extra_bytes"] = {name: peak_memory(thunk) for name, thunk in thunks.items()}
    return result


def cells(result: dict[str, Any]) -> list[str]:
    """A result as the cells of its line, in the order of COLUMNS."""
    first = [result["row"], result["x"], result["pass"]]
    if result["wrong"] is not None:
        return [*first, f"WRONG: {result['wrong']}", *[""] * (len(COLUMNS) - 4)]
    medians = [result["seconds"].get(name, {}).get("median") for name in CONTENDERS]
    extra = [b for name in CONTENDERS if (b := result.get("extra_bytes", {}).get(name)) is not None]
    return [
        *first,
        *("" if t is None else f"{t * 1e3:.3f}" if t < 0.01 else f"{t * 1e3:.1f}" for t in medians),
        *("" if t is None else f"{t / medians[-1]:.2f}x" for t in medians[:-1]),
        " / ".join(f"{mebibytes(b):.0f}" for b in extra),
    ]


def line(cells: Iterable[str]) -> str:
    """A line of a markdown table, padded so that it reads as one in a terminal."""
    widths = (24, 42, 7, 8, 10, 8, 8, 12, 14, 11, 16)
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def header() -> dict[str, Any]:
    """The machine, and the commit that was measured; a copy without git is told it by the variable COMMIT."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = os.environ.get("COMMIT", "")
    with contextlib.suppress(OSError):
        commit = commit or subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    return machine() | {"commit": commit or "unknown"}


def check_out(parser: argparse.ArgumentParser, folder: Path, about: dict[str, Any]) -> None:
    """Refuse to publish figures of plain PyTorch as ours, or of code that no commit has."""
    why = unfused() or ("the tree has changes without a commit" if about.get("commit", "").endswith("-dirty") else None)
    if why and folder.resolve() == Path(__file__).parent / "results":
        parser.error(f"--out must be elsewhere than bench/results, where figures are published ({why})")


def import_rows(ops: Iterable[str] = ()) -> list[Row]:
    """The rows of the bench_<op>.py of some ops, or of all."""
    for op in ops or OPS:
        importlib.import_module(f"bench.bench_{op}")
    return ROWS


def report(selected: list[Row], seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run rows one by one and yield, for each, its lines of markdown and its result."""
    op = None
    for number, row in enumerate(selected, 1):
        if sys.stderr.isatty():
            print(f"\r\033[K[{number}/{len(selected)}] {row.op} {row}", end="", file=sys.stderr, flush=True)
        result = run(row, seconds)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        head = "" if row.op == op else f"\n## {row.op}\n\n{line(COLUMNS)}\n{line(['---'] * len(COLUMNS))}\n"
        op = row.op
        yield head + line(cells(result)), result


def save(
    folder: Path,
    on: str,
    about: dict[str, Any],
    markdown: str,
    results: list[dict[str, Any]],
    part: Iterable[str] = (),
    **more: Any,
) -> Path:
    """Write <on>-<date>.json and .md, `on` being the processor's name; return the latter's path.

    `part` says what of the whole was run, if not all: the name ends with it, so that no part replaces the whole.
    """

    def slug(words: str) -> str:
        return re.sub(r"[^a-z0-9_]+", "-", words.lower()).strip("-")

    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "-".join([slug(re.sub(r"\(.*?\)|@.*", "", on)), date, *map(slug, part)])
    path.with_name(path.name + ".json").write_text(
        json.dumps({"machine": about, **more, "rows": results}, indent=1) + "\n"
    )
    markdown_path = path.with_name(path.name + ".md")
    markdown_path.write_text(markdown)
    return markdown_path
