"""Times an op against the published eager code on shapes of your own: `hotkernels bench`.

Correctness comes before time: a workload whose answers are wrong is not timed. Contenders take turns, so that whatever
else the machine does hits all of them; medians are reported. The suite in bench/ is built on what is here.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import math
import os
from collections.abc import Sequence

import torch

from ..errors import count
from .timing import EventClock, interleaved, machine, mebibytes, peak_memory
from .workloads import WORKLOADS

_SHAPES = {
    "gather_tokens": ("B,N,C", "B,N,J,C"),
    "recovery_attention": ("B,F,J,C",),
    "invert_index": ("B,Nq,K",),
}
"""What --shape may be, where it is not B,N,C."""


def _shape(text: str) -> tuple[int, ...]:
    with contextlib.suppress(ValueError):
        sizes = tuple(int(size) for size in text.split(","))
        if min(sizes) >= 1 and max(sizes) <= torch.iinfo(torch.int64).max:
            return sizes
    raise argparse.ArgumentTypeError(f"must be sizes of at least 1, as in 16,243,512, got '{text}'")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of at least 0, got '{text}'")


def _threads(text: str) -> int:
    threads, most = count(text), 4 * (os.cpu_count() or 1)  # far more, and OpenMP ends the process
    if threads > most:
        raise argparse.ArgumentTypeError(f"must be in [1, {most}], four to each core, got {threads}")
    return threads


def _device(text: str) -> str:
    if text.partition(":")[0] not in ("cpu", "cuda"):  # others have no clock here, and meta tensors no values
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got '{text}'")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        why = "torch has no CUDA" if isinstance(error, AssertionError) else str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"must be a device that is here, got '{text}' ({why})") from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hotkernels bench",
        description="Time an op against the published eager code on your own shapes, after checking its answers.",
        epilog="example: hotkernels bench --op dpc_knn --shape 16,243,512 --clusters 81 -k 2",
    )
    parser.add_argument("--op", choices=WORKLOADS, default="dpc_knn", help="default dpc_knn")
    parser.add_argument(
        "--shape",
        type=_shape,
        required=True,
        metavar="B,N,C",
        help="of x; gather_tokens takes B,N,J,C too; recovery_attention: of what is recovered, B,F,J,C; "
        "invert_index: of the index, B,Nq,K",
    )
    parser.add_argument(
        "--clusters",
        type=count,
        metavar="M",
        help="tokens kept, gathered, merged into, attended to (N: all) or recovered from, default N / 4; invert_index: "
        "that the index points to, default Nq",
    )
    parser.add_argument(
        "-k",
        type=count,
        help="dpc_knn: neighbours per density, itself included (default 5); gathered_attention: keys per query",
    )
    parser.add_argument("--heads", type=count, help="of attention (default 8)")
    parser.add_argument("--smooth", action="store_true", default=None, help="dpc_knn: a random walk instead of noise")
    dtypes = ("float32", "float16", "bfloat16", "float64")
    parser.add_argument("--dtype", choices=dtypes, help="of x (default float32); an index is int64")
    parser.add_argument("--device", type=_device, default="cpu", help="default cpu")
    parser.add_argument("--backend", help="of ours: cuda, triton, cpp or torch (default: the fastest that serves it)")
    parser.add_argument("--backward", action="store_true", help="time forward + backward")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the eager code")
    parser.add_argument("--threads", type=_threads, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seconds", type=_seconds, default=2.0, help="time per contender (default 2)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 if our answers are right, else 1."""
    parser = _parser()
    args = parser.parse_args(argv)
    build = WORKLOADS[args.op]
    named = ("k", "heads", "smooth", "dtype")
    options = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    for name in options.keys() - inspect.signature(build).parameters.keys():
        parser.error(f"{args.op} has no option '{name}'")
    if args.op == "gathered_attention" and args.clusters and args.k:
        parser.error("gathered_attention takes --clusters (one set of keys) or -k (keys per query), not both")
    shapes = _SHAPES.get(args.op, ("B,N,C",))
    if len(args.shape) not in (shape.count(",") + 1 for shape in shapes):
        parser.error(f"--shape must be {' or '.join(shapes)}, got {len(args.shape)} sizes")
    tokens = args.shape[1]
    inverts = args.op == "invert_index"  # of Nq queries' keys: there may be more tokens than queries
    clusters = args.clusters or (tokens if inverts else max(1, tokens // 4))
    if clusters > tokens and not inverts:
        parser.error(f"--clusters must be in [1, N = {tokens}], got {clusters}")
    if args.dtype is not None:
        options["dtype"] = getattr(torch, args.dtype)
    options |= {"device": args.device, "backend": args.backend}

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # its clock, its memory and its name are those of the current one
    try:
        try:
            work = build(args.shape, clusters, **options)
        except RuntimeError as error:  # PyTorch's, of memory
            parser.error(f"--shape must be one that fits the memory, got {args.shape} ({str(error).splitlines()[0]})")
        if args.backward and not work.grad_of:
            parser.error(f"{args.op} has no backward")
        print("; ".join(f"{name} {value}" for name, value in machine().items()))
        dtype = str(work.args[0].dtype).removeprefix("torch.")
        print(f"{args.op} {work.what}, {dtype}, " + ("forward + backward" if args.backward else "forward"))
        wrong = work.check(args.backward)
        if wrong:
            print(f"WRONG: {wrong}")
            return 1
        contenders = work.contenders(["eager", "ours", "sdpa", *["compile"] * args.compile])
        thunks = {name: work.thunk(function, args.backward) for name, function in contenders.items()}
        clock = EventClock() if device.type == "cuda" else None
        timings = interleaved(thunks, args.seconds, clock=clock)
        for name, timing in timings.items():
            memory = peak_memory(thunks[name], args.device)
            print(
                f"  {name:<8}{timing.median * 1e3:10.3f} ms  [{timing.lower * 1e3:.3f}, {timing.upper * 1e3:.3f}]"
                f"{timings['eager'].median / timing.median:8.2f}x"
                + ("" if memory is None else f"{mebibytes(memory):10.1f} MiB extra")
            )
        if args.op == "gathered_attention" and args.k:
            print("  sdpa takes no index: it attends to all keys")
    except (ValueError, TypeError) as error:
        if " must be " not in str(error):  # not of the one form: a defect, which shows where it is
            raise
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)
    return 0
