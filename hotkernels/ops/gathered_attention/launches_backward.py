"""Attention in Triton, backward: checks a call, allocates its gradients, chooses kernels and blocks, launches them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...errors import fail
from ...launcher import GPU, Launch, cdiv, gpu, launch, next_power_of_2, prepare
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
    ROWS,
    Blocks,
    Layouts,
    Problem,
    Table,
    blocks_of,
    dot_precision,
    empty,
    layouts,
    named,
    strides,
    with_contiguous_last,
    without_data,
)

PROGRAMS = 256  # of a kernel that sums over sequences: two for each multiprocessor of an H200

# Blocks of the queries kernel, chosen as the forward kernels' are. A bias' addresses need registers.
_QUERIES: Table = {
    ("half", 64): Blocks(128, 64, 8, 2),
    ("half with bias", 64): Blocks(64, 32, 4, 1),
    ("half", 128): Blocks(64, 32, 4, 1),
    ("half", 256): Blocks(32, 64, 8, 1),
    ("float32", 32): Blocks(64, 16, 4, 1),
    ("float32", 64): Blocks(32, 64, 8, 1),
    ("float32 with bias", 64): Blocks(32, 32, 4, 1),
    ("float32", 128): Blocks(16, 16, 4, 1),
    ("float32", 256): Blocks(16, 16, 8, 1),
}
_QUERIES_OF_WARP_GROUPS: Table = {
    ("half", 256): Blocks(64, 32, 4, 1),
    ("float32", 64): Blocks(64, 32, 4, 1),
    ("float32 with bias", 64): Blocks(64, 16, 4, 1),
    ("float32", 128): Blocks(16, 32, 4, 1),
}
# Blocks of the keys kernel.
_KEYS: Table = {
    ("half", 64): Blocks(64, 128, 8, 2),
    ("half with bias", 64): Blocks(32, 64, 8, 1),
    ("half", 128): Blocks(32, 64, 8, 1),
    ("half", 256): Blocks(32, 32, 8, 1),
    ("float32", 32): Blocks(16, 64, 4, 1),
    ("float32", 64): Blocks(64, 32, 8, 1),
    ("float32 with bias", 64): Blocks(32, 16, 4, 1),
    ("float32", 128): Blocks(32, 16, 8, 1),
    ("float32", 256): Blocks(16, 16, 8, 1),
}
_KEYS_OF_WARP_GROUPS: Table = {
    ("half with bias", 64): Blocks(32, 64, 4, 1),
    ("half", 128): Blocks(32, 64, 4, 1),
    ("half", 256): Blocks(32, 32, 4, 1),
    ("float32", 64): Blocks(32, 64, 4, 1),
    ("float32 with bias", 64): Blocks(16, 64, 4, 1),
}
# float32 -> blocks of the bias kernel, and BLOCK_C, the channels that it takes at a time.
_BIAS = {False: (Blocks(64, 32, 8, 1), 64), True: (Blocks(16, 32, 4, 1), 16)}


def queries_blocks(p: Problem) -> Blocks:
    """Blocks of the queries kernel."""
    return blocks_of(p, _QUERIES, _QUERIES_OF_WARP_GROUPS)


def keys_blocks(p: Problem) -> Blocks:
    """Blocks of the keys kernel."""
    return blocks_of(p, _KEYS, _KEYS_OF_WARP_GROUPS)


def fused_blocks(p: Problem) -> Blocks | None:
    """Blocks of the fused kernel, with all queries of a sequence; None where it does not serve the problem."""
    blocks = _blocks_of_all_queries(p)
    G = 1 if blocks is None else sequences_at_once(p, blocks)
    return blocks if blocks is None or G == 1 else blocks._replace(num_warps=min(4, G))


def _blocks_of_all_queries(p: Problem) -> Blocks | None:
    """For one sequence per program."""
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
    # With 64 columns every product is a warp group's; an index, a shared query or masked channels leave it too few
    # registers. 64 take up to 113 KB of shared memory; GPUs without warp groups may have 99: sm_86, sm_89, sm_120.
    plain = p.index is None and p.query.dim() > 3 and p.D == p.BLOCK_D
    return Blocks(M, min(N, 64 if plain and p.gpu.shared_bytes >= 128 * 1024 else 32), 8, 1)


def sequences_at_once(p: Problem, blocks: Blocks) -> int:
    """How many sequences a program of the fused kernel takes: several where they are short."""
    elements = 1024 if p.query.dtype == torch.float32 else 2048
    return max(1, elements // (max(blocks[:2]) * max(p.BLOCK_D, *blocks[:2])))


def per_query_queries_blocks(p: Problem) -> Blocks:
    """Queries (M) and slots (N) at a time under an index per query."""
    queries, slots = _rows_and_entries(p, p.S, 2048 if p.bias is None else 1024)
    return Blocks(queries, slots, 1, 1)


def per_query_keys_blocks(p: Problem) -> Blocks:
    """Slots that name a key (M), and keys (N), at a time."""
    keys, slots = _rows_and_entries(p, cdiv(p.Nq * p.S, p.Nk), 1024)
    return Blocks(slots, keys, 1, 1)


def _rows_and_entries(p: Problem, count: int, elements: int) -> tuple[int, int]:
    """Rows, and entries of each, in a tile of at most `elements`, if a row has about `count` entries."""
    most = max(1, elements // p.BLOCK_D)
    entries = min(next_power_of_2(count), most, 32)
    return most // entries, entries


class Given(NamedTuple):
    """The tensors that a backward pass is given. A kernel's parameter adds _ptr to the name."""

    grad_out: Tensor
    grad_lse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # tuple has a method of this name
    start: Tensor | None = None
    slots: Tensor | None = None
    bias: Tensor | None = None
    key_bias: Tensor | None = None

    def as_read(self) -> Given:
        """Copied where kernels cannot read their strides."""
        rows = {name: with_contiguous_last(getattr(self, name)) for name in ("grad_out", "q", "k", "v", "out")}
        return self._replace(grad_lse=None if self.grad_lse is None else self.grad_lse.contiguous(), **rows)


