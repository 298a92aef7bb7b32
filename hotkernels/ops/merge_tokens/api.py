"""Merging tokens: the weighted mean of each cluster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import Kernel, choose, register
from ...dtypes import FLOATING, HALF, INTEGER, accumulator
from ...errors import check_float, check_index, check_int, check_tensor, fail, matches
from ...operators import composite, differentiable_once, fake, wants_grad
from .reference import merge_tokens_reference

_OP = "merge_tokens"
register(
    _OP,
    torch=Kernel(FLOATING),
    cpp=Kernel(FLOATING, device="cpu", library="_C_cpu"),
    cuda=Kernel(FLOATING, device="cuda", library="_C_cuda"),
)


class MergeTokens(torch.autograd.Function):
    """merge_tokens over the raw operators: forward(x, assignment int64, num_clusters, weight [B, N] or None, eps)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, assignment: Tensor, num_clusters: int, weight: Tensor | None, eps: float
    ) -> Tensor:
        """Sum and divide."""
        need_weight = ctx.needs_input_grad[3]
        out, total, mean = torch.ops.hotkernels.merge_tokens_fwd(x, assignment, num_clusters, weight, eps, need_weight)
        # In half types, out is rounded: too coarse for the small difference x - out that is a weight's gradient.
        kept = None if not need_weight else mean if x.dtype in HALF else out
        ctx.save_for_backward(kept, total, x if need_weight else None, assignment, weight)
        ctx.shape = x.shape
        return out

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_out: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        """Give each token its cluster's gradient, scaled."""
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        kept, total, x, assignment, weight = saved
        if x is None:  # only its shape counts
            x = grad_out.new_empty(ctx.shape[-1:]).expand(ctx.shape)
        grad_x, grad_weight = torch.ops.hotkernels.merge_tokens_bwd(
            grad_out.contiguous(), kept, total, x, assignment, weight, need_weight
        )
        return grad_x if need_x else None, None, None, grad_weight if need_weight else None, None


def merge_tokens(
    x: Tensor,
    assignment: Tensor,
    num_clusters: int,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Tensor:
    """Average the tokens of each cluster, weighted.

    Equivalent to::

        member = torch.nn.functional.one_hot(assignment, num_clusters).to(x) * weight.view(B, N, 1)
        out = member.mT @ x / (member.sum(1)[..., None] + eps)

    Args:
        x: [B, N, C] float32, float16, bfloat16 or float64, any strides.
        assignment: [B, N] int64 or int32 in [-1, num_clusters), as `dpc_knn` returns it; -1 = in no cluster.
        num_clusters: M, at least 1.
        weight: [B, N] or [B, N, 1] floating; None = 1. Cast to x's dtype, or, if x is half and weight is not (exp of
            a score overflows float16), a copy of x is cast to float32.
        eps: added to each cluster's total weight. Where that is 0 or has no reciprocal, the cluster counts as empty.
        backend: "torch", "cpp", "cuda", or None for the fastest that can serve the call.

    Returns:
        [B, M, C] of x's dtype; an empty cluster gives zeros. Differentiable once in x and weight.

    Raises:
        ValueError, TypeError: ``merge_tokens: <arg> must be <expected>, got <actual>``.

    Numerics: sums in float32 (float64 for float64), tokens in ascending order: the same bits every time (on the
    torch backend on CPUs only under ``torch.use_deterministic_algorithms``: PyTorch's threads add as they come).

    Cost: reads x once, writes the result once; no atomics, no [B, N, M] matrix. On a GPU a counting sort in the same
    launch, and in memory (16 bytes per token, some launches more) above N = 8192.

    Source: the token merging of TCFormer (Zeng et al., CVPR 2022, eq. 4, there with weight = exp of a learned score).

    Example::

        >>> import torch, hotkernels
        >>> x = torch.tensor([[[1.0], [3.0], [10.0]]])
        >>> hotkernels.merge_tokens(x, torch.tensor([[0, 0, 1]]), num_clusters=3, eps=0.0)
        tensor([[[ 2.],
                 [10.],
                 [ 0.]]])
    """
    check_tensor(_OP, "x", x, "[B, N, C]", FLOATING, shape=(None, None, None))
    B, N, _ = x.shape
    check_tensor(_OP, "assignment", assignment, "[B, N]", INTEGER, shape=(B, N), device=x.device)
    check_int(_OP, "num_clusters", num_clusters, 1, None)
    check_float(_OP, "eps", eps)
    eps = eps if isinstance(eps, (float, torch.SymFloat)) else float(eps)  # PyTorch takes no Fraction, nor 10**30
    if weight is not None:
        check_tensor(_OP, "weight", weight, "[B, N] or [B, N, 1]", FLOATING, device=x.device)
        if not (matches(weight.shape, (B, N)) or matches(weight.shape, (B, N, 1))):
            fail(_OP, "weight", f"[B, N] or [B, N, 1] with B = {B}, N = {N}", list(weight.shape))
        if x.dtype in HALF and weight.dtype not in HALF:
            out = merge_tokens(x.float(), assignment, num_clusters, weight.float(), eps, backend=backend)
            return out.to(x.dtype)
        weight = (weight if weight.dim() == 2 else weight[..., 0]).to(x.dtype).contiguous()
    assignment = assignment.long().contiguous()
    chosen = choose(_OP, x, backend)
    check_index(_OP, "assignment", assignment, num_clusters, chosen)
    if chosen == "torch":
        return merge_tokens_reference(x, assignment, num_clusters, weight, eps)
    return _fused(x, assignment, num_clusters, weight, eps)


@composite("merge_tokens(Tensor x, Tensor assignment, SymInt num_clusters, Tensor? weight, float eps) -> Tensor")
def _fused(x: Tensor, assignment: Tensor, num_clusters: int, weight: Tensor | None, eps: float) -> Tensor:
    if not wants_grad(x, weight):
        return torch.ops.hotkernels.merge_tokens_fwd(x, assignment, num_clusters, weight, eps, False)[0]
    return MergeTokens.apply(x, assignment, num_clusters, weight, eps)


@fake("merge_tokens_fwd")
def _merge_tokens_fwd_fake(
    x: Tensor, assignment: Tensor, num_clusters: int, weight: Tensor | None, eps: float, need_mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    compute = accumulator(x.dtype)
    B, _, C = x.shape
    kept = B if need_mean and x.dtype in HALF else 0
    total, mean = x.new_empty(B, num_clusters, dtype=compute), x.new_empty(kept, num_clusters, C, dtype=compute)
    return x.new_empty(B, num_clusters, C), total, mean


@fake("merge_tokens_bwd")
def _merge_tokens_bwd_fake(
    grad_out: Tensor,
    mean: Tensor | None,
    total: Tensor,
    x: Tensor,
    assignment: Tensor,
    weight: Tensor | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[1] if need_weight else 0)
