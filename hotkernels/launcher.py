"""Compiles each Triton kernel once per kind of arguments, and launches it with little work on the host.

Triton's own launcher inspects every argument of every call, and compiles again when a length becomes divisible by 16.
Here the annotations of a kernel's parameters say what they are, and no value of a number specialises it:

- `*_ptr` without annotation is a tensor, or None, which is a constant; these come first;
- `tl.int32`, `tl.int64` and `tl.float32` are numbers, passed at run time;
- `tl.constexpr` parameters come last; each combination of values is compiled by itself.

Tensors of other dtypes are compiled for by themselves, too, and so are rows that cannot be read 16 bytes at once.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import ASTSource
from triton.compiler.compiler import max_shared_mem
from triton.runtime import driver

from .backends import TRITON_DEVICE
from .errors import fail

INTERPRETED = TRITON_DEVICE == "cpu"
VECTOR_BYTES = 16  # the widest load of a thread
MAX_PROGRAMS = 2**31 - 1

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Variant(NamedTuple):
    """All that the machine code of a kernel depends on."""

    kernel: Any
    dtypes: tuple[torch.dtype | None, ...]  # of its tensors, in the order of its parameters
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int
    aligned: tuple[int, ...]  # tensors whose addresses, and stride_* in the first's dtype, are multiples of 16 bytes

    def source(self) -> tuple[ASTSource, dict[str, int]]:
        """The source and the options that triton.compile takes."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        dtypes, values = iter(self.dtypes), iter(self.constants)
        assert self.dtypes[0] is not None
        elements = VECTOR_BYTES // self.dtypes[0].itemsize
        for i, parameter in enumerate(self.kernel.params):
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", next(values)
            elif parameter.annotation:
                signature[parameter.name] = parameter.annotation  # as Triton spells it: i32, i64, fp32
                if self.aligned and parameter.name.startswith("stride_"):
                    attributes[(i,)] = [["tt.divisibility", elements]]
            elif (dtype := next(dtypes)) is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", None
            else:
                signature[parameter.name] = _POINTERS[dtype]
                if i in self.aligned:
                    attributes[(i,)] = [["tt.divisibility", VECTOR_BYTES]]
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return ASTSource(self.kernel, signature, constants, attributes), options


_COMPILING = threading.Lock()  # threads that need the same kernel wait for the first of them


@functools.cache
def _compiled(variant: Variant, device: int) -> Any:
    source, options = variant.source()
    with torch.cuda.device(device):
        kernel = triton.compile(source, options=options)
        kernel._init_handles()  # load now: a launch would notice a failed load with the kernel already in this cache
    return kernel


@dataclass(eq=False, slots=True)
class Launch:
    """A kernel and all its arguments but the tensors, which have the same dtypes and strides in every launch."""

    kernel: Any
    programs: int
    numbers: tuple[int | float, ...]
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int
    rows: tuple[int, ...]  # places of the tensors whose rows are read or written whole
    aligned: bool  # whether the strides of those rows are multiples of 16 bytes
    compiled: dict[tuple[int, bool], Any] = field(default_factory=dict)  # (device, aligned) -> compiled kernel

    def aligned_on(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether rows in these tensors can be read 16 bytes at once.

        Addresses of what is read element by element are left out: they must not change how rows are read, and with that
        the order of sums.
        """
        addresses = [t.data_ptr() for i in self.rows if (t := tensors[i]) is not None]
        return self.aligned and math.gcd(VECTOR_BYTES, *addresses) == VECTOR_BYTES

    def variant(self, tensors: Sequence[Tensor | None]) -> Variant:
        """What is compiled for a launch on these tensors."""
        dtypes = tuple([None if t is None else t.dtype for t in tensors])
        aligned = self.rows if self.aligned_on(tensors) else ()
        return Variant(self.kernel, dtypes, self.constants, self.num_warps, self.num_stages, aligned)


def prepare(
    kernel: Any,
    programs: int,
    numbers: Mapping[str, int | float],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    dtype: torch.dtype,  # of its first tensor
    rows: Collection[str],  # pointers to rows that are read or written whole, of which some are its parameters
) -> Launch:
    """A launch of a kernel with those of the numbers and constants that its parameters name.

    Numbers named stride_* are the strides of its rows.
    """
    names = [name for name in kernel.arg_names if not name.endswith("_ptr")]
    taken = {name: numbers[name] for name in names if name not in constants}
    elements = VECTOR_BYTES // dtype.itemsize
    strides = [int(n) for name, n in taken.items() if name.startswith("stride_")]
    return Launch(
        kernel,
        programs,
        tuple(taken.values()),
        tuple([constants[name] for name in names if name in constants]),
        num_warps,
        num_stages,
        rows=tuple([i for i, name in enumerate(kernel.arg_names) if name in rows]),
        aligned=math.gcd(elements, *strides) == elements,
    )


def launch(job: Launch, *tensors: Tensor | None) -> None:
    """Run a kernel on these tensors, on the current stream of the first one's device."""
    if job.programs == 0:
        return
    if job.programs > MAX_PROGRAMS:
        fail(job.kernel.__name__, "the number of programs", f"at most {MAX_PROGRAMS}", job.programs)
    if INTERPRETED:
        _interpret(job, tensors)
        return
    assert tensors[0] is not None
    device, aligned = tensors[0].get_device(), job.aligned_on(tensors)
    compiled = job.compiled.get((device, aligned))
    if compiled is None:
        with _COMPILING:
            compiled = job.compiled[device, aligned] = _compiled(job.variant(tensors), device)
    if device == torch.cuda.current_device():
        _run(compiled, device, job, tensors)
    else:
        with torch.cuda.device(device):
            _run(compiled, device, job, tensors)


def _run(compiled: Any, device: int, job: Launch, tensors: Sequence[Tensor | None]) -> None:
    arguments = (*tensors, *job.numbers, *job.constants)
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
        compiled[(job.programs, 1, 1)](*arguments)
    else:  # the same without hooks takes half the time
        run, stream = compiled.run, driver.active.get_current_stream(device)
        run(job.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


class GPU(NamedTuple):
    """The properties of a GPU that the choice of blocks depends on."""

    shared_bytes: float  # the most that a block can have
    warp_groups: bool  # whether 128 threads multiply matrices together, as on Hopper alone


@functools.cache
def gpu(device: int) -> GPU:
    """Those of a device; -1 stands for Triton's interpreter, which has no limits."""
    if device < 0:
        return GPU(math.inf, warp_groups=True)
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    return GPU(max_shared_mem(device), hopper)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own takes 2 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def _interpret(job: Launch, tensors: Sequence[Tensor | None]) -> None:
    """Triton's interpreter computes with the bits of a bfloat16 as an integer: it gets float32 copies of equal strides.

    Rounding to a half type inside a kernel is therefore tested in float16 only.
    """
    given = [None if t is None else _in_float32(t) if t.dtype == torch.bfloat16 else t for t in tensors]
    job.kernel[(job.programs,)](*given, *job.numbers, *job.constants)
    for t, copy in zip(tensors, given, strict=True):
        if t is not None and copy is not None and copy is not t and not _repeats(t):
            t.data.copy_(copy)  # rounds to the nearest; autograd must not take a given tensor for changed


def _in_float32(t: Tensor) -> Tensor:
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((span,), (1,)).float().as_strided(t.shape, t.stride(), 0)


def _repeats(t: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True))
