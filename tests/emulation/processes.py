"""The processes that run the tests of GPU backends without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import cuda_resources
import torch

import emulation
from hotkernels import backends

TESTS = Path(__file__).parents[1]
# How a process is told to emulate a backend, which of its tests to run, and how many these are at least (names may
# change under an expression). The interpreter is slow, so two share them, and half types are little else than float32
# to it: all shapes for float32. What Triton compiles rounds as a GPU does. Of CUDA's PTX, what runs kernels: compiling,
# exporting and refusing are proved by "cuda"; and both forms of dpc_knn with channels for one block, and for several.
CUDA, TRITON = {"HOTKERNELS_EMULATE_CUDA": "1"}, {"TRITON_INTERPRET": "1"}
EMULATE = {
    "cuda": (CUDA, "cuda", 1300),
    "cuda by ptx": (
        {"HOTKERNELS_EMULATE_CUDA": "ptx"},
        "cuda and ((both_forms and (-3-cuda or -130-cuda)) or"
        " (conformance and (forward or gradient or strides or gradcheck or out_of_range)))",
        615,
    ),
    "triton ops": (TRITON, "triton and not conformance", 205),
    "triton conformance": (TRITON, "triton and conformance and not (float16 and not small)", 320),
    "triton by ptx": (
        {"HOTKERNELS_EMULATE_TRITON": "90"},
        "triton and conformance and (bfloat16 or (float32 and (81 or 117)))",
        185,
    ),
}


class Process:
    """A command that writes what it says to a file."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.popen = subprocess.Popen(command, cwd=TESTS.parent, env=environment, stdout=file, stderr=file)

    def finished(self) -> tuple[int, str]:
        """Its status and all that it said."""
        return self.popen.wait(), self.log.read_text()


def start(folder: Path) -> dict[str, Process]:
    """One of each that can run here."""
    if backends.LIBRARIES["_C_cpu"] is not None or torch.cuda.is_available():
        return {}
    emulation.build()  # once, not by two at a time
    running = {}
    for name, (environment, expression, _) in EMULATE.items():
        backend = name.partition(" ")[0]
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            continue
        if name == "cuda by ptx" and cuda_resources.build_script().find_nvcc() is None:
            continue
        ops = [op for op, kernels in backends.OPS.items() if backend in kernels]
        files = sorted({path for op in ("conformance", *ops) for path in TESTS.glob(f"test_{op}*.py")})
        command = [sys.executable, "-m", "pytest", "-q", "-k", expression, *map(str, files)]
        running[name] = Process(command, os.environ | environment | {"OMP_NUM_THREADS": "1"}, folder / name)
    return running
