"""Attention in Triton, forward: checks a call, chooses a kernel and its blocks, and launches it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dtypes import FUSED, names
from ...errors import fail
from ...launcher import GPU, Launch, cdiv, gpu, launch, next_power_of_2, prepare
from .api import MAX_HEAD_DIM, broadcastable, fits_rows, rows_of_index, token_major
from .kernels import (
    gathered_attention_long_fwd_kernel,
    gathered_attention_per_query_fwd_kernel,
    gathered_attention_short_fwd_kernel,
)

Strides = tuple[int, ...]
Layouts = tuple[Any, ...]
# Pointers to rows of channels, whose strides are the parameters stride_*.
ROWS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_out_ptr", "grad_q_ptr", "grad_k_ptr", "grad_v_ptr")
PLANS = 512  # planning takes longer than the rest of a call: the last so many plans are kept, by layouts
MAX_INT32_COUNT = 2**31 - 4097  # kernels count in 32 bits, up to the end of the last block of 4,096


class Problem:
    """A call's arguments, checked; their sizes and strides by the names of the kernels' parameters."""

    def __init__(
        self,
        op: str,
        query: Tensor,  # [*batch, H, Nq, D], or [H, Nq, D] for all sequences
        key: Tensor,
        value: Tensor,
        index: Tensor | None = None,
        bias: Tensor | None = None,
        key_bias: Tensor | None = None,
        *,
        gpu: GPU,
    ) -> None:
        self.gpu = gpu
        query, key, value = (with_contiguous_last(t) for t in (query, key, value))
        self.query, self.key, self.value = query, key, value
        self.index, self.bias, self.key_bias = index, bias, key_bias
        *batch, self.H, self.Nk, self.D = key.shape
        self.batch = tuple(batch)
        self.B, self.J = self.batch if len(batch) == 2 else (*batch, 1)
        self.Nq = query.shape[-2]
        heads = (*batch, self.H, self.Nq, self.D)
        if len(batch) not in (1, 2) or value.shape != key.shape:
            fail(
                op, "value", f"[*batch, H, Nk, D] = {list(key.shape)} as key, one or two batch dims", list(value.shape)
            )
        if query.shape != heads and query.shape != heads[-3:]:
            fail(op, "query", f"[*batch, H, Nq, D] = {list(heads)} with key's batch", list(query.shape))
        if not 1 <= self.D <= MAX_HEAD_DIM or self.Nq < 1 or self.Nk < 1:
            fail(op, "query", f"of a head dim in [1, {MAX_HEAD_DIM}], with a token and a key", list(query.shape))
        if query.dtype not in FUSED:
            fail(op, "query", f"a tensor of {names(FUSED)}", names([query.dtype]), TypeError)
        if not query.dtype == key.dtype == value.dtype:
            fail(op, "key and value", f"of query's dtype {query.dtype}", f"{key.dtype} and {value.dtype}", TypeError)
        self.S = self.Nk
        index_strides: Strides = (0, 0, 0, 0)
        self.per_query = self.per_head = False
        if index is not None:
            index_strides = self._take_index(op, index)
        bias_strides: Strides = (0, 0, 0, 0, 0)
        if bias is not None:
            self._check_added(op, "bias", bias, (*batch, self.H, self.Nq, self.S))
            b, *j, h, q, s = strides(bias)
            bias_strides = (b, *(j or (0,)), h, q, s)
        key_bias_strides: Strides = (0, 0, 0)
        if key_bias is not None:
            self._check_added(op, "key_bias", key_bias, (*batch, self.Nk))
            b, *j, n = strides(key_bias)
            key_bias_strides = (b, *(j or (0,)), n)
        self.sequences = self.B * self.J
        if self.sequences * self.H > MAX_INT32_COUNT:
            fail(op, "query", "of less than 2^31 sequences times heads", self.sequences * self.H)
        for arg, n, what in (("query", self.Nq, "tokens"), ("key", self.Nk, "tokens"), ("index", self.S, "slots")):
            if n > MAX_INT32_COUNT:
                fail(op, arg, f"of fewer than 2^31 - 4096 {what} on a GPU", n)
        self.BLOCK_D = max(16, next_power_of_2(self.D))
        self.numbers: dict[str, int | float] = {
            **self.row_strides("stride_q", query),
            **self.row_strides("stride_k", key),
            **self.row_strides("stride_v", value),
            **named("index_stride_", "bjhq", index_strides),
            **named("bias_stride_", "bjhqs", bias_strides),
            **named("key_bias_stride_", "bjn", key_bias_strides),
            **{name: getattr(self, name) for name in ("sequences", "J", "H", "Nq", "Nk", "S")},
        }

    def _take_index(self, op: str, index: Tensor) -> Strides:
        """Check it; its (b, j, h, q) strides."""
        batch, dims = self.batch, index.dim()
        rows = rows_of_index(dims, batch, self.H, self.Nq)
        if rows is None or not fits_rows(index, rows) or index.shape[-1] < 1:
            fail(
                op, "index", f"[B, M], [*batch, Nq, K] or [*batch, H, Nq, K], batch = {list(batch)}", list(index.shape)
            )
        self.per_query, self.per_head = dims > 2, dims == len(batch) + 3
        if index.dtype != torch.int64 or not index.is_contiguous():
            fail(op, "index", "a contiguous tensor of int64", f"{index.dtype} of strides {index.stride()}", TypeError)
        self.S = index.shape[-1]
        of = strides(index)
        return (*self.leading(of[:-2]), of[-2]) if self.per_query else (*self.leading(of[:-1]), 0)

    def leading(self, of: Strides) -> Strides:
        """(b, j, h) strides of an index or its inverse, from those of all dims but queries, tokens and slots."""
        b, *rest = of
        j = rest.pop(0) if rest and len(self.batch) == 2 else 0
        return b, j, rest[0] if rest else 0

    def _check_added(self, op: str, arg: str, t: Tensor, full: tuple[int, ...]) -> None:
        if t.dim() != len(full) or not broadcastable(t.shape, full):
            fail(op, arg, f"broadcastable to {list(full)}", list(t.shape))
        if t.dtype != torch.float32:
            fail(op, arg, "a tensor of float32", t.dtype, TypeError)

    def row_strides(self, prefix: str, t: Tensor) -> dict[str, int]:
        """The (b, j, h, n) strides of [*batch, H, N, D], or of [H, N, D] which all sequences share."""
        of = strides(t)
        bjhn = (0, 0, *of[:2]) if len(of) == 3 else (of[0], 0, of[1], of[2]) if len(of) == 4 else of[:4]
        return named(prefix, "bjhn", bjhn)

    def token_major(self, like: Tensor, N: int) -> Tensor:
        """An empty [*batch, H, N, D] stored [B, N, (J,) H, D]."""
        return token_major(like, (*self.batch, self.H, N, self.D))


def named(prefix: str, dims: str, values: Iterable[int]) -> dict[str, int]:
    """Strides by the names of kernels' parameters: prefix and dim."""
    return {prefix + dim: value for dim, value in zip(dims, values, strict=True)}


