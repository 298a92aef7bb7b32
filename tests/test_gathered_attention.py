"""What is particular to gathered_attention: accuracy, lse, reading in place, equal bits, dropout."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from attention_cases import attend, each_kind, heads, index_of, queries
from cases import random_slots, upcast
from comparing import answers, assert_as_accurate, assert_close, assert_same
from conftest import EMULATED, GPU_BACKENDS, on_every_cpp, only_cpp
from torch import Tensor
from torch.autograd.gradcheck import gradcheck
from torch.nn import functional as F  # noqa: N812

import hotkernels
from hotkernels import backends, checked, gathered_attention, invert_index, recovery_attention
from hotkernels.bench.workloads import rounding_floor
from hotkernels.ops.gathered_attention.api import PackedAttention, packed_attention, unpack


def skip_float64_on_gpus(backend: str, dtype: torch.dtype = torch.float64) -> None:
    if backend in GPU_BACKENDS and dtype == torch.float64:
        pytest.skip("float64 is served by the torch backend")


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [8, 39, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_sdpa(backend: str, D: int, dtype: torch.dtype) -> None:
    args = [t.to(dtype) for t in heads(2, Nq=117, Nk=81, D=D)]
    ours = answers(lambda *a: gathered_attention(*a, backend=backend), *args)
    theirs = [answers(F.scaled_dot_product_attention, *args)]
    if backend in GPU_BACKENDS and dtype.itemsize == 2:  # tensor cores round what they get; SDPA may keep float32
        theirs.append(answers(lambda *a: attend(*a)[0], *args))
    truth = answers(lambda *a: attend(*a)[0], *upcast(args))
    for i, (a, exact, *low) in enumerate(zip(ours, truth, *theirs, strict=True)):
        floor = rounding_floor(dtype, tensor_cores=backend == "triton") * exact.abs().max()
        assert_as_accurate(a, low, exact, 2 if i == 0 else 3, floor)


@pytest.mark.parametrize("backend", ["cpp-avx512_bf16"], indirect=True)
@pytest.mark.parametrize(("Nq", "Nk", "D"), [(17, 17, 64), (51, 601, 63), (1, 2, 1), (97, 1025, 16)])
def test_bfloat16_in_pairs(backend: str, Nq: int, Nk: int, D: int) -> None:
    """Pairs of channels, keys and queries that lack one, and several blocks of keys, under a bias and a mask."""
    args = [t.bfloat16() for t in (*heads(2, Nq=Nq, Nk=Nk, D=D), torch.randn(2, Nq, Nk), torch.randn(2, Nk))]
    args[4][:, 1] = -torch.inf
    args[4][1, 0] = 88.5  # its exponential would be infinite, where no query's maximum is subtracted

    def ours(*a: Tensor) -> tuple[Tensor, ...]:
        return gathered_attention(*a[:3], bias=a[3], key_bias=a[4], return_lse=True, backend=backend)

    def eager(*a: Tensor) -> tuple[Tensor, ...]:
        return attend(*a[:3], bias=a[3], key_bias=a[4])

    answer, theirs, truth = answers(ours, *args), answers(eager, *args), answers(eager, *upcast(args))
    assert_close(answer[1:2], truth[1:2])  # lse is float32, and no input of its products was rounded
    for a, b, exact, factor in zip(answer, theirs, truth, (2, 2, 3, 3, 3, 3, 3), strict=True):
        assert_as_accurate(a, [b], exact, factor, rounding_floor(a.dtype, tensor_cores=False) * exact.abs().max())
    floats = [t.float() for t in args]
    as_floats = answers(ours, *floats)
    backends.instruction_set("avx512")  # the fixture puts it back
    assert_same(answers(ours, *floats), as_floats)
    assert Nk == 2 or not any(torch.equal(a, b) for a, b in zip(answers(ours, *args)[2:5], answer[2:5], strict=True))


@on_every_cpp
@pytest.mark.parametrize(("shape", "of_one_sign", "most"), [((9, 17, 256), False, 2.0), ((100, 512, 32), True, 1.5)])
def test_long_sums_are_as_accurate_as_sdpa(
    backend: str, shape: tuple[int, int, int], of_one_sign: bool, most: float
) -> None:
    """Over channels, and over keys with values of one sign; root mean squares, which no floor has to excuse."""
    Nq, Nk, D = shape
    query, key, value = heads(16, Nq=Nq, Nk=Nk, D=D)
    args = (query * 0.5, key * 0.5, value.abs()) if of_one_sign else (query, key, value)
    truth = F.scaled_dot_product_attention(*upcast(args))
    ours, theirs = (f(*args).double() - truth for f in (gathered_attention, F.scaled_dot_product_attention))
    assert ours.square().mean().sqrt() <= theirs.square().mean().sqrt() * most


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_sum_exp_and_its_gradient(backend: str, kind: str, dtype: torch.dtype) -> None:
    """With gradients of the output and of lse at once, then of lse alone."""
    skip_float64_on_gpus(backend, dtype)
    Nq = queries(kind, 63)
    args = [t.to(dtype) for t in (*heads(2, Nq=Nq, Nk=39), torch.randn(2, 39))]
    index = index_of(kind, (2,), 2, Nq, 39, 13)

    def ours(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
        return gathered_attention(query, key, value, index, key_bias=key_bias, return_lse=True, backend=backend)

    def truth(query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
        return attend(query, key, value, index, key_bias=key_bias)

    out, lse, *grads = answers(ours, *args)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    half = dtype == torch.bfloat16
    exact = answers(truth, *upcast(args))
    assert_close((lse,), exact[1:2])
    assert_close((out, *grads), (exact[0], *exact[2:]), atol=0.05 if half else 2e-5)
    query, key, value, key_bias = args
    alone = answers(lambda q, k, b: ours(q, k, value, b)[1], query, key, key_bias)
    exact = answers(lambda q, k, b: truth(q, k, value.double(), b)[1], *upcast([query, key, key_bias]))
    assert_close(alone, exact, atol=0.05 if half else 2e-5)
    assert alone[1].any()
    leaf = query.detach().requires_grad_()
    dense, expanded = (
        torch.autograd.grad(ours(leaf, key, value, key_bias)[1], leaf, ones)
        for ones in (torch.ones_like(lse), lse.new_ones(()).expand_as(lse))  # the latter is that of lse.sum()
    )
    assert_same(expanded, dense)


@pytest.mark.parametrize("shape", [(), (1,), (17, 1), (2, 1, 1), (2, 1, 17, 1), (1, 1, 1, 1), (2, 2, 1, 1)])
@each_kind
def test_a_bias_of_the_whole_row_changes_nothing(backend: str, kind: str, shape: tuple[int, ...]) -> None:
    Nq = queries(kind, 17)
    query, key, value = heads(2, Nq=Nq)
    index, bias = index_of(kind, (2,), 2, Nq, 9, 5), torch.randn([Nq if n == 17 else n for n in shape])
    out, grad = answers(lambda b: gathered_attention(query, key, value, index, bias=b, backend=backend), bias)
    torch.testing.assert_close(out, gathered_attention(query, key, value, index, backend=backend))
    torch.testing.assert_close(grad, torch.zeros_like(bias), rtol=0, atol=2e-5)


@each_kind
def test_one_key_bias_for_all_keys_changes_nothing(backend: str, kind: str) -> None:
    query, key, value = heads(2)
    index, key_bias = index_of(kind, (2,), 2, 17, 9, 5), torch.randn(2, 1)
    out, grad = answers(lambda b: gathered_attention(query, key, value, index, key_bias=b, backend=backend), key_bias)
    torch.testing.assert_close(out, gathered_attention(query, key, value, index, backend=backend))
    torch.testing.assert_close(grad, torch.zeros(2, 1), rtol=0, atol=5e-5)


@each_kind
def test_a_mask_is_a_bias_of_zeros_and_infinities(backend: str, kind: str) -> None:
    """True = attend, as in the mask that SDPA takes."""
    query, key, value = heads(2)
    index = index_of(kind, (2,), 2, 17, 9, 5)
    mask, key_mask = torch.rand(2, 1, 17, 9 if index is None else 5) < 0.8, torch.rand(2, 9) < 0.8
    as_bias = [torch.where(m, 0.0, -torch.inf) for m in (mask, key_mask)]

    def call(bias: Tensor, key_bias: Tensor) -> tuple[Tensor, ...]:
        return answers(
            lambda q, k, v: gathered_attention(q, k, v, index, bias=bias, key_bias=key_bias, backend=backend),
            query, key, value,
        )  # fmt: skip

    assert_same(call(mask, key_mask), call(*as_bias))
    if index is None:
        attended = F.scaled_dot_product_attention(query, key, value, mask & key_mask[:, None, None])
        assert_close(call(mask, key_mask)[:1], (attended,))


@each_kind
def test_one_key_is_its_value(backend: str, kind: str) -> None:
    query, key, value = heads(2, Nk=1)
    index = None if kind == "dense" else index_of(kind, (2,), 2, 17, 1, 1, absent=0.0)
    out, grad_query, grad_key, grad_value = answers(
        lambda *a: gathered_attention(*a, index, backend=backend), query, key, value
    )
    if backend == "triton":  # two TF32 numbers, as tensor cores take them, hold all but the last bits of a float32
        torch.testing.assert_close(out, value.expand_as(out), rtol=1e-6, atol=0)
    else:
        assert torch.equal(out, value.expand_as(out))
    assert_close((grad_query, grad_key), (torch.zeros_like(query), torch.zeros_like(key)), atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(out.shape, generator=generator, device="cpu").to(out)
    assert_close((grad_value,), (grad_out.sum(-2, keepdim=True),))


@pytest.mark.parametrize("kind", ["set", "query", "head"])
def test_one_token_in_a_thousand_slots_is_its_value(backend: str, kind: str) -> None:
    """The roundings of a thousand equal terms all go the same way: a plain sum of them is off by 1.4e-5."""
    query, key, value = heads(1, Nq=3, Nk=5)
    index = torch.full({"set": (1, 1000), "query": (1, 3, 1000), "head": (1, 2, 3, 1000)}[kind], 4)
    out = gathered_attention(query, key, value, index, backend=backend)
    rtol = 3e-5 if backend == "torch" else 9e-6  # PyTorch's product sums so on some processors (MKL on a Zen 4)
    torch.testing.assert_close(out, value[:, :, 4:].expand_as(out), rtol=rtol, atol=0)


@on_every_cpp
@each_kind
def test_gradients_that_cancel(backend: str, kind: str) -> None:
    """Where one key takes all, the logits' gradients are near 0, and what rounding lse leaves of them is not seen."""
    args, index = heads(3, Nq=63, Nk=40), index_of(kind, (3,), 2, 63, 40, 20)
    args = (args[0] * 60, *args[1:])  # logits of 60 and more
    ours = answers(lambda *a: gathered_attention(*a, index, backend=backend), *args)
    torchs = answers(lambda *a: attend(*a, index)[0], *args)
    truth = answers(lambda *a: attend(*a, index)[0], *upcast(args))
    for a, b, c in zip(ours, torchs, truth, strict=True):
        assert (a - c).abs().median() <= 3 * (b - c).abs().median()


