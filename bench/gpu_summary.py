"""What a reader of `make gpu` gets: stages, tests per kernel, failures and times, in markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from bench import harness
from hotkernels.bench.timing import mebibytes

if TYPE_CHECKING:
    from bench.gpu import Session


def kernels(session: Session) -> dict[tuple[str, str], Counter[str]]:
    """(op, backend) -> how many of its tests passed, failed, were skipped."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for entry in session.tasks("tests"):
        key = (entry.get("op", ""), entry.get("backend", ""))
        counts.setdefault(key, Counter())[entry["state"]] += 1
    return dict(sorted(counts.items()))


def failures(entries: Iterable[dict[str, Any]]) -> list[str]:
    """One line per distinct reason: how many tests, one of them, why."""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        if entry["state"] == "failed":
            first = " ".join((entry.get("why") or "?").split())[:200]
            # Numbers differ from case to case.
            groups.setdefault("".join("#" if c.isdigit() else c for c in first), [first]).append(entry["id"])
    ordered = sorted(groups.values(), key=len, reverse=True)
    return [f"- {len(ids)}x, e.g. `{ids[0]}`: {first}" for first, *ids in ordered]


def table(head: list[str], lines: Iterable[Iterable[Any]]) -> list[str]:
    """A markdown table."""
    rows = [head, ["---"] * len(head), *(list(map(str, line)) for line in lines)]
    return ["| " + " | ".join(row) + " |" for row in rows] + [""]


def bench_tables(entries: list[dict[str, Any]]) -> list[str]:
    """Per op, microseconds of everyone, and beside them how many times as long as ours."""
    told = {entry["id"]: entry["result"] for entry in entries if entry.get("result")}
    lines: list[str] = []
    copy = told.get("bandwidth", {}).get("copy")
    if copy:
        empty = told["bandwidth"]["empty graph"] * 1e6
        lines += [f"A copy moves {copy / 1e9:.0f} GB/s, read and written; an empty graph takes {empty:.1f} us.", ""]
    rows = [result for result in told.values() if result.get("call")]
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        order = dict.fromkeys(name for row in of_op for name in row["call"] if name != "ours")
        head = ["row", "x", "pass", "how", "ours us", *order, "of copy", "host us"]
        body = []
        for row in of_op:
            for how in ("call", "graph", "in a row"):
                times = {name: t["median"] * 1e6 for name, t in row[how].items()}
                ours = times.get("ours")
                if ours is None:
                    continue
                others = [f"{times[n]:.1f} ({times[n] / ours:.2f}x)" if n in times else "" for n in order]
                share = f"{row['bytes'] / ours * 1e6 / copy:.0%}" if copy and how == "graph" and "bytes" in row else ""
                host = ", ".join(f"{n} {t * 1e6:.0f}" for n, t in row["host"].items()) if how == "call" else ""
                body.append([row["row"], row["x"], row["pass"], how, f"{ours:.1f}", *others, share, host])
        lines += [f"### {op} ({', '.join(dict.fromkeys(row['backend'] for row in of_op))})", "", *table(head, body)]
        held = {row["row"]: row["extra_bytes"] for row in of_op if row.get("extra_bytes")}
        for name, extra in held.items():
            held_by = (f"{n} {mebibytes(b):.0f} MiB" for n, b in extra.items() if b is not None)
            lines.append(f"- memory, {name}: " + ", ".join(held_by))
        refused = dict.fromkeys(f"{n}: {why}" for row in of_op for n, why in row["refused"].items())
        lines += [*(f"- could not take part: {line}" for line in refused), ""]
    return lines + model_table({id_: result for id_, result in told.items() if id_.startswith("model ")})


def model_table(told: dict[str, dict[str, Any]]) -> list[str]:
    """Milliseconds of HoT-MixSTE; nothing for a model that was refused, as in a graph."""
    names = ("eager", "swapped", "native")
    body = [
        [id_.removeprefix("model "), result["x"], which, how]
        + [f"{times[name]['median'] * 1e3:.3f}" if name in times else "" for name in names]
        for id_, result in told.items()
        for which in ("forward", "training step")
        for how, times in result.get(which, {}).items()
    ]
    if not body:
        return []
    head = ["model", "x", "pass", "how", *(f"{name} ms" for name in names)]
    refused = dict.fromkeys(f"{n}: {why}" for result in told.values() for n, why in result.get("refused", {}).items())
    return ["### HoT-MixSTE", "", *table(head, body), *(f"- {line}" for line in refused), ""]


def tune_table(entries: list[dict[str, Any]]) -> list[str]:
    """Of each choice, what it is, the fastest, and how much faster that is."""
    body = []
    for entry in entries:
        for name, found in entry.get("result", {}).get("choices", {}).items():
            times = {blocks: timing["median"] * 1e6 for blocks, timing in found["times"].items()}
            mine, best = times.get(found["chosen"]), min(times, key=times.__getitem__, default=None)
            if mine is None or best is None:
                continue
            tried = f"{len(times)}, {len(found['refused'])} refused"
            gain = f"{mine / times[best]:.2f}x"
            body.append([entry["id"], name, found["chosen"], f"{mine:.1f}", best, f"{times[best]:.1f}", gain, tried])
    head = ["row", "choice", "chosen", "us", "fastest", "us", "faster", "tried"]
    return table(head, body) if body else []


def summary(session: Session) -> str:
    """Everything for a reader, in markdown."""
    name = session.about.get("gpu", session.about["cpu"])
    lines = [f"# {name}" + (" (quick)" if session.quick else ""), ""]
    lines += [*(f"- {key}: {value}" for key, value in session.about.items()), "", "## Stages", ""]
    lines += table(["stage", "outcome", "s", ""], ([o.stage, o.state, o.seconds, o.detail] for o in session.outcomes))
    counts = kernels(session)
    if counts:
        lines += ["## Tests per kernel", ""]
        body = ([*key, *(count[state] for state in ("passed", "failed", "skipped"))] for key, count in counts.items())
        lines += table(["op", "backend", "passed", "failed", "skipped"], body)
        run_on = f"{name}, {datetime.now(timezone.utc):%Y-%m-%d}, {session.about['commit']}"
        proved = [
            key
            for key, count in counts.items()
            if key[0] in harness.OPS and all(key) and count["passed"] and not count["failed"]
        ]
        if session.gpu and proved and not session.not_done("tests"):
            lines += ["For `GPU_RUNS` in hotkernels/doctor.py:", "", *(f'    {key!r}: "{run_on}",' for key in proved)]
            lines.append("")
    for title, stage_name in (("Failed tests", "tests"), ("Failed rows", "bench"), ("Failed to tune", "tune")):
        failed = failures(session.tasks(stage_name))
        lines += [f"## {title}", "", *failed, ""] if failed else []
    rows = bench_tables(session.tasks("bench"))
    if rows:
        lines += ["## Benchmark", "", "Medians in us; in brackets how many times as long as ours: under 1 we lose.", ""]
        lines += [
            "call: CUDA events around a call, L2 flushed; graph: the same around a replay; in a row: one of 20 calls"
        ]
        lines += ["within a graph. of copy: bytes read and written once, over ours, relative to a copy.", "", *rows]
    blocks = tune_table(session.tasks("tune"))
    lines += ["## Blocks", "", *blocks] if blocks else []
    return "\n".join(lines).rstrip() + "\n"
