"""What PyTorch does with gradients beyond a backward pass: checkpoints, graphs of them, traces, Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hotkernels
from hotkernels import backends
from hotkernels.nn import Attention, BiLevelRoutingAttention

pytestmark = pytest.mark.skipif(backends.LIBRARIES["_C_cpu"] is not None, reason=str(backends.LIBRARIES["_C_cpu"]))

INDEX = torch.tensor([[0, 3, 3, -1], [5, 1, 0, 2]])
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "gather_tokens": lambda x: hotkernels.gather_tokens(x, INDEX),
    "merge_tokens": lambda x: hotkernels.merge_tokens(x, torch.arange(12).view(2, 6) % 3, 3),
    "gathered_attention": lambda x: hotkernels.gathered_attention(x[:, None], x[:, None], x[:, None], INDEX),
    "recovery_attention": lambda x: hotkernels.recovery_attention(x[:, None], x[:, None], x[:, None]),
    "Attention": Attention(8, 2),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
def test_a_gradient_of_a_checkpoint_may_have_a_graph(call: Any) -> None:
    """As gradient penalties ask for it; the checkpoint hands out what was saved once."""
    x = torch.randn(2, 6, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(call(x).square().sum(), x)
    y = checkpoint(call, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), x)


@each_call
def test_compiled_autograd_refuses_a_second_derivative(call: Any) -> None:
    """Outside it, test_conformance.py has these."""
    x = torch.randn(2, 6, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(call(x.sin()).square().sum(), x)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        (grad,) = torch.autograd.grad(call(x.sin()).square().sum(), x, create_graph=True)
        torch.testing.assert_close(grad, expected)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(grad.sum(), x)


def test_a_jacobian_may_be_vectorised() -> None:
    """Of keys of all samples, too: those of regions of 8 tokens or more."""
    attention, x = BiLevelRoutingAttention(8, 2, n_win=2, topk=2), torch.randn(2, 8, 8, 8)

    def jacobian(vectorize: bool) -> Any:
        return torch.autograd.functional.jacobian(lambda x: attention(x)[0, 0, 0], x, vectorize=vectorize)

    torch.testing.assert_close(jacobian(True), jacobian(False))


def test_a_trace_may_be_differentiated(tmp_path: Any) -> None:
    attention, x = Attention(8, 2), torch.randn(2, 6, 8, requires_grad=True)
    torch.jit.trace(attention, x).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(traced(x), attention(x), rtol=0, atol=0)
    grads = [torch.autograd.grad(a(x).square().sum(), [x, *a.parameters()]) for a in (traced, attention)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
