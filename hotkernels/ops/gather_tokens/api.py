"""Gathering chosen tokens, with their position embedding added in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import LIBRARIES, Kernel, choose, register
from ...dtypes import FLOATING, HALF, INTEGER, REAL
from ...errors import check_index, check_tensor, fail, matches
from ...operators import composite, differentiable_once, fake, wants_grad
from .reference import gather_tokens_bwd_reference, gather_tokens_reference

_OP = "gather_tokens"
register(
    _OP,
    torch=Kernel(REAL),
    cpp=Kernel(REAL, device="cpu", library="_C_cpu"),
    cuda=Kernel(REAL, device="cuda", library="_C_cuda"),
)
if LIBRARIES["_C_cpu"] is None and LIBRARIES["_C_cuda"] is not None:
    # As with invert_index: the backward of Triton's attention to keys of all samples sums them, per token, over slots.
    torch.library.impl("hotkernels::gather_tokens_bwd", "cuda")(gather_tokens_bwd_reference)


class GatherTokens(torch.autograd.Function):
    """gather_tokens over the raw operators: forward(x, index, pos), index int64 [B, M], pos [M, C] or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, pos: Tensor | None) -> Tensor:
        """Gather."""
        ctx.save_for_backward(index)
        ctx.num_tokens = x.shape[1]
        return torch.ops.hotkernels.gather_tokens_fwd(x, index, pos)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_out: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Sum, per token, the gradients of all places that took it, in a fixed order."""
        (index,) = saved
        grad_x = grad_pos = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.hotkernels.gather_tokens_bwd(grad_out, index, ctx.num_tokens)
        if ctx.needs_input_grad[2]:
            grad_pos, between = grad_out, list(range(2, grad_out.dim() - 1))
            if between:  # first: over dims that lie apart PyTorch sums seven times as long on a CPU
                grad_pos = grad_pos.sum(between, dtype=torch.float32 if grad_out.dtype in HALF else None)
            grad_pos = grad_pos.sum(0).to(grad_out.dtype)
        return grad_x, None, grad_pos


def gather_tokens(x: Tensor, index: Tensor, pos: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Copy the tokens named by `index` out of x, adding a position embedding to each place on the way.

    Equivalent to::

        out = x[torch.arange(B)[:, None], index]     # zeros where index is -1
        out = out + pos.view(M, 1, C)                # one 1 for each dim between N and C

    Args:
        x: [B, N, ..., C] floating, integer or bool, any strides; HoT's [B, F, J, C].
        index: [B, M] int64 or int32 in [-1, N); -1 gathers zeros. Tokens may repeat.
        pos: [M, C] or [1, M, C] floating, added to every place m (also where index is -1), cast to x's dtype.
        backend: "torch", "cpp", "cuda", or None for the fastest that can serve the call.

    Returns:
        [B, M, ..., C] of x's dtype, contiguous. Differentiable once in x and pos; the gradient of a repeated token is
        the sum over its places, in ascending order: the same bits every time (on the torch backend on CPUs only under
        ``torch.use_deterministic_algorithms``).

    Raises:
        ValueError, TypeError: ``gather_tokens: <arg> must be <expected>, got <actual>``.

    Numerics: copies are exact; half types add `pos` in float32 and round once; gradients are summed in float32 (float64
    for float64).

    Cost: one read and one write per gathered element, no extra memory; backward O(B (N + M)) integers, none on a GPU
    up to M = 8192.

    Source: the pruning step of HoT (Li et al., CVPR 2024, section 3.2), there an index, a copy and an addition.

    Example::

        >>> import torch, hotkernels
        >>> x = torch.arange(6.0).reshape(1, 3, 2)
        >>> hotkernels.gather_tokens(x, torch.tensor([[2, 0, -1]]))
        tensor([[[4., 5.],
                 [0., 1.],
                 [0., 0.]]])
    """
    check_tensor(_OP, "x", x, "[B, N, ..., C]", None)
    if x.dim() < 3:
        fail(_OP, "x", "[B, N, ..., C]", list(x.shape))
    B, N, *_, C = x.shape
    check_tensor(_OP, "index", index, "[B, M]", INTEGER, shape=(B, None), device=x.device)
    if pos is not None:
        M = index.shape[1]
        check_tensor(_OP, "pos", pos, "[M, C] or [1, M, C]", FLOATING, device=x.device)
        if x.dtype not in FLOATING:
            fail(_OP, "pos", "None where x is not floating", list(pos.shape))
        if not (matches(pos.shape, (M, C)) or matches(pos.shape, (1, M, C))):
            fail(_OP, "pos", f"[M, C] or [1, M, C] with M = {M}, C = {C}", list(pos.shape))
        # No reshape: it would be a step for autograd (10 us) even where it changes nothing.
        pos = (pos if pos.dim() == 2 else pos[0]).to(x.dtype).contiguous()
    index = index.long().contiguous()
    chosen = choose(_OP, x, backend)
    check_index(_OP, "index", index, N, chosen)
    if chosen == "torch":
        return gather_tokens_reference(x, index, pos)
    return _fused(x, index, pos)


@composite("gather_tokens(Tensor x, Tensor index, Tensor? pos) -> Tensor")
def _fused(x: Tensor, index: Tensor, pos: Tensor | None) -> Tensor:
    if not wants_grad(x, pos):
        return torch.ops.hotkernels.gather_tokens_fwd(x, index, pos)
    return GatherTokens.apply(x, index, pos)


@fake("gather_tokens_fwd")
def _gather_tokens_fwd_fake(x: Tensor, index: Tensor, pos: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], index.shape[1], *x.shape[2:])


@fake("gather_tokens_bwd")
def _gather_tokens_bwd_fake(grad_out: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    return grad_out.new_empty(grad_out.shape[0], num_tokens, *grad_out.shape[2:])
