"""A CUDA driver that runs nothing, for Triton: what a launch hands to a driver can be looked at without a GPU.

PYTHONPATH=tests python -m emulation.driver    # what attention in Triton costs the host

"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import os
import statistics
import subprocess
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import cuda_resources
import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver as triton_driver

import hotkernels
from hotkernels import backends, launcher, operators
from hotkernels.launcher import Launch
from hotkernels.ops.gathered_attention import launches, launches_backward

HERE = Path(__file__).parent
LIBRARY = cuda_resources.ROOT / "build/emulated_driver/libcuda.so.1"
STREAM = 0x5EA
_PARAMETERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_ON_LAUNCH = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p))


class Address(NamedTuple):
    """What a launch looks at of a tensor on a GPU."""

    address: int
    dtype: torch.dtype
    device: int

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device


class Seen(NamedTuple):
    """What reached the driver."""

    grid: tuple[int, ...]
    threads: tuple[int, ...]
    shared_bytes: int
    stream: int
    parameters: list[tuple[str, Any]]


class StubDriver:
    """The driver's side of a launch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._on_launch = ctypes.c_void_p.in_dll(library, "hk_on_launch")
        self._refuse = {what: ctypes.c_int.in_dll(library, f"hk_refuse_{what}") for what in ("launch", "load")}

    def seen(self, job: Launch, tensors: Sequence[Any]) -> list[Seen]:
        """Launch, and what reached the driver."""
        found: list[Seen] = []

        def on_launch(config: Any, params: Any) -> None:
            stream = ctypes.c_uint64.from_address(ctypes.addressof(config.contents) + 32).value
            values = [
                (name, kind.from_address(params[place]).value)
                for place, (name, kind, _) in enumerate(parameters(job, tensors))
            ]
            found.append(Seen(tuple(config[0:3]), tuple(config[3:6]), config[6], stream, values))

        callback = _ON_LAUNCH(on_launch)
        self._on_launch.value = ctypes.cast(callback, ctypes.c_void_p).value
        try:
            launcher.launch(job, *tensors)
        finally:
            self._on_launch.value = None
        return found

    @contextlib.contextmanager
    def refusing(self, what: str) -> Iterator[None]:
        """Every launch, or load of machine code, is refused."""
        self._refuse[what].value = 1
        try:
            yield
        finally:
            self._refuse[what].value = 0


def parameters(job: Launch, tensors: Sequence[Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, C type and value of what machine code is given, in order: no constants, no tensors that are None."""
    given, numbers = iter(tensors), iter(job.numbers)
    for parameter in job.kernel.params:
        if parameter.is_constexpr:
            continue
        if parameter.annotation:
            yield parameter.name, _PARAMETERS[parameter.annotation], next(numbers)
        elif (tensor := next(given)) is not None:
            yield parameter.name, ctypes.c_uint64, tensor.data_ptr()


def meant(job: Launch, tensors: Sequence[Any]) -> list[tuple[str, Any]]:
    """What the machine code should be given."""
    return [(name, kind(value).value) for name, kind, value in parameters(job, tensors)]


def on_a_gpu(tensors: Sequence[Any], device: int = 0, offset: int = 0) -> list[Address | None]:
    """An address of its own for each tensor, `offset` bytes beyond a multiple of 4096."""
    return [t if t is None else Address((1 << 46) + 4096 * i + offset, t.dtype, device) for i, t in enumerate(tensors)]


def _current_device() -> int:  # these two are functions, not mocks, so that a launch can be timed
    return 0


def _current_stream(device: int) -> int:
    return STREAM + device


def _forget() -> None:
    for planned in (launches._planned, launches_backward._planned, launcher._compiled, launcher.gpu):
        planned.cache_clear()


@contextlib.contextmanager
def stub_driver() -> Iterator[StubDriver]:
    """Triton launches on an H100 that is not there."""
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    compiler = cuda_resources.build_script().find_compiler()
    assert compiler is not None
    flags = ["-x", "c", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, str(HERE / "libcuda.c"), "-o", str(LIBRARY)], check=True)
    library = ctypes.CDLL(str(LIBRARY), ctypes.RTLD_GLOBAL)  # found from now on by its name
    patches = (
        mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(LIBRARY.parent)),
        mock.patch.object(torch.cuda, "current_device", _current_device),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _current_stream, create=True),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()
        _forget()
        triton_driver.set_active(nvidia.CudaDriver())
        try:
            yield StubDriver(library)
        finally:
            _forget()
            gc.collect()  # compiled kernels go while their driver is there
            triton_driver._active = None


def serve_cpu() -> None:
    """Let Triton's launchers, as backend "triton", serve CPU tensors in this process."""
    backends.LIBRARIES["triton"] = None
    backends.TRITON_DEVICE = "cpu"
    for op in ("gathered_attention", "recovery_attention"):
        kernels = backends.OPS[op]
        kernels["triton"] = dataclasses.replace(kernels["triton"], device="cpu")
        parts = ("fwd", "bwd", "packed_bwd")[: 3 if op == "gathered_attention" else 2]
        for module, names in (("launches", parts[:1]), ("launches_backward", parts[1:])):
            operators.implement_in_triton(
                *(f"{op}_{name}" for name in names), module=f"hotkernels.ops.gathered_attention.{module}"
            )


def main() -> None:
    """Time calls on CPU tensors that nothing is done with, on one thread: medians of 5 times 1000."""
    torch.set_num_threads(1)
    serve_cpu()
    with stub_driver(), mock.patch.object(torch.cuda, "current_device", _cpu):
        _time()


def _time() -> None:
    shape = (2, 8, 17, 64)
    inputs = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(3)]
    leaves = [t.clone().requires_grad_() for t in inputs]
    grad_out = torch.randn(shape, dtype=torch.bfloat16)
    attend = functools.partial(hotkernels.gathered_attention, backend="triton")
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: attend(*inputs),
        "forward and backward": lambda: torch.autograd.grad(attend(*leaves), leaves, grad_out),
    }
    calls["a launch alone"] = functools.partial(launcher.launch, *_launch_of(inputs))
    for name, call in calls.items():
        timeit.timeit(call, number=500)
        times = [timeit.timeit(call, number=1000) * 1e3 for _ in range(5)]
        print(f"{name}: {statistics.median(times):.1f} us")


def _cpu() -> int:  # the device of CPU tensors, as they say it
    return -1


def _launch_of(inputs: list[torch.Tensor]) -> tuple[Any, ...]:
    with mock.patch.object(launches, "launch") as launch:
        launches.gathered_attention_fwd(*inputs, None, None, None, 1.0)
    return launch.call_args.args


if __name__ == "__main__":
    main()