def strides(t: Tensor) -> Strides:
    """Strides, 0 for a dim of size 1, which broadcasts."""
    if 1 not in t.shape:
        return t.stride()
    return tuple([0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)])


def with_contiguous_last(t: Tensor) -> Tensor:
    """The tensor itself, unless its last dim has a stride."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def dot_precision(dtype: torch.dtype) -> str:
    """How a matrix product of float32 is made: of three TF32 products, or of one if the user allowed TF32."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


class Blocks(NamedTuple):
    """What a program takes at a time, M queries and N slots unless its function says otherwise, and with what."""

    M: int
    N: int
    num_warps: int
    num_stages: int


Table = dict[tuple[str, int], Blocks]  # (dtypes, and whether with a bias; BLOCK_D up to) -> blocks

# Blocks are those that take fewest instructions without spilling much, under Triton 3.6 to 3.9 (tests/triton_issue.py,
# tests/data/triton_resources.json). Hopper, where four warps multiply 64 rows together, has some of its own.
# The largest blocks of the long kernel:
_LONG: Table = {
    ("half", 64): Blocks(128, 64, 8, 2),
    ("half", 128): Blocks(64, 32, 4, 2),
    ("half", 256): Blocks(32, 32, 4, 1),
    ("float32", 64): Blocks(64, 32, 4, 2),
    ("float32", 128): Blocks(32, 32, 8, 1),
    ("float32", 256): Blocks(16, 16, 8, 1),
}
_LONG_OF_WARP_GROUPS: Table = {
    ("half", 128): Blocks(64, 64, 4, 2),
    ("half", 256): Blocks(64, 32, 4, 1),
    ("float32", 128): Blocks(64, 32, 4, 1),
}
SHORT = 32  # the most queries, and slots, of the short kernel

