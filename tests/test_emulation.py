"""GPU kernels without a GPU: CUDA C++ and Triton as they are and as they are compiled, each in a process of its own."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import emulation
import pytest
import torch
from conftest import EMULATED
from emulation.processes import EMULATE, Process

from hotkernels import backends

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(bool(EMULATED), reason="this process emulates a GPU backend itself")
KERNELS = range(12)  # of emulation/selftest.cpp


@pytest.fixture(scope="module")
def library() -> None:
    if backends.LIBRARIES["_C_cpu"] is not None:
        pytest.skip(str(backends.LIBRARIES["_C_cpu"]))
    emulation.build()


@pytest.mark.parametrize("which", KERNELS)
def test_emulation_runs_what_is_right_and_catches_what_is_not(library: None, which: int) -> None:
    errors = {}
    for order in emulation.ORDERS:
        assert emulation.selftest(which, order=order) == 0.0
        errors[order] = emulation.selftest(which, order=order, bug=True)
    assert any(errors.values()), "the seeded bug went unseen in every order"


def test_every_selftest_is_run(library: None) -> None:
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
    assert int(ran[1]) >= EMULATE[name][-1], f"{ran[0]}: fewer than it has"
    print(ran[0])


@pytest.mark.parametrize(("given", "taken", "said"), [(4, 3, "load"), (3, 4, "store")])
def test_the_interpreter_sees_what_is_out_of_bounds(given: int, taken: int, said: str) -> None:
    pytest.importorskip("triton")
    script = (
        "import torch; from emulation.bounds import copy_kernel, install; install()\n"
        f"a, b = torch.zeros(8)[:{given}], torch.ones(8)[:{taken}]\n"
        "for n in (3, 4): copy_kernel[(1,)](a, b, n, BLOCK=8); print('copied', n)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "copied 3\n", run.stderr
    assert f"{said} out of bounds: 1 of 4 elements" in run.stderr


def sum_by_ptx(change: Callable[[str], str], given: int, taken: int, skipped: int = 0) -> list[tuple[float, float]]:
    """(sum, what it should be), four times: `taken` of `given` numbers by what Triton compiles, after `change`."""
    from emulation import compiled_triton

    module = change(compiled_triton.example())
    sums = []
    for _ in range(4):  # with other threads first each time
        x, out = torch.randn(skipped + given)[skipped:], torch.zeros(1)
        parameters = struct.pack("<QQi", out.data_ptr(), x.data_ptr(), taken)
        compiled_triton.run(module, "sum_kernel", parameters, 1, 128, 1024, out, x)
        sums.append((out.item(), x[:taken].double().sum().item()))
    return sums


def test_what_triton_compiles_runs(library: None) -> None:
    pytest.importorskip("triton")
    for sum_, wanted in sum_by_ptx(str, 992, 992):
        assert abs(sum_ - wanted) < 1e-4


def without_barriers(ptx: str) -> str:
    changed = re.sub(r"bar\.sync\s+0;", "", ptx)
    assert changed != ptx
    return changed


def test_a_barrier_that_compiled_code_lacks_is_seen(library: None) -> None:
    pytest.importorskip("triton")
    assert any(abs(sum_ - wanted) > 1e-4 for sum_, wanted in sum_by_ptx(without_barriers, 992, 992))


@pytest.mark.parametrize(
    ("change", "given", "taken", "skipped", "said"),
    [
        (str, 991, 992, 0, "outside all tensors"),
        (str, 992, 992, 1, "not aligned to its size"),  # it was compiled for 16 bytes
        (lambda ptx: ptx.replace("bar.sync", "bar.red"), 992, 992, 0, "bar_red"),
    ],
    ids=["bounds", "alignment", "instruction"],
)
def test_what_a_gpu_would_refuse_is_refused(
    library: None,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[str], str],
    given: int,
    taken: int,
    skipped: int,
    said: str,
) -> None:
    pytest.importorskip("triton")
    with pytest.raises((RuntimeError, subprocess.CalledProcessError)):
        sum_by_ptx(change, given, taken, skipped)
    assert said in capfd.readouterr().err
