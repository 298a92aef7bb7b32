"""Runs the benchmark suite and prints its table: `python -m bench [--quick] [--out FOLDER] [ops...]`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import harness


def main() -> int:
    """Run, print, save; 1 if an answer was wrong."""
    ops, out = harness.OPS, Path(__file__).parents[1] / "build/bench"
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which to run: {', '.join(ops)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small rows only, and few rounds: does it work?")
    parser.add_argument("--out", type=Path, default=out, help="where to write (default build/bench)")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows with this in their name")
    parser.add_argument("--seconds", type=float, help="time per contender and row (default 2, with --quick 0.1)")
    args = parser.parse_args()
    for op in args.ops:
        if op not in ops:
            parser.error(f"op must be one of {', '.join(ops)}, got {op}")
    rows = harness.import_rows(args.ops)
    selected = [row for row in rows if row.cpu and args.rows in row.name and (row.quick or not args.quick)]

    torch.set_num_threads(1)  # on a small shared machine two threads mostly measure the scheduler
    about = harness.header()
    harness.check_out(parser, args.out, about)
    markdown = "\n".join(f"- {name}: {value}" for name, value in about.items()) + "\n"
    markdown += "- medians of interleaved rounds; ratios over 1: ours is faster; extra MiB: in the order of the times\n"
    print(markdown, end="")
    results = []
    seconds = args.seconds if args.seconds is not None else 0.1 if args.quick else 2.0
    for text, result in harness.report(selected, seconds):
        print(text, flush=True)
        markdown += text + "\n"
        results.append(result)
    part = ["quick"] * args.quick + args.ops + [args.rows] * bool(args.rows)
    title = "# Benchmark results" + (f" ({', '.join(part)})" if part else "") + "\n\n"
    print(f"\nwritten: {harness.save(args.out, about['cpu'], about, title + markdown, results, part)} and .json")
    return 1 if any(result["wrong"] for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
