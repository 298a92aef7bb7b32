"""CUDA C++ on the host: the CUDA library's own sources, compiled against an emulation of the runtime (emulation.h)."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
from pathlib import Path

import cuda_resources
import torch

from hotkernels import backends

HERE = Path(__file__).parent
ROOT = cuda_resources.ROOT
BUILD = ROOT / "build/emulated_cuda"
LIBRARY = BUILD / "libemulated_cuda.so"  # whoever loads it gets its kernels for the CPU
SELFTEST = BUILD / "libselftest.so"
# -O2, no contraction: quick to compile, and sums that a compiler cannot rearrange.
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-fvisibility=hidden", "-U_FORTIFY_SOURCE"]  # which takes a fiber's longjmp for an attack
ORDERS = range(16)  # bits: warps, lanes, blocks reversed, asynchronous copies done late


def build() -> Path:
    """Compile what changed."""
    setup = cuda_resources.build_script()
    found, compiler = setup.find_torch(), setup.find_compiler()
    if found is None or compiler is None:
        raise RuntimeError(setup.plan()[1][0])
    torch_home = found[0]
    extra = os.environ.get("HOTKERNELS_CXXFLAGS", "").split()
    common = [*FLAGS, *extra, "-DHK_EMULATION", f"-I{HERE}", f"-I{ROOT / 'csrc/include'}"]
    glue = [*common, *setup.STABLE_ABI, "-DUSE_CUDA", "-isystem", f"{torch_home / 'include'}"]
    kernels = [*common, "-fsanitize=alignment"]  # a GPU refuses wide accesses that a CPU takes anywhere
    steps = [(src, ["-x", "c++", *kernels]) for src in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    steps += [(src, ["-include", "bindings.h", *glue]) for src in sorted((ROOT / "python_bindings").glob("*_cuda.cpp"))]
    shared, own = (HERE / "emulation.cpp", glue), (HERE / "selftest.cpp", kernels)
    link = [f"-L{torch_home / 'lib'}", *os.environ.get("HOTKERNELS_LDFLAGS", "").split(), "-Wl,-Bsymbolic"]

    def words(parts: list[str]) -> str:
        return " ".join(part.replace("$", "$$") for part in parts)

    lines = [
        "rule cxx",
        f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out {words(link)} -ltorch_cpu -lc10",
    ]
    for src, flags in [*steps, shared, own]:
        lines += [f"build {src.name}.o: cxx {src}", f"  flags = {words(flags)}"]
    for library, parts in ((LIBRARY, [*steps, shared]), (SELFTEST, [own, shared])):
        lines += [f"build {library.name}: link {' '.join(f'{src.name}.o' for src, _ in parts)}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    run = subprocess.run([setup.find_ninja(), "-C", str(BUILD)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the emulated CUDA library must compile, got\n{run.stdout[-20000:]}")
    return LIBRARY


def load() -> None:
    """Let the emulated kernels, as backend "cuda", serve CPU tensors in this process."""
    torch.ops.load_library(str(build()))
    backends.LIBRARIES["_C_cuda"] = None
    for kernels in backends.OPS.values():
        if "cuda" in kernels:
            kernels["cuda"] = dataclasses.replace(kernels["cuda"], device="cpu")


def configure(order: int | None = None, compute_capability: int = 90, library: Path = LIBRARY) -> None:
    """Choose which warps, lanes and blocks run first and which GPU this is.

    `order` is a sum of bits, see emulation.h; None takes another at every launch.
    """
    set_ = ctypes.CDLL(str(library)).hk_emulation_set
    set_(ctypes.c_int(-1 if order is None else order), ctypes.c_int(compute_capability))


def selftest(which: int, *, order: int = 0, bug: bool = False) -> float | None:
    """The error of a kernel of selftest.cpp; infinite if its launch failed, None if there is no such kernel."""
    configure(order, library=SELFTEST)
    run = ctypes.CDLL(str(SELFTEST)).hk_emulation_selftest
    run.restype = ctypes.c_double
    error = run(which, bug)
    return {-1.0: float("inf"), -2.0: None}.get(error, error)
