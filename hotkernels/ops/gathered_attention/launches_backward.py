"""Gradients of attention in Triton: checks a call, allocates its gradients, chooses kernels and blocks, launches."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...errors import fail
from ...launcher import Launch, cdiv, is_aligned, launch, next_power_of_2, shared_bytes
from .api import unpack
from .kernels_backward import (
    gathered_attention_bias_bwd_kernel,
    gathered_attention_fused_bwd_kernel,
    gathered_attention_keys_bwd_kernel,
    gathered_attention_per_query_keys_bwd_kernel,
    gathered_attention_per_query_queries_bwd_kernel,
    gathered_attention_queries_bwd_kernel,
)
from .launches import (
    PLANS,
    Blocks,
    Layouts,
    Problem,
    dot_precision,
    empty,
    layouts,
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


def queries_blocks(p: Problem) -> Blocks:
    """Blocks of the kernel that takes the gradient of the queries."""
    float32, size = p.query.dtype == torch.float32, max(64, p.BLOCK_D)
    return _WITH_BIAS[float32][0] if p.bias is not None and size == 64 else _QUERIES[float32, size]


def keys_blocks(p: Problem) -> Blocks:
    """Blocks of the kernel that takes those of keys and values."""
    float32, size = p.query.dtype == torch.float32, max(64, p.BLOCK_D)
    return _WITH_BIAS[float32][1] if p.bias is not None and size == 64 else _KEYS[float32, size]


def fused_blocks(p: Problem) -> Blocks | None:
    """Blocks in which all queries of a sequence fit; None if none do."""
    blocks = _blocks_of_all_queries(p)
    G = 1 if blocks is None else sequences_at_once(p, blocks)
    return blocks if blocks is None or G == 1 else blocks._replace(num_warps=min(4, G))


def _blocks_of_all_queries(p: Problem) -> Blocks | None:
    """For one sequence at a time."""
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
    # With 64 columns every product is a warp group's; whatever else needs registers leaves too few for so many. They
    # need up to 113 KB of shared memory, where GPUs without warp groups may have 99: sm_86, sm_89, sm_120.
    plain = p.index is None and p.query.dim() > 3 and p.D == p.BLOCK_D
    return Blocks(M, min(N, 64 if plain and p.shared_bytes >= 128 * 1024 else 32), 8, 1)


def sequences_at_once(p: Problem, blocks: Blocks) -> int:
    """How many sequences a program of the fused kernel takes: several where they are a few tokens."""
    elements = 1024 if p.query.dtype == torch.float32 else 2048
    return max(1, elements // (max(blocks[:2]) * max(p.BLOCK_D, *blocks[:2])))


def per_query_queries_blocks(p: Problem) -> Blocks:
    """Queries and slots at once under an index per query."""
    queries, slots = _rows_and_entries(p, p.S, 2048 if p.bias is None else 1024)
    return Blocks(queries, slots, 1, 1)


def per_query_keys_blocks(p: Problem) -> Blocks:
    """Slots that name a key, and keys, at once."""
    keys, slots = _rows_and_entries(p, cdiv(p.Nq * p.S, p.Nk), 1024)
    return Blocks(slots, keys, 1, 1)


def _rows_and_entries(p: Problem, count: int, elements: int) -> tuple[int, int]:
    """Of rows that have about `count` entries."""
    most = max(1, elements // p.BLOCK_D)
    entries = min(next_power_of_2(count), most, 32)
    return most // entries, entries


# The tensors of a backward pass, in Backward's order, by the names that kernels have for them: q_ptr and so on.
GIVEN = ("grad_out", "grad_lse", "q", "k", "v", "out", "lse", "index", "start", "slots", "bias", "key_bias")
PARTS = ("grad_q", "grad_k", "grad_v")
RESULTS = (*PARTS, "grad_bias", "grad_key_bias", "grad_qkv")
LSE = GIVEN.index("lse")


def as_read(given: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors given to a backward pass with strides that kernels read."""
    grad_out, grad_lse, query, key, value, out, *others = given
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    query, key, value, out = (with_contiguous_last(t) for t in (query, key, value, out))
    return with_contiguous_last(grad_out), grad_lse, query, key, value, out, *others


