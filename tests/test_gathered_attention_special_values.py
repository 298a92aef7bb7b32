"""What masks, -1, NaN, infinities and the largest numbers do in gathered_attention, and where they stay."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from attention_cases import KINDS, attend, each_kind, heads, index_of, queries
from cases import upcast
from comparing import answers, assert_close, assert_same
from torch import Tensor
from torch.nn import functional

from hotkernels import gathered_attention

# For the short kernels and the long ones.
few_and_more_queries = pytest.mark.parametrize(
    ("kind", "Nq"), [(kind, Nq) for kind in KINDS for Nq in sorted({5, queries(kind, 35)})]
)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_with_nothing_to_attend_to(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Of absent slots, of masked keys and of both: 0, lse -inf, no gradient; other rows do not notice."""
    Nq = queries(kind, 63)
    args = [t.to(dtype) for t in (*heads(3, Nq=Nq, Nk=40), torch.randn(3, 40))]
    index = index_of(kind, (3,), 2, Nq, 40, 20, absent=0.0)
    args[3][0] = -torch.inf
    if kind == "set":
        index[1] = -1
    elif index is not None:
        index[1, ..., ::2, :] = -1
    empty = torch.zeros(3, Nq, dtype=torch.bool)
    empty[0] = True
    if kind != "dense":
        empty[1, :: 1 if kind == "set" else 2] = True

    def call(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
        return gathered_attention(query, key, value, index, key_bias=key_bias, return_lse=True, backend=backend)

    out, lse, grad_query, *grads = answers(call, *args)
    empty = empty[:, None].expand(-1, 2, -1)
    assert not out[empty].any()
    assert (lse[empty] == -torch.inf).all()
    assert not grad_query[empty].any()
    for grad in grads:
        assert not grad[0].any()
        assert grad.isfinite().all()
    assert out[~empty].any(-1).all()
    assert lse[~empty].isfinite().all()
    exact = answers(lambda *a: attend(*a[:3], index, key_bias=a[3])[0], *upcast(args))
    only_out = answers(lambda *a: call(*a)[0], *args)
    assert_close(only_out, exact, atol=0.05 if dtype == torch.float16 else 2e-5)


@pytest.mark.parametrize("Nk", [17, 512, 700])
def test_values_far_from_0(backend: str, Nk: int) -> None:
    """Gradients of logits are small differences between large products: as exact as SDPA's."""
    query, key, value = (torch.randn(1, 2, N, 64) for N in (16, Nk, Nk))
    args = [query, key, value + 10]
    truth = answers(lambda *a: attend(*a)[0], *upcast(args))
    ours = answers(functools.partial(gathered_attention, backend=backend), *args)
    sdpa = answers(functional.scaled_dot_product_attention, *args)
    for one, other, exact in zip(ours, sdpa, truth, strict=True):
        assert (one - exact).norm() <= 2 * (other - exact).norm()


@each_kind
def test_what_is_not_a_number_stays_where_it_is(backend: str, kind: str) -> None:
    """A query that is NaN spoils its own row; a key or value outside the index, or under -1, nothing at all."""
    Nq = queries(kind, 63)
    query, key, value = heads(2, Nq=Nq, Nk=40)
    index = index_of(kind, (2,), 2, Nq, 38, 20)
    if index is not None:
        index = torch.where(index < 0, -1, index + 1)  # never the first key nor the last
    clean, *clean_grads = answers(lambda *a: gathered_attention(*a, index, backend=backend), query, key, value)
    if index is not None:
        for poison in (torch.nan, torch.inf):
            k, v = key.clone(), value.clone()
            k[:, :, [0, 39]], v[:, :, [0, 39]] = poison, poison
            out, *grads = answers(lambda *a: gathered_attention(*a, index, backend=backend), query, k, v)
            assert_same((out, *grads), (clean, *clean_grads))
    row = Nq * 4 // 5
    spoilt = query.clone()
    spoilt[1, 0, row, 3] = torch.nan
    out = gathered_attention(spoilt, key, value, index, backend=backend)
    assert out[1, 0, row].isnan().all()
    out[1, 0, row] = clean[1, 0, row]
    assert_same((out,), (clean,))


@pytest.mark.parametrize(
    ("kind", "Nq", "dtype"),
    [(kind, 5, torch.float32) for kind in KINDS]
    + [(kind, 35, dtype) for kind in ("dense", "set") for dtype in (torch.float32, torch.float16)],
)
def test_an_infinite_key_that_no_query_looks_at(backend: str, kind: str, Nq: int, dtype: torch.dtype) -> None:
    """A key whose logits are -inf is as one that is masked, but for gradients of queries, which are 0 times it."""
    query, key, value = (t.abs().to(dtype) for t in heads(2, Nq=Nq))
    spoilt, mask = key.clone(), torch.zeros(2, 9)
    spoilt[0, :, 4], mask[0, 4] = -torch.inf, -torch.inf
    index = index_of(kind, (2,), 2, Nq, 9, 5)
    if index is not None:
        index[0, ..., 3] = 4
    if kind in ("query", "head"):
        index[0, ..., 2, :] = 4  # a query that is given nothing else
    for bias in (None, torch.randn(1, 2, Nq, 9 if index is None else 5)):
        (out, _, *grads), (clean, _, *clean_grads) = (
            answers(
                lambda *a: gathered_attention(*a, index, bias=bias, key_bias=b, backend=backend),  # noqa: B023
                *(query, k, value),
            )
            for k, b in ((spoilt, None), (key, mask))
        )
        assert_close((out, *grads), (clean, *clean_grads), 1e-5 if dtype == torch.float32 else 1e-2)


def test_the_last_key_alone_is_masked(backend: str) -> None:
    query, key, value = heads(2, Nq=4)
    key_bias = torch.zeros(2, 9)
    key_bias[:, -1] = -torch.inf
    expected = gathered_attention(query, key[..., :8, :], value[..., :8, :], backend=backend)
    key[..., -1, :] = value[..., -1, :] = torch.nan
    assert_close((gathered_attention(query, key, value, key_bias=key_bias, backend=backend),), (expected,), 1e-6)


@each_kind
def test_nothing_in_a_masked_key_or_its_value_or_bias_matters(backend: str, kind: str) -> None:
    args, index = heads(2), index_of(kind, (2,), 2, 17, 9, 5)
    key_bias = torch.zeros(9, 2).T  # strided
    key_bias[:, 4] = -torch.inf
    slots = torch.arange(9)[None] if index is None else index
    at_4 = (slots == 4).reshape(len(slots), *[1] * (4 - slots.dim()), *slots.shape[1:]).expand(2, 2, 17, -1)
    for bad in (torch.nan, torch.inf):
        bias = torch.randn(at_4.shape)
        query, *key_value = args
        for t in (spoilt_key_value := [t.clone() for t in key_value]):
            t[:, :, 4] = bad
        clean, spoilt = (
            answers(
                lambda *a: gathered_attention(*a, index, bias=b, key_bias=key_bias, backend=backend),  # noqa: B023
                query,
                *tokens,
            )
            for b, tokens in ((bias, key_value), (bias.masked_fill(at_4, bad), spoilt_key_value))
        )
        assert clean[0].isfinite().all()
        assert_same(spoilt, clean)


@few_and_more_queries
@pytest.mark.parametrize("H", [2, 1])
def test_a_query_that_is_nan_and_attends_to_nothing(backend: str, kind: str, Nq: int, H: int) -> None:
    """It gives 0 and an lse of -inf, and comes into no gradient: as a padded sample does, whose tokens may be NaN."""
    query, key, value = heads(2, H=H, Nq=Nq, Nk=40)
    index, key_bias = index_of(kind, (2,), H, Nq, 40, 20), torch.randn(2, 40)
    bias = torch.randn(2, H, Nq, 40 if index is None else 20)
    if kind in ("query", "head"):
        index[1, ..., 2, :] = -1
    else:
        key_bias[1] = -torch.inf
    rows = [2] if kind in ("query", "head") else list(range(Nq))
    spoilt = query.clone()
    query[1, :, rows], spoilt[1, :, rows] = 0.0, torch.nan
    for biases in ((), (key_bias,), (key_bias, bias)):
        if kind in ("dense", "set") and not biases:
            continue

        def call(q: Tensor, k: Tensor, v: Tensor, *b: Tensor) -> Any:
            more = dict(zip(("key_bias", "bias"), b, strict=False))
            return gathered_attention(q, k, v, index, **more, return_lse=True, backend=backend)

        def without_lse(*a: Tensor) -> Tensor:  # whose gradient is that of -inf
            return call(*a)[0]

        out, lse = call(spoilt, key, value, *biases)
        assert out[1, :, rows].eq(0).all()
        assert lse[1, :, rows].eq(-torch.inf).all()
        args = (key, value, *biases)
        assert_same(answers(without_lse, spoilt, *args), answers(without_lse, query, *args))


@few_and_more_queries
def test_a_query_that_is_nan_comes_into_no_gradient_of_a_masked_key(backend: str, kind: str, Nq: int) -> None:
    query, key, value = heads(2, Nq=Nq, Nk=40)
    index, key_bias = index_of(kind, (2,), 2, Nq, 40, 20, 0.0), torch.randn(2, 40)
    key_bias[:, 7:30] = -torch.inf
    query[1, 0, 3, 5] = torch.nan
    bias = torch.randn(2, 2, Nq, 40 if index is None else 20)
    slots = torch.arange(40).expand(2, 40) if index is None else index
    slots = slots.reshape(2, *[1] * (4 - slots.dim()), *slots.shape[1:]).expand_as(bias)
    *_, grad_key, grad_value, grad_key_bias, grad_bias = answers(
        lambda q, k, v, kb, b: gathered_attention(q, k, v, index, bias=b, key_bias=kb, backend=backend),
        *(query, key, value, key_bias, bias),
    )
    for grad in (grad_key[:, :, 7:30], grad_value[:, :, 7:30], grad_key_bias[:, 7:30]):
        assert grad.eq(0).all()
    assert grad_bias[(slots >= 7) & (slots < 30)].eq(0).all()


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["key_bias", "bias"])
def test_the_lowest_number_is_no_mask(backend: str, kind: str, dtype: torch.dtype, name: str) -> None:
    """A row whose every slot has it attends to all alike, where -inf would have it attend to none."""
    args, index = [t.to(dtype) for t in heads(2)], index_of(kind, (2,), 2, 17, 9, 5, 0.0)
    shape = (2, 9) if name == "key_bias" else (2, 2, 17, 9 if index is None else 5)
    biases: dict[str, Tensor] = {name: torch.full(shape, torch.finfo(dtype).min, dtype=dtype)}
    out, lse = gathered_attention(*args, index, **biases, return_lse=True, backend=backend)
    exact, _ = attend(*upcast(args), index, **{name: torch.zeros(shape)}, scale=0.0)
    torch.testing.assert_close(out.double(), exact.double(), rtol=1e-2, atol=1e-2 if dtype.itemsize == 2 else 1e-5)
    assert lse.isfinite().all()


