"""The raw operators of attention: whatever a caller gives them, they read nothing that is not theirs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import KINDS, attend, each_kind, heads, index_of
from cases import upcast
from comparing import answers, assert_close, assert_same
from conftest import only_cpp
from torch import Tensor

from hotkernels import gathered_attention
from hotkernels.autograd import GatheredAttention


@only_cpp
@each_kind
def test_the_function_to_build_on(backend: str, kind: str) -> None:
    args, index = heads(2), index_of(kind, (2,), 2, 17, 9, 5)
    out, lse = GatheredAttention.apply(*args, index, None, None, None, None, 0.25)
    assert_same((out, lse), gathered_attention(*args, index, scale=0.25, return_lse=True, backend=backend))


@only_cpp
@each_kind
def test_the_function_to_build_on_takes_keys_of_all_samples(backend: str, kind: str) -> None:
    query, key, value = heads(2)
    args, index = (query, key[:1], value[:1]), index_of(kind, (2,), 2, 17, 9, 5, 0.0)
    ours = answers(lambda *args: GatheredAttention.apply(*args, index, None, None, None, None, 0.25), *args)
    truth = answers(lambda *args: attend(*args, index, scale=0.25), *upcast(args))
    assert_close(ours, truth, 2e-5)


@only_cpp
@pytest.mark.parametrize("kind", ["dense", "set"])
def test_one_query_for_all_samples_and_a_bias_of_each(backend: str, kind: str) -> None:
    """The query's gradient is a sum over samples, the bias's is not."""
    query, key, value = heads(40, H=1, Nq=3)
    index = index_of(kind, (40,), 1, 3, 9, 5)
    bias = torch.randn(40, 1, 3, 9 if index is None else 5)
    inverse = (None, None) if index is None else torch.ops.hotkernels.invert_index(index, 9)

    def bias_gradient(query: Tensor) -> Tensor:
        args = (query, key, value)
        out, lse = torch.ops.hotkernels.gathered_attention_fwd(*args, index, bias, None, 0.25)
        grads = torch.ops.hotkernels.gathered_attention_bwd(
            value[:, :, :3].contiguous(), None, *args, out, lse, index, *inverse, bias, None, 0.25, True, False
        )
        return grads[3]

    assert_same(bias_gradient(query[0]), bias_gradient(query[:1].expand(40, -1, -1, -1).contiguous()))


def _shapes(draw: random.Random) -> dict[str, Any]:
    """Arguments of a raw call that fit together, then some of them changed."""
    batch = [draw.choice([0, 1, 2]) for _ in range(draw.choice([1, 1, 2]))]
    H, Nq, Nk, D, S = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice([1, 4]), draw.choice([1, 5, 8]), 3
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    kind = draw.choice(KINDS)
    B = batch[0]
    sizes = {"dense": None, "set": [B, S], "query": [*batch, Nq, S], "head": [*batch, H, Nq, S]}[kind]
    slots = Nk if kind == "dense" else S
    args: dict[str, Any] = {
        "query": torch.randn(*batch, H, Nq, D).to(dtype),
        "key": torch.randn(*batch, H, Nk, D).to(dtype),
        "value": torch.randn(*batch, H, Nk, D).to(dtype),
        "index": None if sizes is None else torch.randint(-1, Nk, sizes),
        "bias": draw.choice([None, torch.randn(*batch, H, Nq, slots).to(compute)]),
        "key_bias": draw.choice([None, torch.randn(*batch, Nk).to(compute)]),
    }
    out = torch.randn(*batch, H, Nq, D).to(dtype)
    args["grad_out"], args["out"] = torch.randn_like(out), out
    args["lse"] = torch.randn(*batch, H, Nq).to(compute)
    args["grad_lse"] = draw.choice([None, torch.randn(*batch, H, Nq).to(compute)])
    args["start"] = args["slots"] = None
    if sizes is not None:
        rows = args["index"] if kind == "set" else args["index"].flatten(-2)
        args["start"], args["slots"] = torch.ops.hotkernels.invert_index(rows, Nk)
    for _ in range(draw.choice([0, 1, 1, 2])):
        name = draw.choice([name for name, value in args.items() if value is not None])
        args[name] = _changed(draw, args[name])
    return args


def _changed(draw: random.Random, t: Tensor) -> Tensor | None:
    dim = draw.randrange(t.dim()) if t.dim() else 0
    changes: list[Callable[[], Tensor | None]] = [
        lambda: None,
        lambda: t[None],
        lambda: t.to(draw.choice([torch.float32, torch.float16, torch.int64, torch.int32, torch.bool])),
        lambda: t.to("meta"),
        lambda: t.new_empty(0),
        lambda: t.new_zeros(()),
    ]
    if t.dim():
        changes += [
            lambda: t.select(dim, 0) if t.shape[dim] else t,
            lambda: t.narrow(dim, 0, max(t.shape[dim] - 1, 0)),
            lambda: torch.cat([t, t], dim),
            lambda: t.transpose(0, -1),
            lambda: t.narrow(dim, 0, min(1, t.shape[dim])),
            lambda: torch.stack([t, t], -1)[..., 0],
        ]
    if not t.is_floating_point():
        changes += [lambda: t + 1, lambda: t - 1, lambda: t + (1 << 40), lambda: torch.full_like(t, 1 << 62)]
    return draw.choice(changes)()


@only_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_key_bias_that_is_not_there(backend: str, dtype: torch.dtype) -> None:
    """That of zeros."""
    q, k, v, grad = torch.randn(4, 2, 2, 17, 16).to(dtype).unbind(0)
    out, lse = torch.ops.hotkernels.gathered_attention_fwd(q, k, v, None, None, None, 0.25)
    absent, zeros = (
        torch.ops.hotkernels.gathered_attention_bwd(
            grad, None, q, k, v, out, lse, None, None, None, None, key_bias, 0.25, False, True
        )
        for key_bias in (None, torch.zeros(2, 17))
    )
    torch.testing.assert_close(absent, zeros, rtol=1e-2, atol=1e-2)


@only_cpp
def test_raw_operators_never_read_what_is_not_theirs(backend: str) -> None:
    """Wrong shapes, dtypes, strides and indices: an exception, or the answer that the definition gives."""
    draw = random.Random(0)
    ops = torch.ops.hotkernels
    refusals = (
        ValueError,
        TypeError,
        RuntimeError,
        IndexError,
        AttributeError,
    )  # the last two of fake kernels, on meta
    answered = refused = 0
    for _ in range(2500):
        a = _shapes(draw)
        q, k, v, index, bias, key_bias = (a[n] for n in ("query", "key", "value", "index", "bias", "key_bias"))
        try:
            out, lse = ops.gathered_attention_fwd(q, k, v, index, bias, key_bias, 0.3)
        except refusals:
            refused += 1
        else:
            if not any(t is not None and t.is_meta for t in (q, k, v, index, bias, key_bias)):
                exact = attend(*upcast([q, k, v]), index, bias=upcast(bias), key_bias=upcast(key_bias), scale=0.3)
                half = out.element_size() == 2
                torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=0.03 if half else 1e-5)
                torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-4)
                answered += 1
        gradient_of = (a["grad_out"], a["grad_lse"], q, k, v, a["out"], a["lse"])
        needs = draw.random() < 0.5, draw.random() < 0.5
        for call in (
            lambda g=gradient_of, i=index, a=a, needs=needs: ops.gathered_attention_bwd(
                *g, i, a["start"], a["slots"], a["bias"], a["key_bias"], 0.3, *needs
            ),
            lambda g=gradient_of: ops.gathered_attention_packed_bwd(g[0], *g[2:], 0.3),
        ):
            try:
                call()
                answered += 1
            except refusals:
                refused += 1
    assert answered > 500
    assert refused > 500
