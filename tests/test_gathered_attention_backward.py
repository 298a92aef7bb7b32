"""What is particular to attention's backward pass in Triton: sums over the batch in parts of several sequences."""

from __future__ import annotations

import pytest
import torch
from attention_cases import attend
from cases import upcast

from hotkernels import gathered_attention, recovery_attention

pytest.importorskip("triton")
from hotkernels.ops.gathered_attention import launches_backward

only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@only_triton
@pytest.mark.parametrize("L", [9, 40])  # one kernel for all gradients, and one for each of two
@pytest.mark.parametrize("programs", [1, 2, 6, 256])
def test_the_gradient_of_a_shared_query(backend: str, monkeypatch: pytest.MonkeyPatch, L: int, programs: int) -> None:
    monkeypatch.setattr(launches_backward, "PROGRAMS", programs)
    args = [torch.randn(shape) for shape in ((2, L, 8), (5, 2, 7, 8), (5, 2, 7, 8))]
    grad_out = torch.randn(5, 2, L, 8)
    leaves = [t.requires_grad_() for t in args]
    ours = torch.autograd.grad(recovery_attention(*leaves, backend=backend), leaves, grad_out)
    leaves = [t.detach().requires_grad_() for t in upcast(args)]
    truth = torch.autograd.grad(attend(leaves[0].expand(5, -1, -1, -1), *leaves[1:])[0], leaves, grad_out.double())
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@only_triton
@pytest.mark.parametrize("programs", [1, 4, 256])
def test_the_gradient_of_a_bias_for_every_batch(backend: str, monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    monkeypatch.setattr(launches_backward, "PROGRAMS", programs)
    query, key, value = (torch.randn(5, 2, N, 8) for N in (9, 7, 7))
    index, bias, grad_out = torch.tensor([[3, -1, 0, 3, 6]]), torch.randn(2, 9, 5), torch.randn(5, 2, 9, 8)
    leaf = bias.requires_grad_()
    out = gathered_attention(query, key, value, index, bias=leaf, backend=backend)
    (ours,) = torch.autograd.grad(out, leaf, grad_out)
    leaf = bias.detach().double().requires_grad_()
    query, key, value = upcast([query, key, value])
    out = attend(query, key, value, index, bias=leaf)[0]
    (truth,) = torch.autograd.grad(out, leaf, grad_out.double())
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-5)
