"""GPU kernels without a GPU: CUDA C++ emulated on the host, Triton in its interpreter, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
from conftest import EMULATED, GPU_BACKENDS

from hotkernels import backends

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(bool(EMULATED), reason="this process emulates a GPU backend itself")
KERNELS = range(8)  # of emulation/selftest.cpp


@pytest.fixture(scope="module")
def library() -> Path:
    if backends.LIBRARIES["_C_cpu"] is not None:
        pytest.skip(str(backends.LIBRARIES["_C_cpu"]))
    return emulation.build()


@pytest.mark.parametrize("which", KERNELS)
def test_emulation_runs_what_is_right_and_catches_what_is_not(library: Path, which: int) -> None:
    errors = {}
    for order in emulation.ORDERS:
        emulation.configure(order)
        assert emulation.selftest(which, bug=False) == 0.0
        errors[order] = emulation.selftest(which, bug=True)
    assert any(errors.values()), "the seeded bug went unseen in every order"


def test_every_selftest_is_run(library: Path) -> None:
    assert emulation.selftest(len(KERNELS), bug=False) is None


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_gpu_backend_without_a_gpu(backend: str) -> None:
    """The tests of every op that has the backend, on CPU tensors."""
    if backends.LIBRARIES["_C_cpu"] is not None:
        pytest.skip(str(backends.LIBRARIES["_C_cpu"]))
    if backend == "triton":
        pytest.importorskip("triton")
    ops = [op for op, kernels in backends.OPS.items() if backend in kernels]
    files = [HERE / f"test_{name}.py" for name in ("conformance", *ops)]
    emulate = {"cuda": {"HOTKERNELS_EMULATE_CUDA": "1"}, "triton": {"TRITON_INTERPRET": "1"}}[backend]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", backend, *map(str, files)]
    run = subprocess.run(command, cwd=HERE.parent, env={**os.environ, **emulate}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    ran = re.search(rf"kernel tests run per backend: {backend} (\d+)", run.stdout)
    assert ran, f"no kernel test ran on {backend}"
    print(ran[0])
