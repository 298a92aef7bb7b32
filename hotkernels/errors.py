"""The one error form, `<op>: <arg> must be <expected>, got <actual>`, and the checks that raise it."""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import numbers
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch._C import _get_dispatch_mode
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_get_bdim
from torch._subclasses import FakeTensor

from .dtypes import names

INTS: Any = (int, torch.SymInt, numbers.Integral)  # the last are NumPy's
_INT64_MAX, _FLOAT64_MAX = torch.iinfo(torch.int64).max, sys.float_info.max
FLOATS: Any = (float, int, torch.SymFloat, numbers.Real)
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_looking = contextvars.ContextVar("hotkernels_checked", default=False)


def fail(op: str, arg: str, expected: str, actual: object, kind: type[Exception] = ValueError) -> NoReturn:
    """Raise the one error form."""
    raise kind(f"{op}: {arg} must be {expected}, got {actual}")


def check_tensor(
    op: str,
    arg: str,
    value: Any,
    layout: str,
    dtypes: Sequence[torch.dtype] | None,
    *,
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check that `value` is a tensor of the given dtypes, shape (None = any size) and device.

    `layout` names the shape for a reader, as in "[B, N, C]".
    """
    if not isinstance(value, Tensor):
        fail(op, arg, f"a torch.Tensor {layout}", type(value).__name__, TypeError)
    if value.layout is not torch.strided or value.is_nested:
        fail(op, arg, "a dense tensor", "a nested one" if value.is_nested else value.layout, TypeError)
    if dtypes is not None and value.dtype not in dtypes:
        fail(op, arg, f"a tensor of {names(dtypes)}", names([value.dtype]), TypeError)
    if shape is not None and not matches(value.shape, shape):
        sizes = "" if all(s is None for s in shape) else f" = {['any' if s is None else s for s in shape]}"
        fail(op, arg, f"{layout}{sizes}".replace("'", ""), list(value.shape))
    if device is not None and value.device != device:
        fail(op, arg, f"on the device of the other tensors ({device})", value.device)


def matches(have: Sequence[int], want: Sequence[int | None]) -> bool:
    """Whether a shape is the wanted one; None = any size. Sizes one by one, which torch.compile can do with symbols."""
    if len(have) != len(want):
        return False
    for h, w in zip(have, want, strict=True):  # noqa: SIM110  a plain loop: this runs in every call
        if w is not None and h != w:
            return False
    return True


def check_int(
    op: str, arg: str, value: Any, low: int, high: int | None, meaning: str = "", default: int | None = None
) -> None:
    """Check that `value` is an int, of Python or NumPy, in [low, high].

    The error says what `high` is (`meaning`); of a `value` that equals `default`, it says so.
    """
    if isinstance(value, bool) or not isinstance(value, INTS):
        fail(op, arg, "an int", type(value).__name__, TypeError)
    if value < low or (high is not None and value > high):
        actual = f"{value} (the default)" if value == default else value
        fail(op, arg, f"at least {low}" if high is None else f"in [{low}, {meaning}{high}]", actual)
    if value > _INT64_MAX:
        fail(op, arg, "an int64", value)


def check_float(op: str, arg: str, value: Any) -> None:
    """Check that `value` is a finite number, of Python or NumPy."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, FLOATS):
            fail(op, arg, "a float", type(value).__name__, TypeError)
        if isinstance(value, np.floating):
            value = float(value)  # NumPy warns where the bounds below are beyond its type
    # Not isfinite, which torch.compile cannot ask about a float that changes; an int may be larger than any float.
    if not -_FLOAT64_MAX <= value <= _FLOAT64_MAX:
        fail(op, arg, "finite", value)


def check_probability(op: str, arg: str, value: Any) -> None:
    """Check that `value` is a dropout probability: a number in [0, 1)."""
    check_float(op, arg, value)
    if not 0.0 <= value < 1.0:
        fail(op, arg, "in [0, 1)", value)


def check_seed(op: str, seed: Any) -> None:
    """Check that `seed` is an int of 64 bits."""
    check_int(op, "seed", seed, -_INT64_MAX - 1, _INT64_MAX)


def check_bool(op: str, arg: str, value: Any) -> None:
    """Check that `value` is a bool, of Python or NumPy."""
    if value is not True and value is not False and not isinstance(value, np.bool_):
        fail(op, arg, "a bool", type(value).__name__, TypeError)


def count(text: str) -> int:
    """The type of an option that counts something, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def can_look(values: Tensor) -> bool:
    """Whether to look at values: on the CPU; on a GPU that would stall the stream, so there inside `checked()` only.

    Not where torch.compile or make_fx traces; fake and meta tensors have none.
    """
    if values.numel() == 0 or torch.compiler.is_compiling() or (values.device.type != "cpu" and not _looking.get()):
        return False
    return not (values.is_meta or isinstance(values, FakeTensor) or _get_dispatch_mode(_PROXY) is not None)


def check_index(op: str, arg: str, index: Tensor, size: int, backend: str, least: int = -1) -> None:
    """Check that every index is in [0, size), or -1 ("no token here") unless `least` is 0.

    Only if values can be read here (see `checked`) and the backend does not check them itself.
    """
    if backend == "cpp" or not can_look(index):
        return
    index = _of_all_samples(index)
    low, high = (int(v) for v in torch.aminmax(index))
    if low < least or high >= size:
        fail(op, arg, f"{'-1 or ' if least else ''}in [0, {size})", low if low < least else high)


def check_ascending(op: str, arg: str, index: Tensor, size: int) -> None:
    """Check that each row of index [B, M] ascends strictly in [0, size), if values can be read here."""
    if not can_look(index):
        return
    index = _of_all_samples(index).flatten(0, -2)
    low, high = (index.new_full((len(index), 1), edge) for edge in (-1, size))
    between = torch.cat([low, index, high], 1)
    wrong = between.diff() <= 0
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        before, after = between[row, place : place + 2].tolist()
        actual = after if place == 0 else before if place == index.shape[1] else f"{after} after {before}"
        fail(op, arg, f"ascending in [0, {size})", actual)


def _of_all_samples(index: Tensor) -> Tensor:
    """What vmap hides: its samples in the first dims."""
    while is_functorch_wrapped_tensor(index):
        place, index = maybe_get_bdim(index), get_unwrapped(index)
        index = index if place < 0 else index.movedim(place, 0)
    return index


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Look at index values on the GPU too, at the price of waiting for it; an index out of range is then an error.

    Outside this context, a slot whose index is out of range counts as absent on a GPU and is never read; so it does
    everywhere in what torch.compile makes of the torch backend. A thread started inside has no part in it.

    Example::

        >>> import torch, hotkernels
        >>> with hotkernels.checked():
        ...     hotkernels.gather_tokens(torch.zeros(1, 4, 8), torch.tensor([[0, 4]]))
        Traceback (most recent call last):
            ...
        ValueError: gather_tokens: index must be -1 or in [0, 4), got 4
    """
    token = _looking.set(True)
    try:
        yield
    finally:
        _looking.reset(token)