@pytest.mark.parametrize("other", [9, slice(None, None, 2)], ids=["nothing", "other keys"])
@pytest.mark.parametrize("index", [None, [[3, 0, 3, 8, -1]]], ids=["dense", "set"])
@pytest.mark.parametrize("Nq", [5, 99])
def test_samples_that_share_keys_and_mask_different_ones(backend: str, Nq: int, index: Any, other: int | slice) -> None:
    """What is packed of the keys is packed anew for each mask; where none is masked, they may be read in place."""
    index = None if index is None else torch.tensor(index)
    query, key_bias = torch.randn(4, 2, 1, Nq, 16), torch.zeros(1, 2, 10)
    key, value = torch.randn(2, 1, 1, 1, 9, 16).unbind(0)
    key_bias[0, 0, 3] = key_bias[0, 1, other] = -torch.inf
    key_bias, value[..., 3, 0] = key_bias[..., :9], torch.nan  # for j = 1

    def attend(b: slice, j: slice) -> Tensor:
        return gathered_attention(query[b, j], key, value, index, key_bias=key_bias[:, j], backend=backend)

    whole = attend(slice(None), slice(None))
    for b in range(4):
        for j in range(2):
            assert_same((whole[b, j],), (attend(slice(b, b + 1), slice(j, j + 1))[0, 0],))
    assert whole[:, 0].isfinite().all()


