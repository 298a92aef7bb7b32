"""GPU kernels without a GPU: CUDA C++ emulated on the host, Triton in its interpreter, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import emulation
import pytest
import torch
from conftest import EMULATED

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


# How a process is told to emulate a backend, and which of its tests to run. The interpreter is slow, so two share them;
# and half types are little else than float32 to it: all shapes for float32, forward for float16 too.
CUDA, TRITON = {"HOTKERNELS_EMULATE_CUDA": "1"}, {"TRITON_INTERPRET": "1"}
EMULATE = {
    "cuda": (CUDA, "cuda"),
    "triton ops": (TRITON, "triton and not conformance"),
    "triton conformance": (
        TRITON,
        "triton and conformance and not (bfloat16 and not small) and not (test_gradients and float16 and not small)",
    ),
}


class Process:
    """A command that writes what it says to a file."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.popen = subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=file, stderr=file)

    def finished(self) -> tuple[int, str]:
        """Its status and all that it said."""
        return self.popen.wait(), self.log.read_text()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """All at once: they take minutes."""
    if backends.LIBRARIES["_C_cpu"] is not None:
        pytest.skip(str(backends.LIBRARIES["_C_cpu"]))
    if torch.cuda.is_available():
        pytest.skip("here is a GPU: every test with the backend fixture runs on it")
    folder = tmp_path_factory.mktemp("emulation")
    running = {}
    for name, (environment, expression) in EMULATE.items():
        backend = name.partition(" ")[0]
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            continue
        ops = [op for op, kernels in backends.OPS.items() if backend in kernels]
        files = sorted({path for op in ("conformance", *ops) for path in HERE.glob(f"test_{op}*.py")})
        command = [sys.executable, "-m", "pytest", "-q", "-k", expression, *map(str, files)]
        running[name] = Process(command, os.environ | environment, folder / name)
    yield running
    for process in running.values():
        process.popen.kill()


@pytest.mark.parametrize("name", EMULATE)
def test_gpu_backend_without_a_gpu(processes: dict[str, Process], name: str) -> None:
    """The tests of every op that has the backend, on CPU tensors."""
    if name not in processes:
        pytest.skip(f"{name}: not installed")
    status, said = processes[name].finished()
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
