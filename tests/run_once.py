"""Calls every op, forward and backward, on small odd inputs: what `make gpu` runs under compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/run_once.py

Inputs are drawn on the CPU, so that little else than our kernels runs on the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import time
import traceback

import attention_cases  # noqa: F401  # registers its ops
import torch
from cases import OPS, OpCase, tensors
from torch import Tensor
from torch.utils import _pytree as pytree

from hotkernels.backends import LIBRARIES
from hotkernels.backends import OPS as KERNELS


def main() -> int:
    """The small input of each op and dtype first, then others until the time is up; 1 if one failed, or none ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda", help="default cuda; cpu: the C++ kernels, to test this program")
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    backends = ("cuda", "triton") if args.device == "cuda" else ("cpp",)
    torch.manual_seed(0)
    calls = [
        (op, backend, dtype, case)
        for op in OPS
        for backend in backends
        if backend in KERNELS[op.name] and LIBRARIES[KERNELS[op.name][backend].library or "_C_cpu"] is None
        for dtype in (torch.float32, torch.bfloat16)
        for case in op.inputs
    ]
    calls.sort(
        key=lambda call: list(call[0].inputs).index(call[3])
    )  # the first case of all ops, the second of all, ...
    stop = time.monotonic() + args.seconds
    done = failed = 0
    for op, backend, dtype, case in itertools.takewhile(lambda _: time.monotonic() < stop, calls):
        try:
            once(op, backend, dtype, case, args.device)
        except Exception:  # one wrong call is told, and costs no other its turn
            failed += 1
            print(f"FAILED: {op.name}, {backend}, {dtype}, {case}\n{traceback.format_exc()}")
        if args.device == "cuda":
            torch.cuda.synchronize()  # raises where the context is lost
        done += 1
    print(f"{done} of {len(calls)} calls, {failed} failed: each op, forward and backward")
    return 0 if done and not failed else 1


def once(op: OpCase, backend: str, dtype: torch.dtype, case: str, device: str) -> None:
    """One call, and its gradients."""
    values = pytree.tree_map_only(Tensor, lambda t: t.to(device), op.inputs[case](dtype))
    leaves = [values[name].requires_grad_() for name in op.differentiable if name in values]
    out = tensors(op.function(**values, backend=backend))
    if leaves:
        torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])


if __name__ == "__main__":
    raise SystemExit(main())