class Backward:
    """A backward pass worked out on tensors without data: arguments checked, gradients and launches prepared."""

    def __init__(
        self,
        op: str,
        given: Sequence[Tensor | None],
        shared_bytes: float,
        scale: float,
        need_bias: bool,
        need_key_bias: bool,
        packed: bool = False,  # grad_query, grad_key and grad_value in one [B, N, (J,) 3, H, D]
    ) -> None:
        read = as_read(given)
        self._copies = any(a is not b for a, b in zip(given, read, strict=True))
        t: dict[str, Any] = dict(zip(GIVEN, read, strict=True))
        self.tensors = t
        p = self.problem = Problem(op, t["q"], t["k"], t["v"], t["index"], t["bias"], t["key_bias"], shared_bytes)
        self.lse, self.scale, self.packed = t["lse"], scale, packed
        self.shared_query = p.query.dim() == 3
        self._check(op)
        if packed and p.Nq != p.Nk:
            fail(op, "query", f"of as many tokens as key, {p.Nk}", p.Nq)
        need_bias = need_bias and p.bias is not None
        self.precision = dot_precision(p.query.dtype)
        self._parted = [0] if self.shared_query else []  # which results are sums of parts
        self.jobs: list[tuple[Launch, list[str]]] = []  # each with its tensors' names

        if packed:
            t["grad_qkv"] = p.query.new_empty(p.B, p.Nq, *p.batch[1:], 3, p.H, p.D)
            t.update(zip(PARTS, unpack(t["grad_qkv"]), strict=True))
        else:
            t["grad_k"], t["grad_v"] = p.token_major(p.key, p.Nk), p.token_major(p.value, p.Nk)
            if not self.shared_query:
                t["grad_q"] = p.token_major(p.query, p.Nq)
        if need_key_bias:
            t["grad_key_bias"] = self.lse.new_empty(*p.batch, p.H, p.Nk)
        if p.per_query:
            self._per_query(need_bias)
        else:
            blocks = fused_blocks(p)
            if blocks is not None:
                self._fuse(blocks, delta=need_bias)
            else:
                self._split()
            if need_bias:
                self._bias()
        parts = PARTS if packed else ()
        made = [name for name in t if name not in (*GIVEN, *parts)]
        self._made = layouts([t[name] for name in made])
        place = {name: i for i, name in enumerate((*GIVEN, *made, *parts))}  # in `on`, where None is the last

        def taking(names: Sequence[str]) -> Callable[[list[Any]], tuple[Any, ...]]:
            return operator.itemgetter(*[place.get(name, -1) for name in names])

        self._launches = [(job, taking(names)) for job, names in self.jobs]
        self._results = taking(RESULTS)

    def on(self, given: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """Launch it all on these tensors; the gradients, and last grad_qkv, where they are its parts."""
        if self._copies:
            given = as_read(given)
        lse: Any = given[LSE]
        tensors: list[Any] = [*given, *empty(lse, self._made)]
        if self.packed:
            tensors += unpack(tensors[len(GIVEN)])
        tensors.append(None)
        for job, its in self._launches:
            launch(job, *its(tensors))
        *grads, grad_qkv = self._results(tensors)
        grads = [lse.new_empty(0) if grad is None else grad for grad in grads]
        for i in self._parted:
            grads[i] = grads[i].sum(0)
        return *grads, grad_qkv

    def _check(self, op: str) -> None:
        p = self.problem
        rows = (*p.batch, p.H, p.Nq)
        for arg, x in ((name, self.tensors[name]) for name in ("grad_out", "out")):
            if x.shape != (*rows, p.D) or x.dtype != p.query.dtype:
                fail(op, arg, f"{[*rows, p.D]} of query's dtype", f"{x.dtype} {list(x.shape)}")
        for arg, t in ((name, self.tensors[name]) for name in ("lse", "grad_lse")):
            if t is not None and (t.shape != rows or t.dtype != torch.float32 or not t.is_contiguous()):
                fail(op, arg, f"{list(rows)} of float32, contiguous", f"{t.dtype} {list(t.shape)}")
        if p.index is None:
            return
        if p.per_query and self.shared_query:
            fail(op, "query", "of key's batch where the index is per query", list(p.query.shape))
        lead, entries = p.index.shape[: -2 if p.per_query else -1], p.Nq * p.S if p.per_query else p.S
        for arg, size in (("start", p.Nk + 1), ("slots", entries)):
            t = self.tensors[arg]
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
        index_strides: tuple[int, ...],
        sizes: tuple[int, ...],
        channels: int,
        constants: tuple[Any, ...],
        blocks: Blocks,
    ) -> None:
        p, t = self.problem, self.tensors
        names = [name.removesuffix("_ptr") for name in kernel.arg_names if name.endswith("_ptr")]
        rows = [
            stride for name in ("q", "k", "v", "grad_out", "out", "grad_q", "grad_k") for stride in p.heads(t[name])
        ]
        logit_scale = self.scale * math.log2(math.e)
        job = Launch(
            kernel,
            programs,
            (*rows, *p.bias_strides, *p.key_bias_strides, *index_strides, *sizes, self.scale, logit_scale),
            (p.D, channels, blocks.M, blocks.N, *constants),
            blocks.num_warps,
            blocks.num_stages,
            is_aligned(rows, p.query.dtype),
        )
        self.jobs.append((job, names))

    def _add_shared(
        self,
        kernel: Any,
        programs: int,
        turns: int,
        channels: int,
        constants: tuple[Any, ...],
        blocks: Blocks,
    ) -> None:
        """Launch one of the kernels that are not for an index per query."""
        p, start = self.problem, self.tensors["start"]
        start_stride = 0 if start is None or start.shape[0] == 1 else p.Nk + 1
        sizes = (p.sequences, turns, p.J, p.H, p.Nq, p.Nk, p.S)
        index_strides = (p.index_strides[0], start_stride)
        self._add(kernel, programs * p.H, index_strides, sizes, channels, (self.precision, *constants), blocks)

    def _fuse(self, blocks: Blocks, delta: bool) -> None:
        p = self.problem
        G, turns = sequences_at_once(p, blocks), 1
        groups = cdiv(p.sequences, G)
        if self.shared_query:
            G, (groups, turns) = 1, self._parts(p.H)
            self.tensors["grad_q"] = self.lse.new_empty(groups, p.H, p.Nq, p.D)
        if delta:
            self.tensors["delta"] = torch.empty_like(self.lse)
        self._add_shared(gathered_attention_fused_bwd_kernel, groups, turns, p.BLOCK_D, (self.shared_query, G), blocks)

    def _split(self) -> None:
        p = self.problem
        blocks, of_keys = queries_blocks(p), keys_blocks(p)
        row_blocks, groups, turns = cdiv(p.Nq, blocks.M), p.sequences, 1
        if self.shared_query:
            groups, turns = self._parts(p.H * row_blocks)
            self.tensors["grad_q"] = self.lse.new_empty(groups, p.H, p.Nq, p.D)
        self.tensors["delta"] = torch.empty_like(self.lse)
        kernel, shared = gathered_attention_queries_bwd_kernel, (self.shared_query,)
        self._add_shared(kernel, groups * row_blocks, turns, p.BLOCK_D, shared, blocks)
        column_blocks = p.sequences * cdiv(p.S, of_keys.N)
        self._add_shared(gathered_attention_keys_bwd_kernel, column_blocks, 1, p.BLOCK_D, (), of_keys)

    def _bias(self) -> None:
        """grad_bias of every sequence, or where the bias has no batch its sum, in parts."""
        p = self.problem
        assert p.bias is not None
        blocks, channels = _BIAS[p.query.dtype == torch.float32]
        channels = min(channels, p.BLOCK_D)
        tiles, parts, turns = cdiv(p.Nq, blocks.M) * cdiv(p.S, blocks.N), p.sequences, 1
        shape: tuple[int, ...] = (*p.batch, p.H, p.Nq, p.S)
        if all(size == 1 for size in p.bias.shape[:-3]):
            parts, turns = self._parts(p.H * tiles)
            self._parted.append(3)
            shape = (parts, *[1] * len(p.batch), p.H, p.Nq, p.S)
        self.tensors["grad_bias"] = self.lse.new_empty(shape)
        self._add_shared(gathered_attention_bias_bwd_kernel, parts * tiles, turns, channels, (), blocks)

    def _per_query(self, need_bias: bool) -> None:
        p, t = self.problem, self.tensors
        if need_bias:
            t["grad_bias"] = self.lse.new_empty(*p.batch, p.H, p.Nq, p.S)
        t["delta"] = torch.empty_like(self.lse)
        wide = max(p.sequences * max(p.Nq, p.Nk), p.Nq * p.S) >= 2**31 - 2048  # they count to the end of a block
        constants = (tl.int64 if wide else tl.int32,)
        sizes = (p.sequences, p.J, p.H, p.Nq, p.Nk, p.S)
        blocks = per_query_queries_blocks(p)
        kernel, programs = gathered_attention_per_query_queries_bwd_kernel, cdiv(p.sequences * p.Nq, blocks.M) * p.H
        self._add(kernel, programs, p.index_strides, sizes, p.BLOCK_D, constants, blocks)
        blocks = per_query_keys_blocks(p)
        row_strides = (*self._per_row(t["start"]), *self._per_row(t["slots"]))
        kernel, programs = gathered_attention_per_query_keys_bwd_kernel, cdiv(p.sequences * p.Nk, blocks.N) * p.H
        self._add(kernel, programs, row_strides, sizes, p.BLOCK_D, constants, blocks)

    def _per_row(self, t: Tensor) -> tuple[int, int, int]:
        """(b, j, h) strides of start or slots under an index per query."""
        b, *rest = strides(t)[:-1]
        j = rest.pop(0) if len(self.problem.batch) == 2 else 0
        return b, j, rest[0] if rest else 0


@functools.lru_cache(maxsize=PLANS)
def _planned(op: str, options: tuple[Any, ...], of: Layouts, shared: float, *_settings: object) -> Backward:
    return Backward(op, without_data(of), shared, *options)


def attention_backward(op: str, options: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """All gradients of a call; what is given and the options are those of Backward, in its order."""
    query = given[2]
    shared = shared_bytes(query.get_device())
    return _planned(op, options, layouts(given), shared, PROGRAMS, dot_precision(query.dtype)).on(given)


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
    return attention_backward("gathered_attention", options, tensors)[:5]


def gathered_attention_packed_bwd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """grad_qkv [B, N, (J,) 3, H, D] of a projection whose views query, key and value are."""
    tensors = (grad_out, None, query, key, value, out, lse, None, None, None, None, None)
    return attention_backward("gathered_attention", (scale, False, False, True), tensors)[5]


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
    return attention_backward("recovery_attention", (scale, False, False), tensors)[:3]
