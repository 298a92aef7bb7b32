"""Which blocks are fastest on this GPU: what attention's launchers choose in the benchmark's rows, and its neighbours.

make gpu ARGS="--stages build,tune --rows TEXT"

Each variant is compiled beforehand, by as many processes as there are. What is found belongs into the functions named
here, of launches.py and launches_backward.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from bench.gpu_rows import Bench, arguments, precision, run_tasks, usable
from bench.harness import Row, import_rows
from bench.supervise import Journal
from hotkernels.bench.timing import Thunk

OPS = ("gathered_attention", "recovery_attention")
PACKAGE = "hotkernels.ops.gathered_attention"
CHOICES = {
    "long_blocks": "launches",
    "short_pairs": "launches",
    "per_query_blocks": "launches",
    "fused_blocks": "launches_backward",
    "queries_blocks": "launches_backward",
    "keys_blocks": "launches_backward",
    "per_query_queries_blocks": "launches_backward",
    "per_query_keys_blocks": "launches_backward",
}
"""Function of a problem -> its module. They return Blocks, a number, or None where the kernel does not serve it."""


def _forget_plans() -> None:
    for module in set(CHOICES.values()):
        importlib.import_module(f"{PACKAGE}.{module}")._planned.cache_clear()


@contextlib.contextmanager
def replaced(name: str, by: Any) -> Iterator[None]:
    """Another function in the place of one that chooses."""
    _forget_plans()
    with mock.patch(f"{PACKAGE}.{CHOICES[name]}.{name}", by):
        yield
    _forget_plans()


def chosen(thunk: Thunk) -> dict[str, Any]:
    """What is chosen when a call is worked out."""
    made: dict[str, Any] = {}

    def recording(name: str) -> Any:
        choose = getattr(importlib.import_module(f"{PACKAGE}.{CHOICES[name]}"), name)

        def record(problem: Any) -> Any:
            made[name] = choose(problem)
            return made[name]

        return record

    with contextlib.ExitStack() as stack:
        for name in CHOICES:
            stack.enter_context(replaced(name, recording(name)))
        thunk()
    return {name: choice for name, choice in made.items() if choice is not None}


def neighbours(name: str, choice: Any) -> list[Any]:
    """What else might be chosen: half and twice of each, and other depths of pipelining; the choice itself first."""
    if isinstance(choice, int):
        return [choice, *(n for n in (choice // 4, choice // 2, choice * 2, choice * 4) if n >= 1)]
    least = 16 if min(choice.M, choice.N) >= 16 else 1  # of tensor cores
    rows = (choice.M,) if name == "fused_blocks" else (choice.M // 2, choice.M, choice.M * 2)  # all queries
    columns, warps = ((n // 2, n, n * 2) for n in (choice.N, choice.num_warps))
    several = [choice._replace(M=M, N=N, num_warps=w) for M, N, w in itertools.product(rows, columns, warps)]
    several += [choice._replace(num_stages=stages) for stages in (1, 2, 3)]
    possible = (b for b in several if least <= min(b.M, b.N) and max(b.M, b.N) <= 256 and 1 <= b.num_warps <= 16)
    return list(dict.fromkeys([choice, *possible]))


def words(choice: Any) -> str:
    """`128 x 64, 8 warps, 2 stages`."""
    return str(choice) if isinstance(choice, int) else "{} x {}, {} warps, {} stages".format(*choice)


def differs(out: Any, right: Any) -> bool:
    """Whether an answer is another one, beyond what the order of sums and TF32 or half types make of it."""
    for a, b in zip(pytree.tree_leaves(out), pytree.tree_leaves(right), strict=True):
        tolerance = 4 * max(torch.finfo(b.dtype).eps, 2**-11)
        if not (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max():
            return True
    return False


def tune(row: Row, bench: Bench, share: tuple[int, int] | None = None) -> dict[str, Any]:
    """Time every variant of every choice of a row. `share`: only compile these of all variants, one of so many."""
    result: dict[str, Any] = {"row": str(row), "choices": {}}
    with precision(row.tf32):
        work = row.build(device=bench.device)
        call = work.thunk(work.ours, row.backward)
        right = call()
        for name, choice in chosen(call).items():

            def variant(other: Any, name: str = name) -> Any:
                with replaced(name, lambda problem: other):
                    return call()

            variants: dict[str, Thunk] = {
                words(other): functools.partial(variant, other) for other in neighbours(name, choice)
            }
            if share is not None:
                part, parts = share
                variants = {key: variants[key] for i, key in enumerate(variants) if i % parts == part}
            refused: dict[str, str] = {}
            good = usable(variants, bench, refused)
            if share is None:
                refused |= {key: "another answer" for key, thunk in good.items() if differs(thunk(), right)}
                replays = {key: bench.graph(thunk) for key, thunk in good.items() if key not in refused}
                found = {"chosen": words(choice), "times": bench.times(replays), "refused": refused}
                result["choices"][name] = found
                if words(choice) in refused:
                    result["wrong"] = f"{name}: {refused[words(choice)]}"
                del replays
                bench.forget()
    return result


def main(argv: list[str] | None = None) -> int:
    """Tune what the journal does not have yet; 1 if a row failed."""
    args = arguments("bench.gpu_tune", __doc__ or "").parse_args(argv)
    part, parts = map(int, args.shard.split("/"))
    share = (part, parts) if args.warm else None
    bench, journal = Bench(args.device, args.seconds), Journal(args.journal)
    rows = [row for row in import_rows() if row.gpu and row.op in OPS and (row.name == "tiny") == args.quick]
    work = {f"{row.op} {row}": functools.partial(tune, row, bench, share) for row in rows}
    return run_tasks({task: function for task, function in work.items() if args.rows in task}, bench, journal)


if __name__ == "__main__":
    raise SystemExit(main())
