"""Registers kernels as PyTorch operators for autograd, torch.compile, torch.export and torch.func.vmap."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .backends import LIBRARIES, call

F = TypeVar("F", bound=Callable[..., Any])
_TRITON = torch.library.Library("hotkernels", "IMPL")
_COMPOSITE = torch.library.Library("hotkernels", "FRAGMENT")
_DIFFERENTIABLE_ONCE = (
    "hotkernels: a fused operator is differentiable once, by a backward pass; for all other derivatives use plain "
    "PyTorch: backend='torch' for a call, HOTKERNELS_BACKEND=torch in the environment for a model"
)


def implement_in_triton(*operators: str, module: str) -> None:
    """Register the launchers of `module`, named as the raw operators, as their kernels on GPUs.

    The module, and Triton with it, is imported at the first call.
    """
    if LIBRARIES["triton"] is not None:
        return

    def lazy(operator: str) -> Callable[..., Any]:
        launcher = functools.cache(lambda: getattr(importlib.import_module(module), operator))
        return lambda *args: launcher()(*args)

    with warnings.catch_warnings():
        # The interpreter's kernels take the place of the C++ ones, on purpose.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for operator in operators:
            _TRITON.impl(operator, lazy(operator), backends.TRITON_DEVICE.upper())


def is_transformed() -> bool:
    """Whether torch.func transforms the code that runs."""
    return torch._C._are_functorch_transforms_active()


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a call on these is recorded for a backward pass; if not, it can skip its autograd.Function (7 us)."""
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise RuntimeError(_DIFFERENTIABLE_ONCE)  # a raw operator would return a derivative of zero
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                if is_transformed():
                    raise RuntimeError(_DIFFERENTIABLE_ONCE)
                return True
    return False


def composite(schema: str) -> Callable[[F], F]:
    """Make a function of raw operators and autograd.Functions an operator, too, for export, jit.trace and torch.func.

    Exporting an autograd.Function keeps only the raw operators inside it, and vmap hides requires_grad from it; both
    would silently drop gradients. As one operator it stays a single node, which trains and which `run_decompositions`
    expands; vmap calls it once per sample.
    """

    def decorate(function: F) -> F:
        if LIBRARIES["_C_cpu"] is not None:
            return function
        _COMPOSITE.define(schema)
        name = schema.partition("(")[0]
        _COMPOSITE.impl(name, function, "CompositeImplicitAutograd")
        operator = getattr(torch.ops.hotkernels, name)

        @functools.wraps(function)
        def whole(*args: Any) -> Any:
            apart = torch.compiler.is_exporting() or is_transformed() or torch.jit.is_tracing()
            return call(operator if apart else function, *args)

        return cast(F, whole)

    return decorate


class _Refusing(torch.autograd.Function):
    """Returns the first `count` of `tensors`; to differentiate them raises. The others only connect the graph."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(_DIFFERENTIABLE_ONCE)


def differentiable_once(backward: F) -> F:
    """An autograd.Function's backward, called with the saved tensors, too, whose results refuse to be differentiated.

    PyTorch's once_differentiable cuts them off from the saved tensors: a second derivative asked for these, by
    autograd.grad or by a Hessian, is zero there in silence.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint hands them out no second time
        if not torch.is_grad_enabled():  # unless create_graph: entering no_grad takes 5 us
            return call(backward, ctx, saved, *grads)
        with torch.no_grad():
            results = call(backward, ctx, saved, *grads)
        return _Refusing.apply(len(results), *results, *saved, *grads)

    return cast(F, guarded)


def fake(operator: str) -> Callable[[F], F]:
    """Register the fake (meta) kernel of a raw operator, if the operator is there: a library defines it."""

    def decorate(function: F) -> F:
        if LIBRARIES["_C_cpu"] is None:
            torch.library.register_fake(f"hotkernels::{operator}")(function)
        return function

    return decorate