class Wanted(NamedTuple):
    """What a backward pass is asked for, beside the gradients of query, key and value."""

    scale: float  # of the logits
    bias: bool = False
    key_bias: bool = False
    packed: bool = False  # grad_query, grad_key and grad_value in one [B, N, (J,) 3, H, D]


PACKED = ("grad_q", "grad_k", "grad_v")  # views of grad_qkv, where there is one
RESULTS = (*PACKED, "grad_bias", "grad_key_bias", "grad_qkv")


class Backward:
    """The plan of a backward pass, made on tensors without data: arguments checked, gradients and launches prepared."""

    def __init__(
        self,
        op: str,
        wanted: Wanted,
        given: Given,
        gpu: GPU,
        programs: int,  # about so many of a kernel that sums over sequences
        precision: str,  # of matrix products
    ) -> None:
        read = given.as_read()
        self._copies = any(a is not b for a, b in zip(given, read, strict=True))
        self.tensors: dict[str, Any] = read._asdict()
        p = self.problem = Problem(op, read.q, read.k, read.v, read.index, read.bias, read.key_bias, gpu=gpu)
        self.lse, self.packed, self.programs, self.precision = read.lse, wanted.packed, programs, precision
        self.shared_query = p.query.dim() == 3
        self.by_slot = p.index is not None and not p.per_query and read.start is None and read.slots is None
        if self.by_slot and wanted.key_bias:
            fail(op, "start and slots", "given where key_bias needs a gradient", "none")
        self._check(op)
        if wanted.packed and p.Nq != p.Nk:
            fail(op, "query", f"of as many tokens as key, {p.Nk}", p.Nq)
        need_bias = wanted.bias and p.bias is not None
        self._partial_results = [RESULTS.index("grad_q")] if self.shared_query else []
        self.jobs: list[tuple[Launch, list[str]]] = []  # each with its tensors' names
        self.numbers = {
            **p.numbers,
            **p.row_strides("stride_g", read.grad_out),
            **p.row_strides("stride_o", read.out),
            **self._leading("start"),
            **self._leading("slots"),
            "scale": wanted.scale,
            "logit_scale": wanted.scale * math.log2(math.e),
        }

        t = self.tensors
        if wanted.packed:
            t["grad_qkv"] = p.query.new_empty(p.B, p.Nq, *p.batch[1:], 3, p.H, p.D)
            for name, view in zip(PACKED, unpack(t["grad_qkv"]), strict=True):
                self._make_rows(name, view)
        else:
            rows = p.S if self.by_slot else p.Nk
            self._make_rows("grad_k", p.token_major(p.key, rows))
            self._make_rows("grad_v", p.token_major(p.value, rows))
            if not self.shared_query:
                self._make_rows("grad_q", p.token_major(p.query, p.Nq))
        if wanted.key_bias:
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
        views = PACKED if wanted.packed else ()
        made = [name for name in t if name not in (*Given._fields, *views)]
        self._made = layouts([t[name] for name in made])
        order = (*Given._fields, *made, *views)
        place = {name: i for i, name in enumerate(order)}  # in the list of `on`, which ends with None

        def taking(names: Sequence[str]) -> Callable[[list[Any]], tuple[Any, ...]]:
            return operator.itemgetter(*[place.get(name, -1) for name in names])

        self._launches = [(job, taking(names)) for job, names in self.jobs]
        self._results = taking(RESULTS)

    def on(self, given: Given) -> tuple[Any, ...]:
        """Launch it on these tensors; returns RESULTS. Of those not made grad_qkv is None, and the others are empty."""
        if self._copies:
            given = given.as_read()
        lse = given.lse
        tensors: list[Any] = [*given, *empty(lse, self._made)]
        if self.packed:
            tensors += unpack(tensors[len(given)])
        tensors.append(None)
        for job, its in self._launches:
            launch(job, *its(tensors))
        *grads, grad_qkv = self._results(tensors)
        grads = [lse.new_empty(0) if grad is None else grad for grad in grads]
        for i in self._partial_results:
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
        if p.index is None or self.by_slot:
            return
        if p.per_query and self.shared_query:
            fail(op, "query", "of key's batch where the index is per query", list(p.query.shape))
        lead, entries = p.index.shape[: -2 if p.per_query else -1], p.Nq * p.S if p.per_query else p.S
        for arg, size in (("start", p.Nk + 1), ("slots", entries)):
            t = self.tensors[arg]
            if t is None or t.shape != (*lead, size) or t.dtype != torch.int64 or not t.is_contiguous():
                got = "none" if t is None else f"{t.dtype} {list(t.shape)}"
                fail(op, arg, "as invert_index returned it for this index", got)

    def _leading(self, name: str) -> dict[str, int]:
        """(b, j, h) strides of start or slots."""
        p = self.problem
        bjh = (0, 0, 0) if p.index is None or self.by_slot else p.leading(strides(self.tensors[name])[:-1])
        return named(f"{name}_stride_", "bjh", bjh)

    def _make_rows(self, name: str, t: Tensor) -> None:
        """A gradient of rows of channels."""
        self.tensors[name] = t
        self.numbers |= self.problem.row_strides(f"stride_{name}", t)

    def _partials(self, programs: int) -> tuple[int, int]:
        """(num_partials, sequences_per_program) of a sum over sequences with so many programs per partial sum."""
        sequences = self.problem.sequences
        sequences_per_program = max(1, cdiv(sequences, max(1, self.programs // max(1, programs))))
        return cdiv(sequences, sequences_per_program), sequences_per_program

    def _partials_of_query(self, programs: int) -> tuple[int, int]:
        """Make grad_query of a shared query, in partial sums; returns what _partials does."""
        p = self.problem
        num_partials, sequences_per_program = self._partials(programs)
        self._make_rows("grad_q", self.lse.new_empty(num_partials, p.H, p.Nq, p.D))
        return num_partials, sequences_per_program

    def _add(
        self, kernel: Any, programs: int, blocks: Blocks, sequences_per_program: int = 1, **constants: Any
    ) -> None:
        """Launch a kernel, with so many programs for each head."""
        p = self.problem
        numbers = {**self.numbers, "sequences_per_program": sequences_per_program}
        constants |= {"HEAD_DIM": p.D, "BLOCK_D": p.BLOCK_D, "BLOCK_M": blocks.M, "BLOCK_N": blocks.N}
        constants |= {"PRECISION": self.precision, "SHARED_QUERY": self.shared_query}
        dtype = p.query.dtype
        job = prepare(kernel, programs * p.H, numbers, constants, blocks.num_warps, blocks.num_stages, dtype, ROWS)
        self.jobs.append((job, [name.removesuffix("_ptr") for name in kernel.arg_names if name.endswith("_ptr")]))

    def _fuse(self, blocks: Blocks, delta: bool) -> None:
        p = self.problem
        if self.shared_query:
            G, (groups, sequences_per_program) = 1, self._partials_of_query(p.H)
        else:
            G = sequences_per_program = sequences_at_once(p, blocks)
            groups = cdiv(p.sequences, G)
        if delta:
            self.tensors["delta"] = torch.empty_like(self.lse)
        self._add(gathered_attention_fused_bwd_kernel, groups, blocks, sequences_per_program, G=G)

    def _split(self) -> None:
        p = self.problem
        blocks, of_keys = queries_blocks(p), keys_blocks(p)
        row_blocks, groups, sequences_per_program = cdiv(p.Nq, blocks.M), p.sequences, 1
        if self.shared_query:
            groups, sequences_per_program = self._partials_of_query(p.H * row_blocks)
        self.tensors["delta"] = torch.empty_like(self.lse)
        self._add(gathered_attention_queries_bwd_kernel, groups * row_blocks, blocks, sequences_per_program)
        self._add(gathered_attention_keys_bwd_kernel, p.sequences * cdiv(p.S, of_keys.N), of_keys)

    def _bias(self) -> None:
        """grad_bias of every sequence, or partial sums over sequences for a bias without batch."""
        p = self.problem
        assert p.bias is not None
        blocks, channels = _BIAS[p.query.dtype == torch.float32]
        tiles, groups, sequences_per_program = cdiv(p.Nq, blocks.M) * cdiv(p.S, blocks.N), p.sequences, 1
        shape: tuple[int, ...] = (*p.batch, p.H, p.Nq, p.S)
        if all(size == 1 for size in p.bias.shape[:-3]):
            groups, sequences_per_program = self._partials(p.H * tiles)
            self._partial_results.append(RESULTS.index("grad_bias"))
            shape = (groups, *[1] * len(p.batch), p.H, p.Nq, p.S)
        self.tensors["grad_bias"] = self.lse.new_empty(shape)
        kernel, BLOCK_C = gathered_attention_bias_bwd_kernel, min(channels, p.BLOCK_D)
        self._add(kernel, groups * tiles, blocks, sequences_per_program, BLOCK_C=BLOCK_C)

    def _per_query(self, need_bias: bool) -> None:
        p = self.problem
        if need_bias:
            self.tensors["grad_bias"] = self.lse.new_empty(*p.batch, p.H, p.Nq, p.S)
        self.tensors["delta"] = torch.empty_like(self.lse)
        # The kernels count queries, keys and entries up to the end of the last block.
        wide = max(p.sequences * max(p.Nq, p.Nk), p.Nq * p.S) >= 2**31 - 2048
        INT = tl.int64 if wide else tl.int32
        blocks = per_query_queries_blocks(p)
        programs = cdiv(p.sequences * p.Nq, blocks.M)
        self._add(gathered_attention_per_query_queries_bwd_kernel, programs, blocks, INT=INT)
        blocks = per_query_keys_blocks(p)
        programs = cdiv(p.sequences * p.Nk, blocks.N)
        self._add(gathered_attention_per_query_keys_bwd_kernel, programs, blocks, INT=INT)


@functools.lru_cache(maxsize=PLANS)
def _planned(op: str, wanted: Wanted, of: Layouts, gpu: GPU, programs: int, precision: str) -> Backward:
    return Backward(op, wanted, Given(*without_data(of)), gpu, programs, precision)


def attention_backward(op: str, wanted: Wanted, given: Given) -> tuple[Any, ...]:
    """RESULTS of a call."""
    of, precision = gpu(given.q.get_device()), dot_precision(given.q.dtype)
    return _planned(op, wanted, layouts(given), of, PROGRAMS, precision).on(given)


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
    given = Given(grad_out, grad_lse, query, key, value, out, lse, index, start, slots, bias, key_bias)
    return attention_backward("gathered_attention", Wanted(scale, need_bias, need_key_bias), given)[:5]


def gathered_attention_packed_bwd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """grad_qkv [B, N, (J,) 3, H, D] of a projection of which query, key and value are views."""
    given = Given(grad_out, None, query, key, value, out, lse)
    return attention_backward("gathered_attention", Wanted(scale, packed=True), given)[5]


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
    """(grad_query, grad_key, grad_value); grad_query of a query without batch is the batch's sum, in float32."""
    given = Given(grad_out, None, query, key, value, out, lse, key_bias=key_bias)
    return attention_backward("recovery_attention", Wanted(scale), given)[:3]
