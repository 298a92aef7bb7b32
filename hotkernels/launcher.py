"""Compiles Triton kernels for the arguments they get, once, and launches them with little time on the host.

Triton's own launcher looks at every argument of every call, and compiles anew when a length becomes divisible by 16.
Here a kernel says in its signature what its arguments are, and only what it needs to know is a constant:

- a parameter without annotation is a tensor; None makes it a constant;
- `tl.int32`, `tl.int64` and `tl.float32` are numbers, whatever their values;
- `tl.constexpr` parameters come last and are the constants.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from .backends import TRITON_DEVICE

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
    aligned: bool  # all tensors, and all strides named stride_*, allow vectors of 16 bytes of the first tensor's dtype

    def source(self) -> tuple[ASTSource, dict[str, int]]:
        """What triton.compile takes."""
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
                if self.aligned:
                    attributes[(i,)] = [["tt.divisibility", VECTOR_BYTES]]
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return ASTSource(self.kernel, signature, constants, attributes), options


@functools.cache
def _compiled(variant: Variant, device: int) -> Any:
    source, options = variant.source()
    with torch.cuda.device(device):
        return triton.compile(source, options=options)


class Launch(NamedTuple):
    """A kernel and all that it is given; its parameters are its tensors, then its numbers, then its constants."""

    kernel: Any
    programs: int
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[int | float, ...]
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int
    aligned: bool  # see Variant

    @property
    def variant(self) -> Variant:
        """What is compiled for it."""
        dtypes = tuple([None if t is None else t.dtype for t in self.tensors])
        return Variant(self.kernel, dtypes, self.constants, self.num_warps, self.num_stages, self.aligned)

    def on(self, *tensors: Tensor | None) -> Launch:
        """The same on other tensors of the same dtypes, shapes and strides."""
        kernel, programs, _, numbers, constants, num_warps, num_stages, aligned = self
        aligned = aligned and _are_aligned([t for t in tensors if t is not None])
        return Launch(kernel, programs, tensors, numbers, constants, num_warps, num_stages, aligned)


def launch(job: Launch) -> None:
    """Run a kernel on the current stream of its first tensor's device."""
    if job.programs == 0:
        return
    if job.programs > MAX_PROGRAMS:
        raise ValueError(f"{job.kernel.__name__}: at most {MAX_PROGRAMS} programs can be launched, got {job.programs}")
    if INTERPRETED:
        _interpret(job)
        return
    assert job.tensors[0] is not None
    device = job.tensors[0].get_device()
    compiled = _compiled(job.variant, device)
    if device == torch.cuda.current_device():
        compiled[(job.programs, 1, 1)](*job.tensors, *job.numbers, *job.constants)
    else:
        with torch.cuda.device(device):
            compiled[(job.programs, 1, 1)](*job.tensors, *job.numbers, *job.constants)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own takes 2 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def is_aligned(strides: Sequence[int], *tensors: Tensor) -> bool:
    """What Variant.aligned says; the strides are those named stride_*, the tensors all that the kernel gets."""
    elements = VECTOR_BYTES // tensors[0].element_size()
    return math.gcd(elements, *strides) == elements and _are_aligned(tensors)


def _are_aligned(tensors: Sequence[Tensor]) -> bool:
    return math.gcd(VECTOR_BYTES, *[t.data_ptr() for t in tensors]) == VECTOR_BYTES


def _interpret(job: Launch) -> None:
    """Triton's interpreter takes a bfloat16 for the integer of its bits: it gets float32 copies of the same strides.

    What kernels round to a half type on the way is therefore rounded in tests with float16 only.
    """
    given = [None if t is None else _in_float32(t) if t.dtype == torch.bfloat16 else t for t in job.tensors]
    job.kernel[(job.programs,)](*given, *job.numbers, *job.constants)
    for t, copy in zip(job.tensors, given, strict=True):
        if t is not None and copy is not None and copy is not t and not _repeats(t):
            t.data.copy_(copy)  # rounds to the nearest; autograd must not take a given tensor for changed


def _in_float32(t: Tensor) -> Tensor:
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((span,), (1,)).float().as_strided(t.shape, t.stride(), 0)


def _repeats(t: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True))
