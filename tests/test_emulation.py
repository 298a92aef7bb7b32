"""GPU kernels without a GPU: CUDA C++ emulated on the host, Triton in its interpreter, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from conftest import EMULATED
from emulation.processes import EMULATE, Process

from hotkernels import backends

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(bool(EMULATED), reason="this process emulates a GPU backend itself")
KERNELS = range(11)  # of emulation/selftest.cpp


@pytest.fixture(scope="module")
def library() -> Path:
    if backends.LIBRARIES["_C_cpu"] is not None:
        pytest.skip(str(backends.LIBRARIES["_C_cpu"]))
    return emulation.build()


@pytest.mark.parametrize("which", KERNELS)
def test_emulation_runs_what_is_right_and_catches_what_is_not(library: Path, which: int) -> None:
    errors = {}
    for order in emulation.ORDERS:
        assert emulation.selftest(which, order=order) == 0.0
        errors[order] = emulation.selftest(which, order=order, bug=True)
    assert any(errors.values()), "the seeded bug went unseen in every order"


def test_every_selftest_is_run(library: Path) -> None:
    assert emulation.selftest(len(KERNELS)) is None


@pytest.mark.parametrize("name", EMULATE)
def test_gpu_backend_without_a_gpu(emulated: dict[str, Process], name: str) -> None:
    """The tests of every op that has the backend, on CPU tensors."""
    if backends.LIBRARIES["_C_cpu"] is not None:
        pytest.skip(str(backends.LIBRARIES["_C_cpu"]))
    if torch.cuda.is_available():
        pytest.skip("here is a GPU: every test with the backend fixture runs on it")
    if name not in emulated:
        pytest.skip(f"{name}: not installed")
    status, said = emulated[name].finished()
    assert status == 0, said[-8000:]
    ran = re.search(rf"kernel tests run per backend: {name.partition(' ')[0]} (\d+)", said)
    assert ran, f"no kernel test ran: {name}"
    print(ran[0])


@pytest.mark.parametrize(("given", "taken", "said"), [(4, 3, "load"), (3, 4, "store")])
def test_the_interpreter_sees_what_is_out_of_bounds(given: int, taken: int, said: str) -> None:
    pytest.importorskip("triton")
    script = (
        "import torch; from emulation.bounds import copy_kernel, install; install()\n"
        "a, b = torch.zeros(8)[:{}], torch.ones(8)[:{}]\n"
        "copy_kernel[(1,)](a, b, {}, BLOCK=8); print('copied')\n"
    )
    for n in (3, 4):
        run = subprocess.run(
            [sys.executable, "-c", script.format(given, taken, n)],
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
        )
        assert ("copied" in run.stdout) == (n == 3), run.stderr
        assert (f"{said} out of bounds: 1 of {n} elements" in run.stderr) == (n == 4), run.stderr
