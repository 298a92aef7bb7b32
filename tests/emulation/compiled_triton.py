"""Triton on the host: launches run the PTX that Triton compiles for a GPU, on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import subprocess
from typing import Any

import cuda_resources
import triton
import triton.language as tl
import triton_resources
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import emulation
from emulation import bounds, driver, ptx
from emulation.libraries import HERE, MACHINE, TRITON_FLAGS
from hotkernels.launcher import Launch, Variant
from hotkernels.ops.gathered_attention import launches as forward
from hotkernels.ops.gathered_attention import launches_backward as backward

BUILD = cuda_resources.ROOT / "build/emulated_triton"
# Lanes always in one order: some hold the same number, each rounded in its own way, and store it to one place.
_orders = itertools.cycle(order for order in emulation.ORDERS if not order & 2)


class Range(ctypes.Structure):
    """Memory that a kernel may read and write."""

    _fields_ = (("begin", ctypes.c_uint64), ("end", ctypes.c_uint64))


def run(module: str, kernel: str, parameters: bytes, blocks: int, threads: int, shared_bytes: int, *given: Any) -> None:
    """Launch a kernel of a PTX module that may touch nothing but the tensors given."""
    (entry,) = [entry for entry in ptx.entries(module) if entry.name == kernel]
    parameters = parameters.ljust(entry.parameter_bytes, b"\0")  # Triton's scratch memory, which no kernel asks for
    spans = sorted(bounds.span(t) for t in given)
    ranges = (Range * len(spans))(*spans)
    emulation.configure(next(_orders))
    launch = ctypes.CDLL(str(MACHINE)).hk_ptx_launch
    launch.restype = ctypes.c_bool
    function = ctypes.cast(_library(module)[f"K_{kernel}"], ctypes.c_void_p)
    sizes = ctypes.c_int64(shared_bytes), ranges, ctypes.c_int64(len(spans))
    if not launch(function, parameters, blocks, threads, *sizes):
        raise RuntimeError(f"{kernel}: its launch must succeed, but did not: standard error says why")


@functools.cache
def _library(module: str) -> ctypes.CDLL:
    machine, translated = "".join(path.read_text() for path in sorted(HERE.glob("ptx_*.h"))), ptx.translate(module)
    stem = BUILD / hashlib.sha256((translated + machine).encode()).hexdigest()[:32]
    library = stem.with_suffix(".so")
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        source, made = stem.with_suffix(f".{os.getpid()}.cpp"), stem.with_suffix(f".{os.getpid()}.so")
        source.write_text(translated)
        compiler = cuda_resources.build_script().find_compiler()
        assert compiler is not None
        flags = [*TRITON_FLAGS, "-shared", str(MACHINE), f"-Wl,-rpath,{MACHINE.parent}"]
        subprocess.run([compiler, str(source), *flags, "-o", str(made)], check=True)
        made.rename(library)  # at once, in whichever process
        source.unlink()
    return ctypes.CDLL(str(library))


@functools.cache
def _compiled(variant: Variant, capability: int) -> tuple[str, str, int]:
    source, options = variant.source()
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return made.asm["ptx"], made.metadata.name, made.metadata.shared


def install(capability: int) -> None:
    """Let Triton's kernels, as compiled for this GPU, as backend "triton", serve CPU tensors in this process."""
    emulation.build()
    driver.serve_cpu()

    def launch(job: Launch, *tensors: Tensor | None) -> None:
        if job.programs == 0:
            return
        module, kernel, shared_bytes = _compiled(job.variant(tensors), capability)
        parameters = b""
        for _, kind, value in driver.parameters(job, tensors):
            size = ctypes.sizeof(kind)
            parameters = parameters.ljust(-(-len(parameters) // size) * size, b"\0") + bytes(kind(value))
        given = [t for t in tensors if t is not None]
        run(module, kernel, parameters, job.programs, 32 * job.num_warps, shared_bytes, *given)

    forward.launch = backward.launch = launch
    forward.gpu = backward.gpu = lambda device: triton_resources.gpu(capability)


@triton.jit
def sum_kernel(to_ptr, from_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What tests of this file run: the sum of n numbers."""
    i = tl.arange(0, BLOCK)
    tl.store(to_ptr, tl.sum(tl.load(from_ptr + i, mask=i < n, other=0.0)))


def example() -> str:
    """The PTX of sum_kernel on four warps, of up to 1024 numbers, a multiple of 16 at a multiple of 16 bytes."""
    signature = {"to_ptr": "*fp32", "from_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    divisible = [["tt.divisibility", 16]]
    source = ASTSource(sum_kernel, signature, {"BLOCK": 1024}, {(1,): divisible, (2,): divisible})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}).asm["ptx"]
