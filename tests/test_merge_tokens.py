"""What is particular to merge_tokens: means, empty clusters, sums in float32 and in one order."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from hotkernels import dpc_knn, merge_tokens
from hotkernels.autograd import MergeTokens


def test_mean_of_equal_tokens_is_that_token(backend: str) -> None:
    token = torch.randn(1, 1, 39)
    out = merge_tokens(
        token.expand(2, 64, 39), torch.arange(64).remainder(4).expand(2, 64), 4, eps=0.0, backend=backend
    )
    torch.testing.assert_close(out, token.expand(2, 4, 39), rtol=1e-6, atol=0)


def test_eps_is_any_number(backend: str) -> None:
    x, assignment = torch.randn(2, 9, 4), torch.randint(3, (2, 9))
    for eps in (10**30, Fraction(1, 2)):
        out = merge_tokens(x, assignment, 3, eps=eps, backend=backend)
        assert torch.equal(out, merge_tokens(x, assignment, 3, eps=float(eps), backend=backend))


def test_weights_shift_the_mean(backend: str) -> None:
    x = torch.tensor([[[0.0], [4.0]]])
    out = merge_tokens(x, torch.zeros(1, 2, dtype=torch.int64), 1, torch.tensor([[3.0, 1.0]]), 0.0, backend=backend)
    assert out.item() == 1.0


@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_a_cluster_of_weight_zero(backend: str, eps: float) -> None:
    """Zeros, and gradients without NaN; with eps = 0 also where weights cancel."""
    x = torch.randn(1, 5, 5, requires_grad=True)
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0, -1.0]], requires_grad=True)
    assignment = torch.tensor([[0, 0, 1, 3, 3]])[:, : 5 if eps == 0 else 3]
    n = assignment.shape[1]
    out = merge_tokens(x[:, :n], assignment, 4, weight[:, :n], eps, backend=backend)
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()
    expected = torch.zeros(1, 5) if eps == 0 else x.detach().sum(-1) / eps * (torch.arange(5) < n)
    rounding = 0.0 if eps == 0 else 1e-6 * x.detach().abs().sum(-1).max().item() / eps
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5 + rounding)


@pytest.mark.parametrize(("each", "eps"), [(1e-40, 1e-40), (1e-41, 0.0), (-1e-41, 0.0)])
def test_a_cluster_whose_weight_has_no_reciprocal(backend: str, each: float, eps: float) -> None:
    x = torch.randn(1, 3, 2, requires_grad=True)
    weight = torch.full((1, 3), each, requires_grad=True)
    out = merge_tokens(x, torch.tensor([[0, 0, 2]]), 3, weight, eps, backend=backend)
    out.sum().backward()
    assert not any(t.any() for t in (out, x.grad, weight.grad))


def test_an_unassigned_token_and_its_weight_do_not_matter(backend: str) -> None:
    x, weight = torch.randn(1, 5, 7), torch.rand(1, 5)
    x[0, 2] = weight[0, 2] = torch.nan
    x.requires_grad_(), weight.requires_grad_()
    out = merge_tokens(x, torch.tensor([[0, 1, -1, 1, 0]]), 2, weight, backend=backend)
    out.sum().backward()
    assert all(t.isfinite().all() for t in (out, x.grad, weight.grad))
    assert not x.grad[0, 2].any()
    assert not weight.grad[0, 2].any()


def test_the_result_may_be_changed_in_place(backend: str) -> None:
    """As by `merged += pos`; with a gradient of the weight, which is computed from the result, it is an error."""
    x = torch.randn(1, 5, 7, requires_grad=True)
    out = merge_tokens(x, torch.tensor([[0, 1, 0, 1, 0]]), 2, torch.rand(1, 5), backend=backend)
    expected = torch.autograd.grad(out.sum(), x, retain_graph=True)
    out += 1.0
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected[0])


@pytest.mark.parametrize(("options", "eps"), [({"eps": 0.5}, 0.5), ({}, 1e-6)])
def test_eps_counts(backend: str, options: dict[str, float], eps: float) -> None:
    x = torch.ones(1, 2, 3, dtype=torch.float64)
    out = merge_tokens(x, torch.zeros(1, 2, dtype=torch.int64), 1, **options, backend=backend)
    torch.testing.assert_close(out, torch.full((1, 1, 3), 2 / (2 + eps), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1.0])
def test_nothing_in_a_cluster_without_weight_matters(backend: str, dtype: torch.dtype, poison: float) -> None:
    """With eps = 0: weights that are 0 or cancel make a cluster empty, an infinite one makes its mean NaN."""
    x = torch.randn(1, 9, 5, dtype=dtype)
    x[0, [0, 3], 2] = poison
    assignment = torch.tensor([[0, 0, 2, 1, 1, 2, 3, 3, 2]])
    weight = torch.tensor([[0.0, 0, 1, 1, -1, 2, torch.inf, 1, 3]], dtype=dtype)
    x.requires_grad_(), weight.requires_grad_()
    out = merge_tokens(x, assignment, 5, weight, eps=0.0, backend=backend)
    exact = merge_tokens(x.double(), assignment, 5, weight.double(), eps=0.0, backend="torch").to(dtype)
    torch.testing.assert_close(out, exact, equal_nan=True)
    assert out[0, [0, 1, 4]].eq(0).all()
    assert out[0, 3].isnan().all()
    grad_out = torch.randn(out.shape, dtype=dtype)
    grad_out[0, [0, 1]] = poison
    for grad in torch.autograd.grad(out, (x, weight), grad_out):
        assert grad[0, [0, 1, 3, 4]].eq(0).all()
        assert grad[0, [2, 5, 8]].isfinite().all()


def test_half_types_are_summed_in_float32(backend: str) -> None:
    """Ones beyond 256 would be lost in bfloat16, and beyond 65504 there is no float16."""
    for dtype, big in ((torch.bfloat16, 3.0), (torch.float16, 60000.0)):
        x = torch.full((1, 2000, 3), big, dtype=dtype)
        out = merge_tokens(x, torch.zeros(1, 2000, dtype=torch.int64), 1, eps=0.0, backend=backend)
        assert (out == big).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_weights_gradient_does_not_see_rounded_means(backend: str, dtype: torch.dtype) -> None:
    """It is a small difference x - mean; with the mean rounded to a half type, it would be mostly rounding."""
    x = (10 + torch.randn(2, 243, 64)).to(dtype)
    weight = (0.1 + torch.rand(2, 243)).to(dtype)
    assignment, grad_out = torch.randint(0, 81, (2, 243)), torch.randn(2, 81, 64).to(dtype)

    def gradient(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, backend: str) -> torch.Tensor:
        w.requires_grad_()
        return torch.autograd.grad(merge_tokens(x, assignment, 81, w, backend=backend), w, g)[0].double()

    exact = gradient(x.double(), weight.double(), grad_out.double(), "torch")
    error = (gradient(x, weight, grad_out, backend) - exact).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_samples_do_not_depend_on_their_batch(backend: str) -> None:
    x, assignment = torch.randn(3, 117, 33), torch.randint(-1, 39, (3, 117))
    whole = merge_tokens(x, assignment, 39, backend=backend)
    for b in range(3):
        assert torch.equal(whole[b : b + 1], merge_tokens(x[b : b + 1], assignment[b : b + 1], 39, backend=backend))


@pytest.mark.parametrize("N", [1000, 9000])
def test_sums_are_in_ascending_order(backend: str, N: int) -> None:
    """As float32 adds weights and tokens one by one; on either side of what a block of threads sorts on its own."""
    x = torch.randn(1, N, 5) * 10.0 ** torch.arange(N).remainder(7)[None, :, None]
    weight, assignment = torch.full((1, N), 0.5), torch.randint(-1, 3, (1, N))
    out = merge_tokens(x, assignment, 3, weight, eps=0.0, backend=backend)
    sums, total = torch.zeros(4, 5), torch.zeros(4)
    for token, m in zip(x[0], assignment[0].tolist(), strict=True):
        sums[m] += 0.5 * token
        total[m] += 0.5
    expected = sums[:3] * (1 / total[:3, None])
    if backend == "torch":
        torch.testing.assert_close(out[0], expected, rtol=1e-3, atol=1)
    else:
        assert torch.equal(out[0], expected)


def test_takes_what_dpc_knn_returns(backend: str) -> None:
    x = torch.randn(2, 63, 9)
    mask = torch.rand(2, 63) < 0.9
    peaks = dpc_knn(x, 13, mask=mask)
    merged = merge_tokens(x, peaks.assignment, 13, backend=backend)
    for b in range(2):
        for m in range(13):
            torch.testing.assert_close(merged[b, m], x[b][peaks.assignment[b] == m].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpp", "cuda"], indirect=True)
def test_tokens_without_channels_have_weights(backend: str) -> None:
    x, assignment = torch.zeros(1, 3, 0), torch.tensor([[1, 0, 1]])
    _, total, _ = torch.ops.hotkernels.merge_tokens_fwd(x, assignment, 3, None, 0.5, False)
    assert total.tolist() == [[1.5, 2.5, 0.5]]


@pytest.mark.parametrize("backend", ["cpp", "cuda"], indirect=True)
def test_the_function_to_build_on(backend: str) -> None:
    x, assignment = torch.randn(2, 9, 4), torch.randint(3, (2, 9))
    expected = merge_tokens(x, assignment, 3, backend=backend)
    assert torch.equal(MergeTokens.apply(x, assignment, 3, None, 1e-6), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wide_weights_of_half_tokens_are_not_narrowed(backend: str, dtype: torch.dtype) -> None:
    """exp of a score overflows float16."""
    x = torch.randn(1, 6, 4, dtype=dtype)
    score = torch.linspace(0, 12, 6)[None].requires_grad_()
    out = merge_tokens(x, torch.zeros(1, 6, dtype=torch.int64), 1, score.exp(), backend=backend)
    exact = (score.double().softmax(1) @ x.double()).to(dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact)
    (grad,) = torch.autograd.grad(out.sum(), score)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0


def test_a_weight_of_another_dtype(backend: str) -> None:
    """Is cast, but where it is wider than half tokens: then these are."""
    x, assignment, weight = torch.randn(2, 9, 5), torch.randint(-1, 4, (2, 9)), torch.rand(2, 9)
    for tokens, given in (
        (x, weight.bfloat16()),
        (x, weight.double()),
        (x.bfloat16(), weight),
        (x.half(), weight.double()),
    ):
        out = merge_tokens(tokens, assignment, 4, given, 0.5, backend=backend)
        exact = merge_tokens(tokens.double(), assignment, 4, given.double(), 0.5, backend="torch")
        assert out.dtype == tokens.dtype
        torch.testing.assert_close(out, exact.to(out.dtype))
        with pytest.raises(ValueError, match=r"^merge_tokens: backend must be .+, got 'fpga'$"):
            merge_tokens(tokens, assignment, 4, given, backend="fpga")


def test_tokens_are_not_kept_where_no_weight_needs_a_gradient(backend: str) -> None:
    """They may be written to after the call."""
    leaf, assignment = torch.randn(2, 9, 5, requires_grad=True), torch.arange(9).remainder(4).expand(2, 9)
    for weight in (None, torch.rand(2, 9)):
        x = leaf.clone()
        out = merge_tokens(x, assignment, 4, weight, backend=backend)
        x.add_(1)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        expected = merge_tokens(leaf, assignment, 4, weight, backend="torch").square().sum()
        torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf)[0])
