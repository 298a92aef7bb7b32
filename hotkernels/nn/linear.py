"""Linear layers on the CPU by the faster of oneDNN and MKL: float32, bias and GELU within the matrix product.

PyTorch multiplies float32 with MKL, which leaves half of an AMD core with AVX-512 idle: 94 against 195 GF/s on an EPYC.
On a Xeon both reach 145 GF/s forward at 512 channels, and with the backward pass MKL 140, oneDNN 122: so oneDNN goes
forward everywhere, for bias and GELU, and backward where MKL is slow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from ..backends import LIBRARIES, wants_grad

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Multiplications from which oneDNN is called: it takes 15 us more than MKL for a call, and up to 50 to pack the weight.
_LEAST = 1 << 22
_MKL_IS_FAST = LIBRARIES["_C_cpu"] is None and torch.ops.hotkernels._is_intel()


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias alone: no hooks (weight_norm is one), no class derived from Linear."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) is nn.Linear and not any(hooks)


def linear(layer: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """layer(x), or gelu(layer(x)), for an nn.Linear."""
    if is_bare(layer):
        return multiply(x, layer.weight, layer.bias, gelu)
    out = layer(x)
    return F.gelu(out) if gelu else out


def multiply(x: Tensor, weight: Any, bias: Any, gelu: bool = False) -> Tensor:
    """x @ weight.T + bias, for x [..., C]; then gelu."""
    served = _served(x, weight)
    if served and not wants_grad(x, weight, bias):
        return _onednn(x, weight, bias, gelu)
    function = _recorded if served else F.linear
    out = function(x, weight, bias)
    return F.gelu(out) if gelu else out


def _served(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN serves this call. torch.compile calls what it finds best, and must not look at switches."""
    return (
        not torch.compiler.is_compiling()
        and _HAS_ONEDNN
        and torch.backends.mkldnn.enabled is True
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[-1] == weight.shape[1]  # of a wrong x, PyTorch's product says more
        and x.numel() * weight.shape[0] >= _LEAST
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    # Eager PyTorch has no public name for this product; it is the operator that torch.compile calls.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


def _recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """x [N, C] @ weight.T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        product = torch.mm if _MKL_IS_FAST else lambda a, b: _onednn(a, b.t())
        grad_x = product(grad_out, weight) if ctx.needs_input_grad[0] else None
        grad_weight = product(grad_out.t(), x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_out.sum(0) if ctx.needs_input_grad[2] else None