# One function per kernel picks its blocks; bench/gpu_tune.py measures the alternatives.


def blocks_of(p: Problem, table: Table, of_warp_groups: Table) -> Blocks:
    """The first there are: for GPUs with warp groups, for all, without a bias; 32 channels may count as 64."""
    dtype = "float32" if p.query.dtype == torch.float32 else "half"
    kind = dtype if p.bias is None else f"{dtype} with bias"
    places = [(of_warp_groups, kind)] if p.gpu.warp_groups else []
    places += [(table, kind), (table, dtype)]
    sizes = [32, 64] if p.BLOCK_D <= 32 else [p.BLOCK_D]
    return next(where[of, size] for where, of in places for size in sizes if (of, size) in where)


def long_blocks(p: Problem) -> Blocks:
    """Blocks, smaller where they would be mostly padding; not chosen by batch sizes, which must not change the bits.

    N >= S, a power of two or the sum of two, takes all slots at once, without an online softmax.
    """
    float32 = p.query.dtype == torch.float32
    M, N, num_warps, num_stages = blocks_of(p, _LONG, _LONG_OF_WARP_GROUPS)
    narrow_half = not float32 and p.BLOCK_D <= 64
    fits = narrow_half and p.bias is None and p.D % 8 == 0  # few registers are needed beside the tiles
    if fits and p.S <= 128:
        N = max(16, next_power_of_2(p.S + 1) // 2)
        if N < p.S:
            N += max(16, next_power_of_2(p.S - N))
    else:
        if p.index is not None:  # each row has its own address: copying ahead costs more instructions than it hides
            N, num_stages = 32 if narrow_half else N, 1
        if not fits and p.S <= 256 and (p.S - 1) % 64 < 32:  # 81 slots are three blocks of 32 or two of 64
            N = min(N, 32)
    if p.S <= N:
        num_stages = 1
    if fits or (narrow_half and N == 32 and p.bias is None):
        num_warps = 4  # each of 8 would do as much work per slot, for half as many queries
    least = 2 if float32 and p.bias is None else 4
    while M > 32 and p.Nq <= M // 2:
        M, num_warps = M // 2, max(least, num_warps // 2)
    return Blocks(M, N, num_warps, num_stages)


def is_short(p: Problem) -> bool:
    """Whether the short kernel serves a problem."""
    widest = 32 if p.query.dtype == torch.float32 else 64
    return p.Nq <= SHORT and p.S <= SHORT and widest >= p.BLOCK_D


def short_pairs(p: Problem) -> int:
    """How many pairs of sequence and head a program of the short kernel takes."""
    longest = max(16, next_power_of_2(max(p.Nq, p.S)))
    return max(1, (4096 if p.query.element_size() == 2 else 2048) // (longest * p.BLOCK_D))


def per_query_blocks(p: Problem) -> Blocks:
    """Heads (M) and slots (N) at a time under an index per query."""
    M = 1 if p.per_head else min(next_power_of_2(p.H), max(1, 512 // p.BLOCK_D))
    N = min(next_power_of_2(p.S), max(1, 4096 // (M * p.BLOCK_D)))
    return Blocks(M, N, max(1, M * N * p.BLOCK_D // 2048), 2)


class Forward:
    """The plan of a forward pass, made on tensors without data: arguments checked, its launch prepared."""

    def __init__(self, op: str, scale: float, given: Sequence[Any], gpu: GPU, precision: str) -> None:
        p = Problem(op, *given, gpu=gpu)
        out = p.token_major(p.query, p.Nq)
        self._launch = forward_launch(p, out, scale, precision)
        self._made = layouts((out, p.query.new_empty((*p.batch, p.H, p.Nq), dtype=torch.float32)))
        self._copies = any(a is not b for a, b in zip(given, (p.query, p.key, p.value), strict=False))

    def on(self, query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
        """Launch it on these tensors; returns out and lse."""
        if self._copies:
            query, key, value = (with_contiguous_last(t) for t in (query, key, value))
        out, lse = empty(query, self._made)
        launch(self._launch, query, key, value, out, lse, *others)
        return out, lse


@functools.lru_cache(maxsize=PLANS)
def _planned(op: str, scale: float, of: Layouts, gpu: GPU, precision: str) -> Forward:
    return Forward(op, scale, without_data(of), gpu, precision)


def attention_forward(op: str, scale: float, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """out [*batch, H, Nq, D], stored [B, Nq, (J,) H, D], and lse [*batch, H, Nq], of Problem's six tensors."""
    query = given[0]
    return _planned(op, scale, layouts(given), gpu(query.get_device()), dot_precision(query.dtype)).on(*given)


def layouts(tensors: Sequence[Tensor | None]) -> Layouts:
    """Shapes, strides and dtypes: all that a plan depends on."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors])


def without_data(of: Layouts) -> tuple[Any, ...]:
    """Tensors of these layouts."""
    return tuple(None if t is None else torch.empty_strided(*t[:2], dtype=t[2], device="meta") for t in of)


def empty(like: Tensor, of: Layouts) -> list[Tensor]:
    """New tensors of these layouts on the device of another."""
    return [like.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in of]


def forward_launch(p: Problem, out: Tensor, scale: float, precision: str) -> Launch:
    """The launch that serves a problem."""
    numbers = {**p.numbers, **p.row_strides("stride_o", out), "logit_scale": scale * math.log2(math.e)}
    constants = {"HEAD_DIM": p.D, "BLOCK_D": p.BLOCK_D, "PRECISION": precision}
    if p.per_query:
        blocks = per_query_blocks(p)
        kernel, programs = gathered_attention_per_query_fwd_kernel, p.sequences * p.Nq * cdiv(p.H, blocks.M)
        constants |= {"BLOCK_H": blocks.M, "BLOCK_S": blocks.N}
    elif is_short(p):
        pairs = short_pairs(p)
        M, N = (max(16, next_power_of_2(n)) for n in (p.Nq, p.S))
        blocks = Blocks(M, N, min(4, pairs), 1)
        kernel, programs = gathered_attention_short_fwd_kernel, cdiv(p.sequences * p.H, pairs)
        constants |= {"BLOCK_M": blocks.M, "BLOCK_N": blocks.N, "PAIRS": pairs}
    else:
        blocks = long_blocks(p)
        kernel, programs = gathered_attention_long_fwd_kernel, p.sequences * p.H * cdiv(p.Nq, blocks.M)
        N, once = 1 << blocks.N.bit_length() - 1, p.S <= blocks.N
        constants |= {"BLOCK_M": blocks.M, "BLOCK_N": N, "REST_N": blocks.N - N if once else 0, "ONCE": once}
    return prepare(kernel, programs, numbers, constants, blocks.num_warps, blocks.num_stages, p.query.dtype, ROWS)


def gathered_attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The raw operator."""
    return attention_forward("gathered_attention", scale, (query, key, value, index, bias, key_bias))


def recovery_attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The raw operator."""
    return attention_forward("recovery_attention", scale, (query, key, value, None, None, key_bias))
