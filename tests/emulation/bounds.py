"""Triton's interpreter with an eye on memory: what a kernel loads or stores lies within the tensors it was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter

_given: list[tuple[int, int]] = []  # addresses [begin, end) of the running kernel's tensors


def span(t: Any) -> tuple[int, int]:
    """The addresses [begin, end) of a tensor's elements."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size() * (t.numel() > 0)


def _look(what: str, pointers: Any, mask: Any) -> None:
    size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
    addresses, wanted = np.broadcast_arrays(pointers.data.astype(np.int64), mask.data.astype(bool))
    addresses = addresses[wanted]
    outside = np.ones(addresses.shape, bool)
    for begin, end in _given:
        outside &= (addresses < begin) | (addresses + size > end)
    if outside.any():
        raise IndexError(f"{what} out of bounds: {outside.sum()} of {outside.size} elements")


def install() -> None:
    """From now on, a load or store out of bounds is an IndexError where the kernel does it."""
    arguments = interpreter.GridExecutor._init_args_hst
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def remember(self: Any, *args: Any) -> Any:
        given, named = arguments(self, *args)
        _given[:] = [span(t) for t in (*given, *named.values()) if hasattr(t, "data_ptr")]
        return given, named

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _look("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _look("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    interpreter.GridExecutor._init_args_hst = remember
    interpreter.InterpreterBuilder.create_masked_load = checked_load
    interpreter.InterpreterBuilder.create_masked_store = checked_store


@triton.jit
def copy_kernel(to_ptr, from_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a test of this file runs: n numbers, whether they exist or not."""
    i = tl.arange(0, BLOCK)
    tl.store(to_ptr + i, tl.load(from_ptr + i, mask=i < n), mask=i < n)
