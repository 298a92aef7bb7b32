"""Gradients of attention in Triton: checks a call, allocates its gradients, chooses kernels and blocks, launches."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...errors import fail
from ...launcher import Launch, cdiv, is_aligned, launch, next_power_of_2
from .api import unpack
from .kernels_backward import (
    gathered_attention_bias_bwd_kernel,
    gathered_attention_each_keys_bwd_kernel,
    gathered_attention_each_queries_bwd_kernel,
    gathered_attention_fused_bwd_kernel,
    gathered_attention_keys_bwd_kernel,
    gathered_attention_queries_bwd_kernel,
)
from .launches import (
    PLANS,
    Blocks,
    Layouts,
    Problem,
    dot_precision,
    layouts,
    settings,
    strides,
    with_contiguous_last,
    without_data,
)

PROGRAMS = 256  # of kernels that take several sequences per program: two for each multiprocessor of an H200


# Blocks that spill at most 16 bytes on sm_90 with triton 3.6 and 3.9, but float32 of more than 128 channels, 243 tokens
# of 39 channels, and with 3.9 those of 243 tokens in half types, 56 bytes: tests/data/triton_resources.json.
# (float32, BLOCK_D up to) -> those of queries and of keys.
_QUERIES = {
    (False, 64): Blocks(128, 64, 8, 2),
    (False, 128): Blocks(64, 32, 4, 1),
    (False, 256): Blocks(32, 64, 8, 1),
    (True, 64): Blocks(32, 64, 8, 1),
    (True, 128): Blocks(16, 16, 4, 1),
    (True, 256): Blocks(16, 16, 8, 1),
}
_KEYS = {
    (False, 64): Blocks(64, 128, 8, 2),
    (False, 128): Blocks(32, 64, 8, 1),
    (False, 256): Blocks(32, 32, 8, 1),
    (True, 64): Blocks(64, 32, 8, 1),
    (True, 128): Blocks(32, 16, 8, 1),
    (True, 256): Blocks(16, 16, 8, 1),
}
# float32 -> those of queries and of keys where there is a bias, whose addresses need registers, up to 64 channels.
_WITH_BIAS = {
    False: (Blocks(64, 32, 4, 1), Blocks(32, 64, 8, 1)),
    True: (Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 1)),
}
# float32 -> those of the bias, and how many channels it takes at a time.
_BIAS = {False: (Blocks(64, 32, 8, 1), 64), True: (Blocks(16, 32, 4, 1), 16)}


def fused_blocks(p: Problem) -> Blocks | None:
    """Blocks in which all queries of a sequence fit; None if none do."""
    M, N = (max(16, next_power_of_2(n)) for n in (p.Nq, p.S))
    if p.query.dtype == torch.float32:
        return Blocks(M, min(N, 32), 4, 1) if M <= 32 and p.BLOCK_D <= 64 else None
    if p.BLOCK_D > 64:
        return Blocks(M, min(N, 32), 8 if M * p.BLOCK_D > 4096 else 4, 1) if M * p.BLOCK_D <= 8192 else None
    if M <= 32:
        return Blocks(M, min(N, 32), 2, 1)
    if M <= 128:
        return Blocks(M, min(N, 32), M // 16, 1)
    if M > 256 or (p.index is not None and p.bias is not None):
        return None
    if p.bias is not None:
        return Blocks(M, 16, 8, 1)
    # With 64 columns every product is a warp group's; whatever else needs registers leaves too few for so many.
    plain = p.index is None and p.query.dim() > 3 and p.D == p.BLOCK_D
    return Blocks(M, min(N, 64 if plain else 32), 8, 1)


def sequences_at_once(p: Problem, blocks: Blocks) -> int:
    """How many sequences a program of the fused kernel takes: several where they are a few tokens."""
    elements = 1024 if p.query.dtype == torch.float32 else 2048
    return max(1, elements // (max(blocks[:2]) * max(p.BLOCK_D, *blocks[:2])))


def each_blocks(p: Problem, count: int, elements: int) -> tuple[int, int]:
    """(rows, entries) at once in the kernels of an index per query, whose rows have about `count` entries."""
    most = max(1, elements // p.BLOCK_D)
    entries = min(next_power_of_2(count), most, 32)
    return most // entries, entries


class Backward:
    """A backward pass worked out on tensors without data: arguments checked, gradients and launches prepared."""

    def __init__(
        self,
        op: str,
        grad_out: Tensor,  # [*batch, H, Nq, D], any strides
        grad_lse: Tensor | None,  # [*batch, H, Nq]
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        index: Tensor | None,
        start: Tensor | None,
        slots: Tensor | None,
        bias: Tensor | None,
        key_bias: Tensor | None,
        scale: float,
        need_bias: bool,
        need_key_bias: bool,
        packed: bool = False,  # grad_query, grad_key and grad_value in one [B, N, (J,) 3, H, D]
    ) -> None:
        p = self.problem = Problem(op, query, key, value, index, bias, key_bias)
        self.grad_out, self.out, self.lse, self.grad_lse = grad_out, out, lse, grad_lse
        self.start, self.slots, self.scale = start, slots, scale
        self.shared_query = p.query.dim() == 3
        self._check(op)
        if packed and p.Nq != p.Nk:
            fail(op, "query", f"of as many tokens as key, {p.Nk}", p.Nq)
        need_bias = need_bias and bias is not None
        self.precision = dot_precision(query.dtype)
        self.delta: Tensor | None = None  # [*batch, H, Nq]
        self.launches: list[Launch] = []

        heads = (*p.batch, p.H)
        self.grad_qkv: Tensor | None = None
        if packed:
            self.grad_qkv = p.query.new_empty(p.B, p.Nq, *p.batch[1:], 3, p.H, p.D)
            self.grad_query, self.grad_key, self.grad_value = unpack(self.grad_qkv)
        else:
            self.grad_key, self.grad_value = p.token_major(p.key, p.Nk), p.token_major(p.value, p.Nk)
            if not self.shared_query:
                self.grad_query = p.token_major(p.query, p.Nq)
        self.grad_key_bias = lse.new_empty((*heads, p.Nk) if need_key_bias else 0)
        self.grad_bias = lse.new_empty((*heads, p.Nq, p.S) if p.per_query and need_bias else 0)
        if p.per_query:
            self._each()
        else:
            blocks = fused_blocks(p)
            if blocks is not None:
                self._fuse(blocks, delta=need_bias)
            else:
                self._split()
            if need_bias:
                self._bias()
        given = (grad_out, grad_lse, query, key, value, out, lse, index, start, slots, bias, key_bias)
        self._remember(given)

    def _remember(self, given: tuple[Tensor | None, ...]) -> None:
        """Where a call finds each launch's tensors: among those given, then those made, then the parts of grad_qkv."""
        parts = (self.grad_query, self.grad_key, self.grad_value)
        packed = self.grad_qkv is not None
        made = [self.grad_key_bias, self.grad_bias, self.delta, *((self.grad_qkv,) if packed else parts)]
        self._made = layouts(*[t for t in made if t is not None])
        everything = [*given, *[t for t in made if t is not None], *(parts if packed else ())]
        places = {id(t): i for i, t in enumerate(everything) if t is not None}
        self._places = [[-1 if t is None else places[id(t)] for t in job.tensors] for job in self.launches]

    def on(self, *given: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Launch it all on these tensors; the gradients, and last grad_qkv, where they are its parts."""
        query = given[2]
        assert query is not None
        made = [query.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in self._made]
        parts = made[-3:] if self.grad_qkv is None else unpack(made[-1])
        tensors = (*given, *made, *parts, None)
        for job, places in zip(self.launches, self._places, strict=True):
            launch(job.on(*[tensors[i] for i in places]))
        grad_query, grad_key, grad_value = parts
        grad_key_bias, grad_bias = made[:2]
        if self.shared_query:
            grad_query = grad_query.sum(0)
        if grad_bias.dim() > len(self.problem.batch) + 3:
            grad_bias = grad_bias.sum(0)
        return grad_query, grad_key, grad_value, grad_bias, grad_key_bias, made[-1]

    def _check(self, op: str) -> None:
        p = self.problem
        rows = (*p.batch, p.H, p.Nq)
        for arg, x in (("grad_out", self.grad_out), ("out", self.out)):
            if x.shape != (*rows, p.D) or x.dtype != p.query.dtype:
                fail(op, arg, f"{[*rows, p.D]} of query's dtype", f"{x.dtype} {list(x.shape)}")
        for arg, t in (("lse", self.lse), ("grad_lse", self.grad_lse)):
            if t is not None and (t.shape != rows or t.dtype != torch.float32 or not t.is_contiguous()):
                fail(op, arg, f"{list(rows)} of float32, contiguous", f"{t.dtype} {list(t.shape)}")
        if p.index is None:
            return
        if p.per_query and self.shared_query:
            fail(op, "query", "of key's batch where the index is per query", list(p.query.shape))
        lead, entries = p.index.shape[: -2 if p.per_query else -1], p.Nq * p.S if p.per_query else p.S
        for arg, t, size in (("start", self.start, p.Nk + 1), ("slots", self.slots, entries)):
            if t is None or t.shape != (*lead, size) or t.dtype != torch.int64 or not t.is_contiguous():
                got = "none" if t is None else f"{t.dtype} {list(t.shape)}"
                fail(op, arg, "as invert_index returned it for this index", got)

    def _parts(self, programs: int) -> tuple[int, int]:
        """How many parts, of how many sequences each, are summed one by one: about PROGRAMS programs in all."""
        sequences = self.problem.sequences
        turns = max(1, cdiv(sequences, max(1, PROGRAMS // programs)))
        return cdiv(sequences, turns), turns

    def _add(
        self,
        kernel: Any,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        index_strides: tuple[int, ...],
        sizes: tuple[int, ...],
        channels: int,
        constants: tuple[Any, ...],
        blocks: Blocks,
    ) -> None:
        p = self.problem
        logit_scale = self.scale * math.log2(math.e)
        rows = (
            *p.heads(p.query), *p.heads(p.key), *p.heads(p.value), *p.heads(self.grad_out), *p.heads(self.out),
            *p.heads(self.grad_query), *p.heads(self.grad_key),
        )  # fmt: skip
        self.launches.append(
            Launch(
                kernel,
                programs,
                tensors,
                (*rows, *p.bias_strides, *p.key_bias_strides, *index_strides, *sizes, self.scale, logit_scale),
                (p.D, channels, blocks.M, blocks.N, *constants),
                blocks.num_warps,
                blocks.num_stages,
                is_aligned(rows, *[t for t in tensors if t is not None]),
            )
        )

    def _dense(
        self,
        kernel: Any,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        turns: int,
        channels: int,
        constants: tuple[Any, ...],
        blocks: Blocks,
    ) -> None:
        """Launch one of the kernels that are not for an index per query."""
        p = self.problem
        start_stride = 0 if self.start is None or self.start.shape[0] == 1 else p.Nk + 1
        sizes = (p.sequences, turns, p.J, p.H, p.Nq, p.Nk, p.S)
        index_strides = (p.index_strides[0], start_stride)
        constants = (self.precision, *constants)
        self._add(kernel, programs * p.H, tensors, index_strides, sizes, channels, constants, blocks)

    def _fuse(self, blocks: Blocks, delta: bool) -> None:
        p = self.problem
        G, turns = sequences_at_once(p, blocks), 1
        if G > 1:
            blocks = blocks._replace(num_warps=min(4, G))
        groups = cdiv(p.sequences, G)
        if self.shared_query:
            G, (groups, turns) = 1, self._parts(p.H)
            self.grad_query = self.lse.new_empty(groups, p.H, p.Nq, p.D)
        if delta:
            self.delta = torch.empty_like(self.lse)
        tensors = (
            p.query, p.key, p.value, self.grad_out, self.out, self.lse, self.grad_lse, self.delta,
            self.grad_query, self.grad_key, self.grad_value, self._wanted(self.grad_key_bias),
            p.index, self.start, self.slots, p.bias, p.key_bias,
        )  # fmt: skip
        constants = (self.shared_query, G)
        self._dense(gathered_attention_fused_bwd_kernel, groups, tensors, turns, p.BLOCK_D, constants, blocks)

    def _split(self) -> None:
        p = self.problem
        float32, size = p.query.dtype == torch.float32, max(64, p.BLOCK_D)
        blocks, of_keys = _QUERIES[float32, size], _KEYS[float32, size]
        if p.bias is not None and size == 64:
            blocks, of_keys = _WITH_BIAS[float32]
        row_blocks, groups, turns = cdiv(p.Nq, blocks.M), p.sequences, 1
        if self.shared_query:
            groups, turns = self._parts(p.H * row_blocks)
            self.grad_query = self.lse.new_empty(groups, p.H, p.Nq, p.D)
        self.delta = torch.empty_like(self.lse)
        index = (p.index, self.start, self.slots, p.bias, p.key_bias)
        self._dense(
            gathered_attention_queries_bwd_kernel,
            groups * row_blocks,
            (
                p.query, p.key, p.value, self.grad_out, self.out, self.lse, self.grad_lse, self.delta,
                self.grad_query, *index,
            ),
            turns,
            p.BLOCK_D,
            (self.shared_query,),
            blocks,
        )  # fmt: skip
        self._dense(
            gathered_attention_keys_bwd_kernel,
            p.sequences * cdiv(p.S, of_keys.N),
            (
                p.query, p.key, p.value, self.grad_out, self.lse, self.delta,
                self.grad_key, self.grad_value, self._wanted(self.grad_key_bias), *index,
            ),
            1,
            p.BLOCK_D,
            (),
            of_keys,
        )  # fmt: skip

    def _bias(self) -> None:
        """grad_bias of every sequence, or where the bias has no batch its sum, in parts."""
        p = self.problem
        assert p.bias is not None
        blocks, channels = _BIAS[p.query.dtype == torch.float32]
        channels = min(channels, p.BLOCK_D)
        tiles, parts, turns = cdiv(p.Nq, blocks.M) * cdiv(p.S, blocks.N), p.sequences, 1
        if all(size == 1 for size in p.bias.shape[:-3]):
            parts, turns = self._parts(p.H * tiles)
            self.grad_bias = self.lse.new_empty(parts, *[1] * len(p.batch), p.H, p.Nq, p.S)
        else:
            self.grad_bias = self.lse.new_empty(*p.batch, p.H, p.Nq, p.S)
        tensors = (
            p.query, p.key, p.value, self.grad_out, self.lse, self.delta, self.grad_bias, p.index, p.bias, p.key_bias,
        )  # fmt: skip
        self._dense(gathered_attention_bias_bwd_kernel, parts * tiles, tensors, turns, channels, (), blocks)

    def _each(self) -> None:
        p = self.problem
        self.delta = torch.empty_like(self.lse)
        wide = p.sequences * max(p.Nq, p.Nk) >= 2**31 - 2048 or p.Nq * p.S >= 2**31
        constants = (tl.int64 if wide else tl.int32,)
        sizes = (p.sequences, p.J, p.H, p.Nq, p.Nk, p.S)
        queries, entries = each_blocks(p, p.S, 2048 if p.bias is None else 1024)
        blocks = Blocks(queries, entries, 1, 1)
        self._add(
            gathered_attention_each_queries_bwd_kernel,
            cdiv(p.sequences * p.Nq, blocks.M) * p.H,
            (
                p.query, p.key, p.value, self.grad_out, self.out, self.lse, self.grad_lse, self.delta,
                self.grad_query, self._wanted(self.grad_bias), p.index, p.bias, p.key_bias,
            ),
            p.index_strides,
            sizes,
            p.BLOCK_D,
            constants,
            blocks,
        )  # fmt: skip
        assert self.start is not None
        assert self.slots is not None
        keys, entries = each_blocks(p, cdiv(p.Nq * p.S, p.Nk), 1024)
        blocks = Blocks(entries, keys, 1, 1)
        self._add(
            gathered_attention_each_keys_bwd_kernel,
            cdiv(p.sequences * p.Nk, blocks.N) * p.H,
            (
                p.query, p.key, p.value, self.grad_out, self.lse, self.delta,
                self.grad_key, self.grad_value, self._wanted(self.grad_key_bias),
                self.start, self.slots, p.bias, p.key_bias,
            ),
            (*self._per_row(self.start), *self._per_row(self.slots)),
            sizes,
            p.BLOCK_D,
            constants,
            blocks,
        )  # fmt: skip

    def _per_row(self, t: Tensor) -> tuple[int, int, int]:
        """(b, j, h) strides of start or slots under an index per query."""
        b, *rest = strides(t)[:-1]
        j = rest.pop(0) if len(self.problem.batch) == 2 else 0
        return b, j, rest[0] if rest else 0

    def _wanted(self, grad: Tensor) -> Tensor | None:
        return grad if grad.dim() > 1 else None


@functools.lru_cache(maxsize=PLANS)
def _planned(op: str, options: tuple[Any, ...], of: Layouts, *_settings: object) -> Backward:
    return Backward(op, *without_data(of), *options)


def attention_backward(
    op: str, options: tuple[Any, ...], grad_out: Tensor, grad_lse: Tensor | None, *tensors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All gradients of a call; the tensors and the options are those of Backward, in its order."""
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    heads = [with_contiguous_last(t) for t in (grad_out, *tensors[:4]) if t is not None]
    given = (heads[0], grad_lse, *heads[1:], *tensors[4:])
    return _planned(op, options, layouts(*given), PROGRAMS, *settings()).on(*given)


def gathered_attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor | None,
    start: Tensor | None,
    slots: Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    need_bias: bool,
    need_key_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value, grad_bias, grad_key_bias)."""
    options = (scale, need_bias, need_key_bias)
    tensors = (grad_out, grad_lse, query, key, value, out, lse, index, start, slots, bias, key_bias)
    return attention_backward("gathered_attention", options, *tensors)[:5]


def gathered_attention_packed_bwd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """grad_qkv [B, N, (J,) 3, H, D] of a projection whose views query, key and value are."""
    tensors = (grad_out, None, query, key, value, out, lse, None, None, None, None, None)
    return attention_backward("gathered_attention", (scale, False, False, True), *tensors)[5]


def recovery_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_query, grad_key, grad_value); grad_query of a query without batch is float32, the sum over the batch."""
    tensors = (grad_out, None, query, key, value, out, lse, None, None, None, None, key_bias)
    return attention_backward("recovery_attention", (scale, False, False), *tensors)[:3]
