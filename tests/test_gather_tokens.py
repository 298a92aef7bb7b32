"""What is particular to gather_tokens: exact copies, any element type, a deterministic backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from cases import layouts
from conftest import only_cpp

from hotkernels import checked, gather_tokens
from hotkernels.autograd import GatherTokens
from hotkernels.dtypes import HALF
from hotkernels.ops.gather_tokens.reference import gather_tokens_bwd_reference


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool], ids=lambda d: str(d)[6:]
)
def test_copies_integers_and_bools(backend: str, dtype: torch.dtype) -> None:
    x = torch.randint(-3, 3, (2, 17, 3, 5)).to(dtype)
    index = torch.tensor([[16, 0, -1, 0], [1, -1, 2, 3]])
    out = gather_tokens(x, index, backend=backend)
    assert out.dtype == dtype
    assert (out[0, 0] == x[0, 16]).all()
    assert (out[1, 3] == x[1, 3]).all()
    assert not out[0, 2].any()


def test_copies_are_exact(backend: str) -> None:
    """NaN, infinities and -0 included: a copy is a copy, and an absent token is +0."""
    x = torch.tensor([[[torch.nan, torch.inf, -0.0, 1e-42]]]).expand(1, 3, 4)
    out = gather_tokens(x, torch.tensor([[2, -1]]), backend=backend)
    assert torch.equal(out[0, 0].view(torch.int32), x[0, 0].contiguous().view(torch.int32))
    assert not out[0, 1].view(torch.int32).any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("C", [1024, 1021])  # whole registers, and rows that end inside one
def test_all_values_of_half_types(backend: str, dtype: torch.dtype, C: int) -> None:
    """Each of the 65,536 is read and, added to another, rounded as PyTorch does: subnormals, overflow, NaN."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x, pos = values.view(1, 64, 1024)[..., :C], values[torch.randperm(len(values))].view(64, 1024)[:, :C]
    out = gather_tokens(x, torch.arange(64)[None], pos, backend=backend)
    torch.testing.assert_close(out, (x.float() + pos.float()).to(dtype), rtol=0, atol=0, equal_nan=True)


@only_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_the_sum_that_stands_in_on_a_gpu_without_our_library(backend: str, dtype: torch.dtype) -> None:
    """It takes an index out of range for none, as GPU kernels do."""
    grad_out, index = torch.randn(3, 40, 2, 5).to(dtype), torch.randint(-1, 9, (3, 40))
    expected = torch.ops.hotkernels.gather_tokens_bwd(grad_out, index, 9)
    ours = gather_tokens_bwd_reference(grad_out, index.masked_fill(index < 0, 1 << 40), 9)
    torch.testing.assert_close(ours, expected)
    assert ours.is_contiguous()


def test_copies_from_any_strides_are_contiguous(backend: str) -> None:
    index = torch.tensor([[2, -1], [0, 4]])
    inner = torch.randn(2, 5, 2, 3, 4)
    for view in (
        *layouts(torch.randn(2, 5, 3, 4)).values(),
        inner.transpose(2, 3),
        inner[:, :, :, ::2],
        inner[:, :, :1],
    ):
        out = gather_tokens(view, index, backend=backend)
        assert out.is_contiguous()
        assert torch.equal(out, gather_tokens(view.contiguous(), index, backend=backend))


def test_gradients_of_any_strides(backend: str) -> None:
    x, index = torch.randn(2, 5, 3, 2, 4, requires_grad=True), torch.tensor([[2, -1], [0, 4]])
    given = torch.randn(2, 2, 2, 3, 4).transpose(2, 3)
    out = gather_tokens(x, index, backend=backend)
    grads = [torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in (given, given.contiguous())]
    assert torch.equal(*grads)


def test_unused_tokens_get_zeros_beside_rows_with_gaps(backend: str) -> None:
    x, index = torch.randn(2, 9, 4, 4, requires_grad=True), torch.randint(0, 7, (2, 6))
    given = torch.randn(2, 6, 4, 7)[..., :4]
    grads = []
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        for grad_out in (given, given.contiguous()):
            grads += torch.autograd.grad(gather_tokens(x, index, backend=backend), x, grad_out)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*grads)


def test_an_absent_place_still_gets_its_position(backend: str) -> None:
    pos = torch.randn(3, 4)
    out = gather_tokens(torch.full((1, 5, 2, 4), torch.nan), torch.full((1, 3), -1), pos, backend=backend)
    assert torch.equal(out, pos[None, :, None].expand(1, 3, 2, 4))


def test_no_tokens_to_gather_from(backend: str) -> None:
    x = torch.zeros(2, 0, 4, requires_grad=True)
    out = gather_tokens(x, torch.full((2, 3), -1), backend=backend)
    assert out.shape == (2, 3, 4)
    assert not out.any()
    out.sum().backward()
    assert x.grad.shape == x.shape
    pos = torch.randn(3, 4)
    assert torch.equal(
        gather_tokens(torch.zeros(2, 0, 4), torch.full((2, 3), -1), pos, backend=backend), pos.expand(2, 3, 4)
    )
    with checked(), pytest.raises(ValueError, match=r"^gather_tokens: index must be -1 or in \[0, 0\), got 0$"):
        gather_tokens(torch.zeros(2, 0, 4), torch.zeros(2, 3, dtype=torch.int64), backend=backend)