@pytest.mark.parametrize("Nq", [5, 300])
def test_a_mask_of_keys_of_all_samples(backend: str, Nq: int) -> None:
    """A mask needs no gradient: with one, backward takes another way."""
    args = [torch.randn(B, 2, N, 16) for B, N in ((3, Nq), (1, 40), (1, 40))]
    index, key_bias = torch.randint(-1, 40, (3, 23)), torch.zeros(3, 40)
    key_bias[torch.rand(3, 40) < 0.3] = -torch.inf
    ours = answers(lambda *args: gathered_attention(*args, index, key_bias=key_bias, backend=backend), *args)
    truth = answers(lambda *args: attend(*args, index, key_bias=key_bias.double())[0], *upcast(args))
    assert_close(ours, truth, 2e-5)


@each_kind
def test_large_logits(backend: str, kind: str) -> None:
    """Far beyond what exp can take. Keys tie in pairs: where one took all, gradients of queries would be 0."""
    Nq = queries(kind, 63)
    query, key, value = heads(2, Nq=Nq, Nk=300)
    query = query * 300
    query[..., 0], key[:, :, 150:, 1:] = 0.0, key[:, :, :150, 1:]  # pairs differ in channel 0
    index = index_of(kind, (2,), 2, Nq, 150, 20)
    if index is not None:
        index = torch.cat([index, torch.where(index < 0, -1, index + 150)], -1)
    ours = answers(lambda *a: gathered_attention(*a, index, backend=backend), query, key, value)
    exact = answers(lambda *a: attend(*a, index)[0], *upcast([query, key, value]))
    for a, c in zip(ours, exact, strict=True):  # logits near 1000 are known to 6e-5, and so is what follows from them
        assert a.isfinite().all()
        assert (a.double() - c).abs().max() <= 3e-3 * c.abs().max()


@each_kind
def test_logits_that_are_all_minus_infinity(backend: str, kind: str) -> None:
    """As of a mask: 0, as SDPA has it."""
    if backend == "triton" and kind == "dense":
        pytest.skip("a block's slots beyond the last one are zeros, which infinity times makes NaN")
    query, key, value = (t.clone() for t in heads(1, Nq=5, Nk=6))
    key.copy_(-key.abs())
    query[:, :, 2] = torch.inf
    index = index_of(kind, (1,), 2, 5, 6, 3, absent=0.0)
    value.requires_grad_()
    out, lse = gathered_attention(query, key, value, index, return_lse=True, backend=backend)
    assert not out[:, :, 2].any()
    assert (lse[:, :, 2] == -torch.inf).all()
    assert out.isfinite().all()
    assert torch.autograd.grad(out.sum(), value)[0].isfinite().all()
