"""What is particular to recovery_attention: a query that the whole batch shares, masks, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import attend, heads
from comparing import answers, assert_close, assert_same
from conftest import EMULATED, on_every_cpp, only_cpp

from hotkernels import gathered_attention, recovery_attention
from hotkernels.autograd import RecoveryAttention


@on_every_cpp
def test_a_shared_query_gives_the_bits_that_each_sample_with_it_gives(backend: str) -> None:
    query, key, value = heads(40, Nq=63, Nk=39)
    shared, own = (
        answers(lambda *a: recovery_attention(*a, backend=backend), q, key, value)
        for q in (query[0], query[:1].expand_as(query))
    )
    assert_same((own[0], *own[2:]), (shared[0], *shared[2:]))


def test_the_gradient_of_a_shared_query_is_the_sum_over_the_batch(backend: str) -> None:
    """With more sequences than the kernels sum in one go, and one or two batch dims."""
    # A program of Triton's kernels takes one sequence of all of these; test_gathered_attention_backward.py has others.
    for batch in ((1,), (3, 5)) if EMULATED == "triton" else ((1,), (40,), (3, 17)):
        query, key, value = heads(*batch, Nq=63, Nk=9)
        query = query.flatten(0, -4)[0]
        ours = answers(lambda *a: recovery_attention(*a, backend=backend), query, key, value)
        exact = answers(
            lambda q, k, v: attend(q.expand(*k.shape[:-2], *q.shape[-2:]), k, v)[0],
            *(t.double() for t in (query, key, value)),
        )
        assert_close(ours, exact, atol=1e-4)


def test_a_sample_depends_on_nothing_but_itself(backend: str) -> None:
    query, key, value = heads(7, Nq=63, Nk=39)
    out = recovery_attention(query[0], key, value, backend=backend)
    some = recovery_attention(query[0], key[5:6], value[5:6], backend=backend)
    if backend == "torch":
        torch.testing.assert_close(some, out[5:6])
    else:
        assert torch.equal(some, out[5:6])
        assert torch.equal(out, gathered_attention(query[:1], key, value, backend=backend))


def test_no_heads(backend: str) -> None:
    query, key, value = heads(2, H=0, Nq=63, Nk=40)
    bias = torch.randn(1, 0, 63, 40)
    for call, first in ((recovery_attention, query[0]), (gathered_attention, query)):
        grads = answers(lambda *a: call(*a, backend=backend), first, key, value)  # noqa: B023
        assert not any(t.numel() for t in grads)
    *_, grad = answers(lambda *a: gathered_attention(*a[:3], bias=a[3], backend=backend), query, key, value, bias)
    assert grad.shape == bias.shape


def test_masked_keys(backend: str) -> None:
    """As if they were not there; with none left 0, and no gradient."""
    query, key, value = heads(3, Nq=63, Nk=40)
    mask = torch.rand(3, 40) < 0.5
    mask[0] = False
    out, grad_query, grad_key, grad_value = answers(
        lambda *a: recovery_attention(*a, key_mask=mask, backend=backend), query, key, value
    )
    assert not out[0].any()
    for grad in (grad_query, grad_key, grad_value):
        assert not grad[0].any()
        assert grad.isfinite().all()
    for grad in (grad_key, grad_value):
        assert not grad.movedim(2, 1)[~mask].any()
        assert grad.movedim(2, 1)[mask].any(-1).all()
    for b in (1, 2):
        keep = mask[b].nonzero()[:, 0]
        alone = recovery_attention(query[0 + b], key[b : b + 1, :, keep], value[b : b + 1, :, keep], backend=backend)
        torch.testing.assert_close(out[b], alone[0])


def test_many_sequences(backend: str) -> None:
    if EMULATED == "triton":
        pytest.skip("a program takes milliseconds in Triton's interpreter")
    query, key, value = heads(70_000, H=1, Nq=2, Nk=2, D=8)
    out, *grads = answers(lambda *a: recovery_attention(*a, backend=backend), query[0], key, value)
    exact, *exact_grads = answers(
        lambda q, k, v: attend(q.expand(len(k), -1, -1, -1), k, v)[0], *(t.double() for t in (query[0], key, value))
    )
    assert_close((out, *grads[1:]), (exact, *exact_grads[1:]))
    torch.testing.assert_close(grads[0].double(), exact_grads[0], rtol=1e-4, atol=1e-3)


@only_cpp
def test_heads_are_merged_by_a_view(backend: str) -> None:
    for batch in ((2,), (2, 3)):
        query, key, value = heads(*batch)
        merged = recovery_attention(query.flatten(0, -4)[0], key, value, backend=backend).transpose(-3, -2).flatten(-2)
        assert (merged if len(batch) == 1 else merged.transpose(1, 2)).is_contiguous()


@only_cpp
def test_the_function_to_build_on(backend: str) -> None:
    query, key, value = heads(2)
    ours = RecoveryAttention.apply(query[0], key, value, None, 0.25)
    assert torch.equal(ours, recovery_attention(query[0], key, value, scale=0.25, backend=backend))


def test_batches_that_do_not_broadcast(backend: str) -> None:
    key = torch.randn(2, 3, 2, 9, 8)
    for wrong in ({"query": key[:, :2]}, {"value": key[:, :2]}):
        with pytest.raises(
            ValueError, match=r"^recovery_attention: the batch dims of .+ must be broadcastable, got .+$"
        ):
            recovery_attention(**{"query": key, "key": key, "value": key, **wrong}, backend=backend)


def test_a_query_may_lack_the_batch_and_no_more() -> None:
    key = torch.zeros(3, 2, 7, 16)
    with pytest.raises(
        ValueError, match=r"^recovery_attention: query must be \[H, L, D\] or \[\*batch, H, N, D\] .+, got"
    ):
        recovery_attention(torch.zeros(5, 16), key, key)


def test_a_query_of_batch_1_is_shared(backend: str) -> None:
    """Its gradient is summed by the kernel; nothing of the size of the batch is made for it."""
    query, key, value = heads(5, Nq=21, Nk=9)
    assert_same(
        answers(lambda q, k, v: recovery_attention(q[None], k, v, backend=backend), query[0], key, value),
        answers(lambda *a: recovery_attention(*a, backend=backend), query[0], key, value),
    )


def test_a_masked_key_and_its_value_may_be_nan(backend: str) -> None:
    query, key, value = torch.randn(2, 50, 16), torch.randn(3, 2, 21, 16), torch.randn(3, 2, 21, 16)
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[:, 4] = False
    expected = recovery_attention(query, key, value, key_mask=mask, backend=backend)
    key[:, :, 4] = value[:, :, 4] = torch.nan
    assert torch.equal(recovery_attention(query, key, value, key_mask=mask, backend=backend), expected)


@pytest.mark.parametrize("op", [recovery_attention, gathered_attention])
def test_autocast_casts_what_sdpa_casts(op: Any) -> None:
    """A query that is a Parameter is float32, where key and value come from linear layers in bfloat16."""
    query, key, value = torch.randn(3, 2, 2, 9, 16).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = op(query, key.bfloat16(), value.bfloat16())
        assert op(query.double(), key.double(), value.double()).dtype == torch.float64
    assert torch.equal(out, op(query.bfloat16(), key.bfloat16(), value.bfloat16()))


@pytest.mark.parametrize("op", [recovery_attention, gathered_attention])
def test_autocast_leaves_the_definition_in_float32(op: Any) -> None:
    """As calls with dropout are served by it: in float16 these logits are infinite."""
    query = torch.full((1, 1, 2, 64), 40.0)
    key, value = query * torch.tensor([[0.5], [1.0]]), torch.randn(1, 1, 2, 64)
    with torch.autocast("cpu", torch.float16):
        out = op(query, key, value, backend="torch")
    assert torch.equal(out, op(query.half(), key.half(), value.half(), backend="torch"))
    assert out.isfinite().all()