@on_every_cpp
@each_kind
@pytest.mark.parametrize("Nk", [500, 700])  # within a block of keys, and beyond
def test_gradients_where_lse_is_rounded(backend: str, kind: str, Nk: int) -> None:
    """Logits are whole numbers of some 10,000, exact in float32 but for lse; pairs of keys tie."""
    query, key = (torch.randint(-100, 101, (2, 2, n, 16)).float() for n in (40, Nk))
    key[:, :, Nk // 2 :] = key[:, :, : Nk // 2]
    args, index = (query, key, torch.randn(2, 2, Nk, 16)), index_of(kind, (2,), 2, 40, Nk, Nk - 20)
    ours = answers(lambda *a: gathered_attention(*a, index, scale=1.0, backend=backend), *args)
    torchs = answers(lambda *a: attend(*a, index, scale=1.0)[0], *args)
    truth = answers(lambda *a: attend(*a, index, scale=1.0)[0], *upcast(args))
    floor = 1e-6 * max(c.abs().max() for c in truth)  # gradients of queries cancel
    for a, b, c in zip(ours, torchs, truth, strict=True):
        assert (a - c).abs().max() <= 3 * (b - c).abs().max() + floor


def test_the_gradient_of_a_log_sum_exp_of_several_blocks(backend: str) -> None:
    query, key, value = heads(2, Nk=1100)
    ours = answers(lambda q, k: gathered_attention(q, k, value, return_lse=True, backend=backend)[1], query, key)
    assert_close(ours, answers(lambda q, k: attend(q, k, upcast(value), None)[1], *upcast([query, key])), atol=1e-4)


@pytest.mark.parametrize("rising", [True, False])
@each_kind
def test_running_maximum(backend: str, kind: str, rising: bool) -> None:
    """Keys in several blocks, each of which brings a new maximum: logits rise, or fall, by 60 from first to last."""
    Nq, Nk = queries(kind, 17), 600 if kind in ("query", "head") else 1100
    query, key, value = torch.ones(1, 1, Nq, 8), torch.randn(1, 1, Nk, 8), torch.randn(1, 1, Nk, 8)
    key = key * 0.1 + torch.linspace(0, 60, Nk)[:, None] * 8**-0.5 * (1 if rising else -1)
    index = None if kind == "dense" else torch.arange(Nk).expand(*index_of(kind, (1,), 1, Nq, 9, 1).shape[:-1], -1)
    ours = answers(lambda *a: gathered_attention(*a, index, backend=backend), query, key, value)
    exact = answers(lambda *a: attend(*a, index)[0], *upcast([query, key, value]))
    # Logits near 60 are known to 4e-6 at best, and to 3e-5 from three TF32 products.
    assert_close(ours, exact, atol=5e-4 if backend in GPU_BACKENDS else 5e-5)


@pytest.mark.parametrize("last", [10.0, 600.0, -600.0])
@pytest.mark.parametrize("kind", ["dense", "set"])
def test_maximum_of_half_types(backend: str, kind: str, last: float) -> None:
    """Up to 128 keys are taken at once, in one or two tiles; the logits rise, or fall, from 0 to the last one."""
    query, value = torch.ones(1, 1, 40, 16, dtype=torch.float16), torch.randn(1, 1, 81, 16).half()
    key = (torch.randn(1, 1, 81, 16) * 0.1 + torch.linspace(0, last / 4, 81)[:, None]).half()
    index = None if kind == "dense" else torch.arange(81)[None]
    ours = gathered_attention(query, key, value, index, return_lse=True, backend=backend)
    assert_close(ours, attend(*upcast([query, key, value]), index), atol=2e-3)


@pytest.mark.parametrize("Nk", [17, 81, 300])
def test_logits_beyond_the_integers_of_float32(backend: str, Nk: int) -> None:
    """All are 1.4e11, near which float32 knows numbers to 16384 (github.com/pytorch/pytorch/issues/121558)."""
    query, key = (torch.full((1, 1, N, 64), 133120.0, dtype=torch.bfloat16) for N in (17, Nk))
    value = torch.randn(1, 1, Nk, 64).bfloat16()
    out = gathered_attention(query, key, value, backend=backend)
    assert_close((out,), (value.double().mean(-2, keepdim=True).expand(out.shape),), atol=2e-3)


@each_kind
def test_scale(backend: str, kind: str) -> None:
    Nq = queries(kind, 17)
    args, index = heads(2, Nq=Nq), index_of(kind, (2,), 2, Nq, 9, 5)
    for scale in (0.0, 1, -0.3, 2.5, Fraction(1, 3)):
        ours = answers(lambda *a, s=scale: gathered_attention(*a, index, scale=s, backend=backend), *args)
        assert_close(ours, answers(lambda *a, s=scale: attend(*a, index, scale=float(s))[0], *upcast(args)), atol=1e-4)


@only_cpp
def test_a_scale_that_changes_compiles(backend: str) -> None:
    """Anew for each, as of SDPA; a check of what is finite would be an error there."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, scale: gathered_attention(q, k, v, scale=scale, backend=backend),
        fullgraph=True,
        backend="eager",
        dynamic=True,
    )
    args = heads(2)
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(*args, scale), gathered_attention(*args, scale=scale, backend=backend))


@each_kind
@pytest.mark.parametrize("batch", [(2,), (1, 2)])
def test_gradcheck(backend: str, kind: str, batch: tuple[int, ...]) -> None:
    """Every argument, against differences, through the output and through lse."""
    skip_float64_on_gpus(backend)
    slots = {"dense": 5}.get(kind, 4)
    args = [t.double().requires_grad_() for t in heads(*batch, Nq=3, Nk=5, D=3)]
    args += [torch.randn(2, 3, slots).double().requires_grad_(), torch.randn(*batch, 5).double().requires_grad_()]
    index = index_of(kind, batch, 2, 3, 5, slots)

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = gathered_attention(
            query, key, value, index, bias=bias, key_bias=key_bias, return_lse=True, backend=backend
        )
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert gradcheck(call, args, nondet_tol=0.0)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch tells from 2.13 on")
@only_cpp
@pytest.mark.parametrize("number", [1, 2])
def test_too_little_memory_is_told(backend: str, number: int, threads: None) -> None:
    """Also where threads ask for it."""
    torch.set_num_threads(number)
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 1, 8).expand(-1, -1, 1 << 42, -1)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        gathered_attention(query, key, key, backend=backend)


# ---- layouts and sizes -----------------------------------------------------------------------------------------------


@each_kind
def test_heads_are_merged_by_a_view(backend: str, kind: str) -> None:
    for batch in ((2,), (2, 3)):
        query, key, value = heads(*batch)
        out = gathered_attention(query, key, value, index_of(kind, batch, 2, 17, 9, 5), backend=backend)
        merged = out.transpose(-3, -2).flatten(-2)
        assert merged.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
        merged = merged if len(batch) == 1 else merged.transpose(1, 2)
        assert merged.is_contiguous()  # [B, N, C], and [B, N, J, C]


@only_cpp
@pytest.mark.parametrize("kind", ["dense", "set", "query"])
def test_views_are_read_in_place(backend: str, kind: str) -> None:
    """The call allocates its answer and little else, not copies of its arguments."""
    qkv = torch.randn(16, 243, 3, 4, 32).permute(2, 0, 3, 1, 4)
    frames = torch.randn(3, 4, 243, 4, 4 * 32).unflatten(-1, (4, 32)).permute(0, 1, 3, 4, 2, 5)
    for query, key, value in (qkv, frames):
        index = index_of(kind, query.shape[:-3], 4, 243, 243, 9)
        gathered_attention(query, key, value, index, backend=backend)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            out = gathered_attention(query, key, value, index, backend=backend)
        asked = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events() if e.name == "aten::empty")
        copies = [e.name for e in profile.events() if e.name in ("aten::copy_", "aten::clone", "aten::contiguous")]
        small = 0 if index is None else index.numel() * 8
        assert asked <= 1.6 * out.numel() * 4 + small + 500_000
        assert "aten::clone" not in copies


@pytest.mark.parametrize("count", [70_000, 300_000])
@pytest.mark.parametrize("kind", ["dense", "set", "query"])
def test_many_sequences(backend: str, kind: str, count: int) -> None:
    if EMULATED == "triton":
        pytest.skip("a program takes milliseconds in Triton's interpreter")
    query, key, value = heads(count, H=1, Nq=2, Nk=2, D=8)
    index = index_of(kind, (count,), 1, 2, 2, 2)
    ours = answers(lambda *a: gathered_attention(*a, index, backend=backend), query, key, value)
    some = torch.cat([torch.arange(9), torch.arange(count - 9, count), torch.randint(count, (99,))])
    parts = answers(
        lambda *a: attend(*a, None if index is None else index[some])[0],
        *upcast([query[some], key[some], value[some]]),
    )
    assert_close((ours[0][some],), (parts[0],))
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.randn(ours[0].shape, generator=generator, device="cpu").to(some.device)[some].double()
    leaves = [t[some].double().requires_grad_() for t in (query, key, value)]
    out = attend(*leaves, None if index is None else index[some])[0]
    assert_close(tuple(g[some] for g in ours[1:]), torch.autograd.grad(out, leaves, grad_out))


# ---- the same bits every time ----------------------------------------------------------------------------------------


@on_every_cpp
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_depends_on_nothing_but_itself(backend: str, kind: str, dtype: torch.dtype) -> None:
    args = (
        *(t.to(dtype) for t in heads(5, 3, Nq=63, Nk=39)),
        torch.randn(2, 63, 39 if kind == "dense" else 9),
        torch.randn(5, 3, 39),
    )
    index = index_of(kind, (5, 3), 2, 63, 39, 9)

    def call(some: slice) -> tuple[Tensor, Tensor]:
        query, key, value, key_bias = (t[some] for t in (*args[:3], args[4]))
        given = None if index is None else index[some]
        options: dict[str, Any] = {"bias": args[3], "key_bias": key_bias, "return_lse": True, "backend": backend}
        return gathered_attention(query, key, value, given, **options)

    assert_same(call(slice(3, 4)), tuple(t[3:4] for t in call(slice(None))))


@each_kind
def test_an_inverted_index_changes_no_bit(backend: str, kind: str) -> None:
    for batch in ((2,), (2, 3)):
        args, index = heads(*batch), index_of(kind, batch, 2, 17, 9, 5)
        if index is None:
            continue
        plain = answers(lambda *a, i=index: gathered_attention(*a, i, backend=backend), *args)
        for by in (backend, "torch"):
            inverted = invert_index(index, 9, dims=1 if kind == "set" else 2, backend=None if by == "triton" else by)
            assert_same(answers(lambda *a, i=inverted: gathered_attention(*a, i, backend=backend), *args), plain)
        assert_same(answers(lambda *a, i=index: gathered_attention(*a, i.int(), backend=backend), *args), plain)


@only_cpp
def test_an_inverse_of_something_else_is_refused(backend: str) -> None:
    args = [t.requires_grad_() for t in heads(2)]
    index, other = torch.tensor([[3, 0, 3, 8, 0], [0, 5, 5, 1, -1]]), random_slots((2, 5), 9, 0.0)
    right, one = invert_index(index, 9), invert_index(index[:1], 9)
    per_slot = {name: getattr(one, name)[:, None].expand(-1, 5, -1).contiguous() for name in ("start", "slots")}
    longer = invert_index(torch.cat([index, index], -1), 9)._replace(index=index)
    of_other_sizes = [
        longer,
        longer._replace(start=right.start),
        one._replace(**per_slot),
        *[right._replace(start=t) for t in (right.start[:, :-1].contiguous(), F.pad(right.start, (0, 1)))],
        *[right._replace(slots=t) for t in (right.slots[:, :-1].contiguous(), right.slots[..., None])],
        *[right._replace(start=t) for t in (right.start[:1], right.start.mT.contiguous().mT)],
        *[right._replace(slots=t) for t in (right.slots[:1], right.slots.mT.contiguous().mT)],
        *[right._replace(**{name: getattr(right, name)[0, 0]}) for name in ("start", "slots")],
    ]
    # Of row 0: a token's slots are not in order, one is there twice, one is the first of row 1, which has that token.
    rows = torch.tensor([[4, 1, 0, 2, 3], [1, 1, 0, 2, 3], [1, 5, 0, 2, 3]])
    of_something_else = [
        *[right._replace(slots=torch.stack([row, right.slots[1]])) for row in rows],
        *[right._replace(slots=right.slots + n) for n in (1, -9, -(1 << 40))],
        right._replace(slots=torch.cat([right.slots[:1], right.slots[1:].flip(1)])),
        right._replace(slots=right.slots.gather(1, right.start[:, :1].expand(-1, 5))),
        # The first entry of token 0 left out; starts that are not ascending.
        *[right._replace(start=right.start.index_fill(1, torch.tensor(n), at)) for n, at in ((0, 1), (1, -(1 << 40)))],
        *[right._replace(start=right.start + n) for n in (1, -1)],
        right._replace(start=torch.cat([right.start[:1], right.start[:1]])),
        right._replace(start=right.start * 0),
        right._replace(start=right.start.flip(-1)),
        right._replace(start=right.start.clamp(max=int(right.start[:, -1].min()) - 1)),
        right._replace(index=other),
        right._replace(index=torch.full_like(other, -1)),
    ]
    for expected, inverses in (("as invert_index return", of_other_sizes), ("the inverse of this", of_something_else)):
        for wrong in inverses:
            refused = f"^gathered_attention: (start and slots must be {expected}|index must be inverted with).+, got .+"
            with pytest.raises(ValueError, match=refused):
                gathered_attention(*args, wrong, backend=backend).sum().backward()
    for name in ("start", "slots"):
        with pytest.raises(ValueError, match=r"^gathered_attention: index must be inverted with .+, got .+"):
            gathered_attention(*args, right._replace(**{name: getattr(right, name)[:1]}), backend=backend)
        for change in (torch.Tensor.int, torch.Tensor.numpy, lambda t: t.to("meta"), lambda t: None):
            wrong = right._replace(**{name: change(getattr(right, name))})
            with pytest.raises((ValueError, TypeError), match=f"^gathered_attention: index.{name} must be .+, got .+"):
                gathered_attention(*args, wrong, backend=backend)


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gathered_attention", "recovery_attention"])
def test_dropout_is_seeded_unbiased_and_on_the_torch_backend(name: str) -> None:
    query, key, value = heads(1, Nq=5)
    args = [query[0], *(t.expand(4000, -1, -1, -1) for t in (key, value))]
    if name == "gathered_attention":
        args = [query.expand(4000, -1, -1, -1), *args[1:], random_slots((1, 7), 9)]

    def draw(seed: int, p: float = 0.3, backend: str | None = None) -> Tensor:
        torch.manual_seed(seed)
        return getattr(hotkernels, name)(*args, dropout_p=p, backend=backend)

    assert torch.equal(draw(1), draw(1, backend="torch"))
    assert not torch.equal(draw(1), draw(2))
    exact = getattr(hotkernels, name)(*args)[0]
    assert (draw(1).mean(0) - exact).abs().mean() < 0.02
    with pytest.raises(ValueError, match=rf"^{name}: backend must be .+, got 'cpp' \(it has no dropout"):
        draw(1, backend="cpp")
    assert torch.equal(draw(1, 0.0, "torch"), draw(2, 0.0, "torch"))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 5, 6])
def test_a_wrong_index_is_told_what_each_rank_means(backend: str, dims: int) -> None:
    with pytest.raises(
        ValueError, match=r"\[B, M\] \(one set of keys per sample\).+\(per query\).+\(per head and query\)"
    ):
        gathered_attention(*heads(1), torch.zeros([1] * dims, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("wrong", [9, -2, 1 << 40])
@pytest.mark.parametrize("kind", ["set", "query", "head"])
def test_nothing_is_read_before_the_index_is_checked(backend: str, kind: str, wrong: int, place: int) -> None:
    """One wrong entry anywhere is an error, with the value in it."""
    args, index = heads(2), index_of(kind, (2,), 2, 17, 9, 5)
    index.view(-1)[place] = wrong
    with (
        checked(),
        pytest.raises(ValueError, match=rf"^gathered_attention: index must be -1 or in \[0, 9\), got {wrong}$"),
    ):
        gathered_attention(*args, index, backend=backend)


@pytest.mark.parametrize("op", [gathered_attention, recovery_attention])
def test_compiles_with_one_tensor_as_several_arguments(backend: str, op: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(2, 2, 2, 9, 16).unbind(0)
    for args in ((x, x, x), (x, y, y), (x, x, y), (x, y, x)):
        given = [t.clone().requires_grad_() for t in (x, y)]
        chosen = [given[0] if t is x else given[1] for t in args]
        used = [t for t in given if any(t is c for c in chosen)]
        ours, plain = (
            [out := f(*chosen, backend=backend), *torch.autograd.grad(out.sum(), used)] for f in (compiled, op)
        )
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)


# ---- packed ----------------------------------------------------------------------------------------------------------


@on_every_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 17, 3, 2, 16), (2, 63, 3, 2, 39), (2, 63, 5, 3, 2, 8), (0, 5, 3, 1, 8)])
def test_one_projection_in_one_piece(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """packed_attention gives the bits of gathered_attention on the three views, and one gradient."""
    qkv = torch.randn(shape).to(dtype)
    out, grad = answers(lambda x: packed_attention(x, 0.3, backend=backend), qkv)
    plain, *grads = answers(lambda *a: gathered_attention(*a, scale=0.3, backend=backend), *unpack(qkv))
    assert_same((out,), (plain,))
    assert_same(unpack(grad), tuple(grads))
    assert grad.is_contiguous()
    assert_same((PackedAttention.apply(qkv, 0.3),), (out,))


def test_packed_dropout_is_on_the_torch_backend() -> None:
    qkv = torch.randn(2, 9, 3, 2, 8)
    torch.manual_seed(3)
    out = packed_attention(qkv, 0.3, 0.4)
    torch.manual_seed(3)
    assert torch.equal(out, gathered_attention(*unpack(qkv), scale=0.3, dropout_p=0.4))
    assert not torch.equal(out, packed_attention(qkv, 0.3))


# ---- memory ----------------------------------------------------------------------------------------------------------


@only_cpp
@pytest.mark.parametrize("kind", ["dense", "set", "query"])
def test_no_matrix_of_logits_is_kept(backend: str, kind: str) -> None:
    """What forward saves for backward grows with Nq + Nk, not with Nq * Nk."""
    saved: list[Tensor] = []
    args = [t.requires_grad_() for t in heads(1, H=1, Nq=1000, Nk=1000, D=8)]
    index = index_of(kind, (1,), 1, 1000, 1000, 5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gathered_attention(*args, index, backend=backend)
    assert saved
    assert sum(t.numel() for t in saved) < 40_000


def test_one_key_of_all_samples(backend: str) -> None:
    """Its index, expanded, has no layout that a kernel reads."""
    query, key, value = torch.randn(3, 2, 17, 16), *torch.randn(2, 1, 2, 9, 16)
    leaf = value.requires_grad_()
    out = gathered_attention(query, key, leaf, torch.tensor([[4]]), backend=backend)
    (ours,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    expected = torch.zeros_like(value)
    expected[:, :, 4] = 3 * 17
    torch.testing.assert_close(ours, expected)


@only_cpp
def test_keys_of_all_samples_are_not_written_for_each(backend: str) -> None:
    """Backward takes memory for the slots of all samples, not for all keys of all samples."""
    query = torch.randn(64, 2, 4, 16)
    key, value = (torch.randn(1, 2, 4096, 16, requires_grad=True) for _ in range(2))
    out = gathered_attention(query, key, value, torch.randint(-1, 4096, (64, 9)), backend=backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(out, (key, value), torch.ones_like(out))
    asked = sum(max(e.self_cpu_memory_usage, 0) for e in profile.events())
    assert asked <= 3 * (key.numel() + value.numel()) * 4  # once for each sample, 32 times that


def test_autocast_names_the_dtype_that_was_given() -> None:
    query, key, value = heads(1)
    error = r"^gathered_attention: key must be a tensor of float64, got float32$"
    with torch.autocast("cpu"), pytest.raises(TypeError, match=error):
        gathered_attention(query.double(), key, value)
