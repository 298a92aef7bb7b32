"""What a call answers, gradients included, and whether two answers are the same, or one is as near to the truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from cases import tensors
from torch import Tensor


def answers(call: Callable[..., Any], *args: Tensor, parameters: Iterable[Tensor] = ()) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of the arguments and parameters under the same random ones of the outputs."""
    args = tuple(t.detach().requires_grad_() for t in args)
    out = call(*args)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(0)
    grad_outs = [torch.randn(o.shape, generator=generator, device="cpu").to(o) for o in outs]
    return (*(o.detach() for o in outs), *torch.autograd.grad(outs, (*args, *parameters), grad_outs))


def assert_same(ours: Any, other: Any, exactly: bool = True) -> None:
    """The same bits in every tensor, or the same within rounding."""
    ours, other = tensors(ours), tensors(other)
    assert len(ours) == len(other)
    zero = {"rtol": 0, "atol": 0} if exactly else {}
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **zero)


def assert_close(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], atol: float = 1e-5) -> None:
    """Within `atol` of a truth of any dtype, and the roundings that ours allows."""
    for a, b in zip(ours, truth, strict=True):
        rtol = 2**-8 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


def assert_as_accurate(ours: Tensor, torchs: Iterable[Tensor], truth: Tensor, factor: float, floor: Any) -> None:
    """Our error is at most `factor` times PyTorch's own in this dtype, however that computes it, beside `floor`."""
    assert ours.shape == truth.shape
    error, *errors = ((t.double() - truth).abs().max().item() for t in (ours, *torchs))
    allowed = max(e for e in errors if math.isfinite(e))
    assert error <= factor * allowed + floor, f"error {error:.3g}, PyTorch's own {allowed:.3g}, floor {floor:.3g}"