def test_the_stride_of_a_dim_of_size_1_means_nothing(backend: str) -> None:
    x, index = torch.randn(2, 5, 3 * 4), torch.tensor([[4, 0], [-1, 3]])
    odd = x.as_strided((2, 5, 3, 1, 1, 4), (60, 12, 4, 4, 50, 1)).requires_grad_()
    out = gather_tokens(odd, index, backend=backend)
    assert torch.equal(out.flatten(2), gather_tokens(x, index, backend=backend))
    grad_out = x[:, :2].as_strided(out.shape, (60, 12, 4, 4, 50, 1))
    (grad,) = torch.autograd.grad(out, odd, grad_out)
    assert torch.equal(grad[0, 4].flatten(), x[0, 0])
    assert torch.equal(grad[1, 3].flatten(), x[1, 1])


def test_gradient_of_a_repeated_token_is_summed_in_order(backend: str) -> None:
    """In ascending order of the places: as float32 adds them one by one, whatever they are."""
    grad_out = torch.randn(1, 100, 300) * 10.0 ** torch.arange(100).remainder(7)[None, :, None]
    x = torch.randn(1, 4, 300, requires_grad=True)
    index = torch.full((1, 100), 2)
    (grad,) = torch.autograd.grad(gather_tokens(x, index, backend=backend), x, grad_out)
    expected = torch.zeros(300)
    for row in grad_out[0]:
        expected = expected + row
    if backend == "torch":
        torch.testing.assert_close(grad[0, 2], expected, rtol=1e-4, atol=1)
    else:
        assert torch.equal(grad[0, 2], expected)
    assert not grad[0, [0, 1, 3]].any()


@pytest.mark.parametrize("M", [8192, 8193])
def test_gradient_of_many_places(backend: str, M: int) -> None:
    """As many places as a block of threads sorts on its own, in all its shared memory, and more."""
    grad_out, index = torch.randn(2, M, 1), torch.randint(-1, 7, (2, M))
    x = torch.randn(2, 7, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(gather_tokens(x, index, backend=backend), x, grad_out)
    for b in range(2):
        for n in range(7):
            expected = grad_out[b][index[b] == n].cumsum(0, dtype=torch.float64)[-1]
            torch.testing.assert_close(grad[b, n], expected.float(), rtol=1e-4, atol=1e-3)


def test_gradient_of_many_wide_tokens(backend: str) -> None:
    """More tokens than a GPU has blocks at once, of more channels than a block has threads."""
    grad_out, index = torch.randn(3, 40, 257), torch.randint(-1, 1000, (3, 40))
    x = torch.randn(3, 1000, 257, requires_grad=True)
    (grad,) = torch.autograd.grad(gather_tokens(x, index, backend=backend), x, grad_out)
    expected = torch.zeros(3, 1001, 257)
    expected.scatter_add_(1, index.where(index >= 0, 1000)[..., None].expand(-1, -1, 257), grad_out)
    torch.testing.assert_close(grad, expected[:, :1000])


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def test_subnormal_halves_where_the_processor_flushes_subnormal_floats(backend: str) -> None:
    values = torch.arange(1, 0x3FF).to(torch.int16).view(torch.float16)
    x, index = values.view(1, 1, -1).clone().requires_grad_(), torch.zeros(1, 2, dtype=torch.int64)
    with flushing():
        out = gather_tokens(x, index, torch.zeros(2, len(values)).half(), backend=backend)
        (grad,) = torch.autograd.grad(out, x, x.detach().expand(1, 2, -1))
    assert torch.equal(out, x.expand(1, 2, -1))
    assert torch.equal(grad, 2 * x)


@only_cpp
def test_a_sum_of_negative_zeros_is_one_in_every_lane(backend: str) -> None:
    grad_out, index = torch.full((1, 2, 37), -0.0), torch.zeros(1, 2, dtype=torch.int64)
    assert torch.ops.hotkernels.gather_tokens_bwd(grad_out, index, 1).signbit().all()


def test_half_gradients_are_summed_in_float32(backend: str) -> None:
    """Ones beyond 256 would be lost in bfloat16."""
    x = torch.zeros(1, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    gather_tokens(x, torch.ones(1, 1024, dtype=torch.int64), backend=backend).sum().backward()
    assert (x.grad[0, 1] == 1024).all()


def test_half_gradients_of_a_position_are_summed_in_float32(backend: str) -> None:
    """Over joints, then over samples: 2,048 + 1 is 2,048 in float16."""
    x, pos = torch.zeros(2, 1, 2, 1, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.float16, requires_grad=True)
    out = gather_tokens(x, torch.zeros(2, 1, dtype=torch.int64), pos, backend=backend)
    out.backward(torch.tensor([2048.0, 1, -2048, 0]).half().view_as(out))
    assert pos.grad.item() == 1


def test_half_position_is_added_in_float32_and_rounded_once(backend: str) -> None:
    x, pos = torch.randn(2, 9, 33).half(), torch.randn(5, 33).half()
    index = torch.randint(9, (2, 5))
    expected = (gather_tokens(x.float(), index, backend=backend) + pos.float()).half()
    assert torch.equal(gather_tokens(x, index, pos, backend=backend), expected)


def test_a_position_of_another_dtype_is_cast(backend: str) -> None:
    x, pos, index = torch.randn(2, 9, 33), torch.randn(5, 33).half(), torch.randint(9, (2, 5))
    expected = gather_tokens(x, index, pos.float(), backend=backend)
    assert torch.equal(gather_tokens(x, index, pos, backend=backend), expected)


@pytest.mark.parametrize("backend", ["cpp", "cuda"], indirect=True)
def test_the_function_to_build_on(backend: str) -> None:
    x, index = torch.randn(2, 9, 4), torch.randint(9, (2, 5))
    assert torch.equal(GatherTokens.apply(x, index, None), gather_tokens(x, index, backend=backend))
