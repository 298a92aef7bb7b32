"""Linear layers on the CPU by the faster of oneDNN and MKL: float32, bias and GELU within the matrix product.

PyTorch multiplies float32 with MKL, which leaves AMD cores with AVX-512 partly idle: 94 GFLOP/s where oneDNN reaches
195 on a Zen 5, 84 against 103 on a Zen 4. On a Xeon both reach 145, and with the backward pass MKL 140, oneDNN 122:
there oneDNN is called only for GELU, which it fuses (8,262 tokens from 512 to 1,024 channels: 77 ms instead of 94).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812

from ..backends import FROM_ENVIRONMENT, LIBRARIES
from ..operators import is_transformed, wants_grad
from .plain import is_plain

_PLAIN = (Tensor, nn.Parameter)
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and FROM_ENVIRONMENT != "torch"
)
_MKL_IS_FAST = LIBRARIES["_C_cpu"] is None and torch.ops.hotkernels._is_intel()
# The least number of multiplications, and of rows, for which oneDNN is called: a call costs 15 us more than MKL's (40
# between other work) and packs the weight. Measured: a Zen 4 breaks even at 14 to 25 M multiplications, and loses 5 to
# 12 % at 8 M and 20 % at 4 M. Estimated from oneDNN's speed there: a Zen 5 breaks even at 8 M, and at 32 rows. 8 M is
# for both, though a Zen 5's gain is an estimate. Intel's are not measured.
_LEAST = 1 << 22 if _MKL_IS_FAST else 1 << 23
_LEAST_ROWS = 192 if _MKL_IS_FAST else 32


def unrecorded(x: Tensor) -> bool:
    """Whether x is on a CPU and no autograd, compile, trace or torch.func records the call, so that it may be split."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed()
    return x.device.type == "cpu" and not recorded


def is_fast_on(weight: Any) -> bool:
    """Whether oneDNN, called from here, may be faster than PyTorch for a layer with this weight."""
    return _HAS_ONEDNN and is_strided(weight) and weight.device.type == "cpu" and weight.dtype == torch.float32


def is_strided(tensor: Any) -> bool:
    """Whether this is a plain tensor: no subclass, not sparse or nested, not in oneDNN's own layout."""
    return type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_nested


def calls_onednn(layer: Any, x: Tensor, gelu: bool = False) -> bool:
    """Whether `linear` calls something other than PyTorch does."""
    if not (is_plain(layer, nn.Linear) and _served(x, layer.weight)):
        return False
    return not _MKL_IS_FAST or (gelu and not wants_grad(x, layer.weight, layer.bias))


def linear(layer: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """layer(x), or gelu(layer(x)), for an nn.Linear."""
    if is_plain(layer, nn.Linear):
        return multiply(x, layer.weight, layer.bias, gelu)
    out = layer(x)
    return F.gelu(out) if gelu else out


def add_linear(residual: Tensor, layer: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
    """residual + layer(x), of one shape; without autograd, written to a contiguous `out`, which may be the residual."""
    if out is None or not (
        _MKL_IS_FAST and is_plain(layer, nn.Linear) and layer.bias is not None and _served(x, layer.weight)
    ):
        return torch.add(residual, linear(layer, x), out=out)
    # MKL adds to what is there, which saves a pass over the result.
    torch.add(residual, layer.bias, out=out)
    out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), layer.weight.t())
    return out


def multiply(x: Tensor, weight: Any, bias: Any, gelu: bool = False) -> Tensor:
    """x @ weight.T + bias, for x [..., C]; then gelu."""
    product: Callable[..., Tensor] = F.linear
    if (gelu or not _MKL_IS_FAST) and _served(x, weight):
        if not wants_grad(x, weight, bias):
            return _onednn(x, weight, bias, gelu)
        if not _MKL_IS_FAST:
            product = _recorded
    out = product(x, weight, bias)
    return F.gelu(out) if gelu else out


def _served(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN serves this call. torch.compile makes its own choice, and must not look at switches.

    Tensor subclasses go to F.linear, which a quantised weight overrides.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and is_strided(x)
        and is_strided(weight)
        and _HAS_ONEDNN
        and torch.backends.mkldnn.enabled is True
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]  # PyTorch's own error for a wrong x says more
        and x.numel() * weight.shape[0] >= _LEAST
        and x.numel() >= _LEAST_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
        and forward_ad._current_level < 0
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
        # Only what a gradient needs: frozen layers keep no tokens, which may then be written to.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        again = torch.is_grad_enabled()  # create_graph: by products that can be differentiated
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_out @ weight if again else _onednn(grad_out, weight.t())
        if ctx.needs_input_grad[1]:
            grad_weight = grad_out.t() @ x if again else _transposed_product(grad_out, x)
        return grad_x, grad_weight, grad_out.sum(0) if ctx.needs_input_grad[2] else None


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b. The first factor is copied for oneDNN, which takes up to 30 % longer: so the smaller one comes first."""
    return _onednn(a.t(), b.t()) if a.shape[1] <= b.shape[1] else _onednn(b.t(), a.t()).t().contiguous()
