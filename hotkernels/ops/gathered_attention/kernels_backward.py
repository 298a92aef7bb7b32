"""Gradients of attention in Triton: probabilities are recomputed from lse, and every sum has a fixed order.

With p = exp(scale * q k^T + bias + key_bias - lse) and delta = rowsum(grad_out * out) - grad_lse:
grad_logits = p * (grad_out v^T - delta), grad_value = p^T grad_out, grad_query = scale * grad_logits k and
grad_key = scale * grad_logits^T q. No program adds to what another one wrote.

Under a set index, columns are the entries of the inverted index, sorted by token, and a token's first entry stands for
all of them: their logits differ by the bias only, so p is summed over them first. Without an inverse, columns are the
set's slots, and so are the rows of grad_key and grad_value. In the kernels logits and lse are in base 2, as in the
forward pass.
"""

import triton
import triton.language as tl

from .kernels import (
    LOG2E,
    load_bias,
    load_key_bias,
    load_rows,
    product,
    rows_of_slots,
    sequence_of,
    store_rows,
    within,
)

# ---- what the kernels share ------------------------------------------------------------------------------------------
# Vectors over rows or columns are [N], or [G, N] in a program of G sequences; tiles have one dim more.


@triton.jit
def _per_row(x):
    """x[.., :, None]: broadcast a vector over rows along a tile's columns."""
    return tl.expand_dims(x, -1)


@triton.jit
def _per_column(x):
    """x[.., None, :]: broadcast a vector over columns along a tile's rows."""
    return tl.expand_dims(x, -2)


@triton.jit
def _transposed(x):
    """A tile, or each of G tiles, with rows and columns swapped."""
    if len(x.shape) == 2:
        return tl.trans(x)
    else:
        return tl.permute(x, (0, 2, 1))


@triton.jit
def _rows_of(base, G: tl.constexpr):
    """The base pointers [G, 1] of a program's sequences as [G, 1, 1], for tiles of offsets; a single one as it is."""
    return base if G == 1 else tl.expand_dims(base, -1)


@triton.jit
def _in_batch(valid, sequence, sequences, G: tl.constexpr):
    """valid, but not for sequences beyond the last one, which a program of G may have."""
    return valid if G == 1 else valid & (sequence < sequences)


@triton.jit
def _load_queries(
    base, i, sequence, sequences, Nq, stride_n, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Rows i of the queries; those beyond the last one repeat it, and lse = inf makes their probabilities 0.

    Zeros instead would give NaN where a key is infinite, and masking all probabilities 10 % more instructions.
    """
    exists = _in_batch(tl.full(i.shape, True, tl.int1), sequence, sequences, G)
    return load_rows(_rows_of(base, G), tl.minimum(i, Nq - 1), exists, stride_n, HEAD_DIM, BLOCK_D)


@triton.jit
def _load_lse(lse_ptr, stat, valid):
    """lse in base 2, and inf for a row that attends to nothing, which makes its probabilities 0."""
    lse = tl.load(lse_ptr + stat, mask=valid, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _delta(grad_out, out, grad_lse_ptr, stat, valid):
    """rowsum(grad_out * out) - grad_lse."""
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), -1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + stat, mask=valid, other=0.0)
    return delta


@triton.jit
def _tokens(entry, valid, S, Nk, index_ptr, start_ptr, slots_ptr):
    """Per column: its token, whether that is in [0, Nk) and this its first entry, and how many slots name it."""
    if index_ptr is None:
        return entry, valid, 1
    elif slots_ptr is None:
        token, valid = rows_of_slots(index_ptr + entry, entry, valid, Nk)
        return token, valid, 1
    else:
        slot = tl.load(slots_ptr + entry, mask=valid, other=-1)
        valid &= within(slot, S)
        token, valid = rows_of_slots(index_ptr + slot, slot, valid, Nk)
        begin = tl.load(start_ptr + token, mask=valid, other=-1)
        end = tl.load(start_ptr + token + 1, mask=valid, other=0)
        return token, valid & (begin == entry), tl.minimum(end, S) - entry


@triton.jit
def _of_attended(grads, attended, key_bias_ptr):
    """Gradients of keys, 0 for masked ones, whose sums hold 0 * NaN where a query is NaN."""
    if key_bias_ptr is None:
        return grads
    else:
        return tl.where(attended, grads, 0.0)


@triton.jit
def _probabilities(logits, lse, row_valid, attended, entry, copies, bias_rows, stride_s, slots_ptr, S):
    """A tile of exp2(logits + bias - lse), summed over the slots of a column's token; all arguments broadcast to it."""
    if bias_rows is None:
        p = tl.where(attended, tl.exp2(logits - lse), 0.0)
        if slots_ptr is not None:
            p *= copies.to(tl.float32)
    elif slots_ptr is None:
        bias = load_bias(bias_rows, entry, attended & row_valid, stride_s)
        p = tl.where(attended, tl.exp2(logits + bias - lse), 0.0)
    else:
        p = tl.zeros_like(logits)
        for copy in range(0, tl.max(tl.where(attended, copies, 0)).to(tl.int32)):
            valid = attended & (copy < copies)
            slot = tl.load(slots_ptr + entry + copy, mask=valid, other=-1)
            valid &= within(slot, S)
            bias = load_bias(bias_rows, slot, valid & row_valid, stride_s)
            p += tl.where(valid, tl.exp2(logits + bias - lse), 0.0)
    return p


@triton.jit
def _clear_unnamed(
    grad_k_base, grad_v_base, grad_key_bias_base, start_base, token, valid, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Store zeros to the gradients of those of these tokens that no slot names."""
    begin = tl.load(start_base + token, mask=valid, other=0)
    valid &= begin == tl.load(start_base + token + 1, mask=valid, other=-1)
    zeros = tl.zeros([1, BLOCK_D], tl.float32)
    store_rows(_rows_of(grad_k_base, G), token, valid, stride_n, zeros, HEAD_DIM, BLOCK_D)
    store_rows(_rows_of(grad_v_base, G), token, valid, stride_n, zeros, HEAD_DIM, BLOCK_D)
    if grad_key_bias_base is not None:
        tl.store(grad_key_bias_base + token, 0.0, mask=valid)


# ---- dense and set index ---------------------------------------------------------------------------------------------


@triton.jit
def gathered_attention_fused_bwd_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr,
    grad_key_bias_ptr, index_ptr, start_ptr, slots_ptr, bias_ptr, key_bias_ptr,
    stride_qb: tl.int64, stride_qj: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kj: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vj: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_gb: tl.int64, stride_gj: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    stride_ob: tl.int64, stride_oj: tl.int64, stride_oh: tl.int64, stride_on: tl.int64,
    stride_grad_qb: tl.int64, stride_grad_qj: tl.int64, stride_grad_qh: tl.int64, stride_grad_qn: tl.int64,
    stride_grad_kb: tl.int64, stride_grad_kj: tl.int64, stride_grad_kh: tl.int64, stride_grad_kn: tl.int64,
    bias_stride_b: tl.int64, bias_stride_j: tl.int64, bias_stride_h: tl.int64, bias_stride_q: tl.int64,
    bias_stride_s: tl.int64, key_bias_stride_b: tl.int64, key_bias_stride_j: tl.int64, key_bias_stride_n: tl.int64,
    index_stride_b: tl.int64, start_stride_b: tl.int64,
    sequences: tl.int32, sequences_per_program: tl.int32,
    J: tl.int32, H: tl.int32, Nq: tl.int32, Nk: tl.int32, S: tl.int32,
    scale: tl.float32, logit_scale: tl.float32,  # logit_scale = scale times log2(e)
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SHARED_QUERY: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """One program per (G sequences, head): all queries at once, keys block by block, every probability computed once.

    With a shared query, one program per (sequences_per_program sequences, head) takes them one at a time and stores
    their sum, one of the partial sums in grad_query [partials, H, Nq, D].
    """
    h = (tl.program_id(0) % H).to(tl.int64)
    group = tl.program_id(0) // H
    if G == 1:
        i, column, member = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), 0
        grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        i, column = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[None, :]
        member = tl.arange(0, G)[:, None]
        grad_q = tl.zeros([G, BLOCK_M, BLOCK_D], tl.float32)
    i = i.to(tl.int64)
    if SHARED_QUERY:
        first = group * sequences_per_program
        count = tl.minimum(sequences_per_program, sequences - first)
        q = _load_queries(q_ptr + h * stride_qh, i, 0, 1, Nq, stride_qn, HEAD_DIM, BLOCK_D, G)
    else:
        first = group * G
        count = 1
    for nth in range(0, count):
        sequence = first + nth + member
        b, j = sequence_of(sequence, J)
        row_valid = _in_batch(i < Nq, sequence, sequences, G)
        stat = (sequence.to(tl.int64) * H + h) * Nq + i
        if not SHARED_QUERY:
            q_base = q_ptr + b * stride_qb + j * stride_qj + h * stride_qh
            q = _load_queries(q_base, i, sequence, sequences, Nq, stride_qn, HEAD_DIM, BLOCK_D, G)
        grad_out_base = grad_out_ptr + b * stride_gb + j * stride_gj + h * stride_gh
        out_base = out_ptr + b * stride_ob + j * stride_oj + h * stride_oh
        grad_out = load_rows(_rows_of(grad_out_base, G), i, row_valid, stride_gn, HEAD_DIM, BLOCK_D)
        out = load_rows(_rows_of(out_base, G), i, row_valid, stride_on, HEAD_DIM, BLOCK_D)
        delta = _delta(grad_out, out, grad_lse_ptr, stat, row_valid)
        if delta_ptr is not None:
            tl.store(delta_ptr + stat, delta, mask=row_valid)
        lse = _load_lse(lse_ptr, stat, row_valid)
        k_base = k_ptr + b * stride_kb + j * stride_kj + h * stride_kh
        v_base = v_ptr + b * stride_vb + j * stride_vj + h * stride_vh
        grad_at = b * stride_grad_kb + j * stride_grad_kj + h * stride_grad_kh
        grad_k_base, grad_v_base = grad_k_ptr + grad_at, grad_v_ptr + grad_at
        index_base = None if index_ptr is None else index_ptr + b * index_stride_b
        slots_base = None if slots_ptr is None else slots_ptr + b * index_stride_b
        start_base = None if slots_ptr is None else start_ptr + b * start_stride_b
        bias_rows = None
        if bias_ptr is not None:
            bias_rows = bias_ptr + b * bias_stride_b + j * bias_stride_j + h * bias_stride_h + i * bias_stride_q
            bias_rows = _per_row(bias_rows)
        key_bias_base = None if key_bias_ptr is None else key_bias_ptr + b * key_bias_stride_b + j * key_bias_stride_j
        grad_key_bias_base = None
        if grad_key_bias_ptr is not None:
            grad_key_bias_base = grad_key_bias_ptr + (sequence.to(tl.int64) * H + h) * Nk
        for block in range(0, S, BLOCK_N):
            entry = (block + column).to(tl.int64)
            valid = _in_batch(entry < S, sequence, sequences, G)
            token, valid, copies = _tokens(entry, valid, S, Nk, index_base, start_base, slots_base)
            row = entry if slots_ptr is None else token
            key_bias, attended = load_key_bias(key_bias_base, token, valid, key_bias_stride_n)
            k = load_rows(_rows_of(k_base, G), token, attended, stride_kn, HEAD_DIM, BLOCK_D)
            v = load_rows(_rows_of(v_base, G), token, attended, stride_vn, HEAD_DIM, BLOCK_D)
            logits = product(q, _transposed(k), None, PRECISION) * logit_scale
            if key_bias_ptr is not None:
                logits += _per_column(key_bias)
            p = _probabilities(
                logits, _per_row(lse), _per_row(row_valid), _per_column(attended), _per_column(entry),
                1 if slots_ptr is None else _per_column(copies), bias_rows, bias_stride_s,
                None if slots_ptr is None else _rows_of(slots_base, G), S,
            )  # fmt: skip
            grad_v = product(_transposed(p.to(q.dtype)), grad_out, None, PRECISION)
            grad_v = _of_attended(grad_v, _per_row(attended), key_bias_ptr)
            store_rows(_rows_of(grad_v_base, G), row, valid, stride_grad_kn, grad_v, HEAD_DIM, BLOCK_D)
            grad_p = product(grad_out, _transposed(v), None, PRECISION)
            grad_logits = p * (grad_p - _per_row(delta))
            if grad_key_bias_ptr is not None:
                grad_key_bias = _of_attended(tl.sum(grad_logits, -2), attended, key_bias_ptr)
                tl.store(grad_key_bias_base + token, grad_key_bias, mask=valid)
            grad_logits = grad_logits.to(q.dtype)
            grad_k = product(_transposed(grad_logits), q, None, PRECISION) * scale
            grad_k = _of_attended(grad_k, _per_row(attended), key_bias_ptr)
            store_rows(_rows_of(grad_k_base, G), row, valid, stride_grad_kn, grad_k, HEAD_DIM, BLOCK_D)
            grad_q = product(grad_logits, k, grad_q, PRECISION)
        if slots_ptr is not None:
            for block in range(0, Nk, BLOCK_N):
                token = (block + column).to(tl.int64)
                _clear_unnamed(
                    grad_k_base, grad_v_base, grad_key_bias_base, start_base, token,
                    _in_batch(token < Nk, sequence, sequences, G), stride_grad_kn, HEAD_DIM, BLOCK_D, G,
                )  # fmt: skip
    if SHARED_QUERY:
        b, j, row_valid = group.to(tl.int64), 0, i < Nq
    else:
        b, j = sequence_of(first + member, J)
        row_valid = _in_batch(i < Nq, first + member, sequences, G)
    grad_q_base = grad_q_ptr + b * stride_grad_qb + j * stride_grad_qj + h * stride_grad_qh
    store_rows(_rows_of(grad_q_base, G), i, row_valid, stride_grad_qn, grad_q * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def gathered_attention_queries_bwd_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, grad_q_ptr, index_ptr, start_ptr,
    slots_ptr, bias_ptr, key_bias_ptr,
    stride_qb: tl.int64, stride_qj: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kj: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vj: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_gb: tl.int64, stride_gj: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    stride_ob: tl.int64, stride_oj: tl.int64, stride_oh: tl.int64, stride_on: tl.int64,
    stride_grad_qb: tl.int64, stride_grad_qj: tl.int64, stride_grad_qh: tl.int64, stride_grad_qn: tl.int64,
    bias_stride_b: tl.int64, bias_stride_j: tl.int64, bias_stride_h: tl.int64, bias_stride_q: tl.int64,
    bias_stride_s: tl.int64, key_bias_stride_b: tl.int64, key_bias_stride_j: tl.int64, key_bias_stride_n: tl.int64,
    index_stride_b: tl.int64, start_stride_b: tl.int64,
    sequences: tl.int32, sequences_per_program: tl.int32,
    J: tl.int32, H: tl.int32, Nq: tl.int32, Nk: tl.int32, S: tl.int32,
    scale: tl.float32, logit_scale: tl.float32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, SHARED_QUERY: tl.constexpr,
):  # fmt: skip
    """grad_query and delta: one program per (sequence, block of queries, head).

    With a shared query, a program takes sequences_per_program sequences, as in the fused kernel.
    """
    h = (tl.program_id(0) % H).to(tl.int64)
    rest = tl.program_id(0) // H
    blocks = tl.cdiv(Nq, BLOCK_M)
    i = (rest % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    group = rest // blocks
    row_valid = i < Nq
    if SHARED_QUERY:
        first = group * sequences_per_program
        count = tl.minimum(sequences_per_program, sequences - first)
        q = load_rows(q_ptr + h * stride_qh, i, row_valid, stride_qn, HEAD_DIM, BLOCK_D)
    else:
        first = group
        count = 1
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for nth in range(0, count):
        sequence = first + nth
        b, j = sequence_of(sequence, J)
        stat = (sequence.to(tl.int64) * H + h) * Nq + i
        if not SHARED_QUERY:
            q_base = q_ptr + b * stride_qb + j * stride_qj + h * stride_qh
            q = load_rows(q_base, i, row_valid, stride_qn, HEAD_DIM, BLOCK_D)
        grad_out_base = grad_out_ptr + b * stride_gb + j * stride_gj + h * stride_gh
        out_base = out_ptr + b * stride_ob + j * stride_oj + h * stride_oh
        grad_out = load_rows(grad_out_base, i, row_valid, stride_gn, HEAD_DIM, BLOCK_D)
        out = load_rows(out_base, i, row_valid, stride_on, HEAD_DIM, BLOCK_D)
        delta = _delta(grad_out, out, grad_lse_ptr, stat, row_valid)
        tl.store(delta_ptr + stat, delta, mask=row_valid)
        lse = _load_lse(lse_ptr, stat, row_valid)
        k_base = k_ptr + b * stride_kb + j * stride_kj + h * stride_kh
        v_base = v_ptr + b * stride_vb + j * stride_vj + h * stride_vh
        index_base = None if index_ptr is None else index_ptr + b * index_stride_b
        slots_base = None if slots_ptr is None else slots_ptr + b * index_stride_b
        start_base = None if slots_ptr is None else start_ptr + b * start_stride_b
        bias_rows = None
        if bias_ptr is not None:
            bias_rows = bias_ptr + b * bias_stride_b + j * bias_stride_j + h * bias_stride_h + i * bias_stride_q
            bias_rows = bias_rows[:, None]
        key_bias_base = None if key_bias_ptr is None else key_bias_ptr + b * key_bias_stride_b + j * key_bias_stride_j
        for block in range(0, S, BLOCK_N):
            entry = (block + tl.arange(0, BLOCK_N)).to(tl.int64)
            token, valid, copies = _tokens(entry, entry < S, S, Nk, index_base, start_base, slots_base)
            key_bias, attended = load_key_bias(key_bias_base, token, valid, key_bias_stride_n)
            k = load_rows(k_base, token, attended, stride_kn, HEAD_DIM, BLOCK_D)
            v = load_rows(v_base, token, attended, stride_vn, HEAD_DIM, BLOCK_D)
            logits = product(q, tl.trans(k), None, PRECISION) * logit_scale
            if key_bias_ptr is not None:
                logits += key_bias[None, :]
            p = _probabilities(
                logits, lse[:, None], row_valid[:, None], attended[None, :], entry[None, :],
                1 if slots_ptr is None else copies[None, :], bias_rows, bias_stride_s, slots_base, S,
            )  # fmt: skip
            grad_p = product(grad_out, tl.trans(v), None, PRECISION)
            grad_logits = p * (grad_p - delta[:, None])
            grad_q = product(grad_logits.to(q.dtype), k, grad_q, PRECISION)
    if SHARED_QUERY:
        b, j = group.to(tl.int64), 0
    else:
        b, j = sequence_of(first, J)
    grad_q_base = grad_q_ptr + b * stride_grad_qb + j * stride_grad_qj + h * stride_grad_qh
    store_rows(grad_q_base, i, row_valid, stride_grad_qn, grad_q * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def gathered_attention_keys_bwd_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, grad_key_bias_ptr, index_ptr,
    start_ptr, slots_ptr, bias_ptr, key_bias_ptr,
    stride_qb: tl.int64, stride_qj: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kj: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vj: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_gb: tl.int64, stride_gj: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    stride_grad_kb: tl.int64, stride_grad_kj: tl.int64, stride_grad_kh: tl.int64, stride_grad_kn: tl.int64,
    bias_stride_b: tl.int64, bias_stride_j: tl.int64, bias_stride_h: tl.int64, bias_stride_q: tl.int64,
    bias_stride_s: tl.int64, key_bias_stride_b: tl.int64, key_bias_stride_j: tl.int64, key_bias_stride_n: tl.int64,
    index_stride_b: tl.int64, start_stride_b: tl.int64,
    J: tl.int32, H: tl.int32, Nq: tl.int32, Nk: tl.int32, S: tl.int32,
    scale: tl.float32, logit_scale: tl.float32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value and grad_key_bias: one program per (sequence, block of S, head)."""
    h = (tl.program_id(0) % H).to(tl.int64)
    rest = tl.program_id(0) // H
    blocks = tl.cdiv(S, BLOCK_N)
    entry = (rest % blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    sequence = rest // blocks
    b, j = sequence_of(sequence, J)
    index_base = None if index_ptr is None else index_ptr + b * index_stride_b
    slots_base = None if slots_ptr is None else slots_ptr + b * index_stride_b
    start_base = None if slots_ptr is None else start_ptr + b * start_stride_b
    key_bias_base = None if key_bias_ptr is None else key_bias_ptr + b * key_bias_stride_b + j * key_bias_stride_j
    token, valid, copies = _tokens(entry, entry < S, S, Nk, index_base, start_base, slots_base)
    row = entry if slots_ptr is None else token
    key_bias, attended = load_key_bias(key_bias_base, token, valid, key_bias_stride_n)
    k_base = k_ptr + b * stride_kb + j * stride_kj + h * stride_kh
    v_base = v_ptr + b * stride_vb + j * stride_vj + h * stride_vh
    k = load_rows(k_base, token, attended, stride_kn, HEAD_DIM, BLOCK_D)
    v = load_rows(v_base, token, attended, stride_vn, HEAD_DIM, BLOCK_D)
    q_base = q_ptr + b * stride_qb + j * stride_qj + h * stride_qh
    grad_out_base = grad_out_ptr + b * stride_gb + j * stride_gj + h * stride_gh
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_key_bias = tl.zeros([BLOCK_N], tl.float32)
    for block in range(0, Nq, BLOCK_M):
        i = (block + tl.arange(0, BLOCK_M)).to(tl.int64)
        row_valid = i < Nq
        stat = (sequence.to(tl.int64) * H + h) * Nq + i
        q = _load_queries(q_base, i, 0, 1, Nq, stride_qn, HEAD_DIM, BLOCK_D, 1)
        grad_out = load_rows(grad_out_base, i, row_valid, stride_gn, HEAD_DIM, BLOCK_D)
        lse = _load_lse(lse_ptr, stat, row_valid)
        delta = tl.load(delta_ptr + stat, mask=row_valid, other=0.0)
        bias_rows = None
        if bias_ptr is not None:
            bias_rows = bias_ptr + b * bias_stride_b + j * bias_stride_j + h * bias_stride_h + i * bias_stride_q
            bias_rows = bias_rows[None, :]
        logits = product(k, tl.trans(q), None, PRECISION) * logit_scale
        if key_bias_ptr is not None:
            logits += key_bias[:, None]
        p = _probabilities(
            logits, lse[None, :], row_valid[None, :], attended[:, None], entry[:, None],
            1 if slots_ptr is None else copies[:, None], bias_rows, bias_stride_s, slots_base, S,
        )  # fmt: skip
        grad_v = product(p.to(q.dtype), grad_out, grad_v, PRECISION)
        grad_p = product(v, tl.trans(grad_out), None, PRECISION)
        grad_logits = p * (grad_p - delta[None, :])
        if grad_key_bias_ptr is not None:
            grad_key_bias += tl.sum(grad_logits, -1)
        grad_k = product(grad_logits.to(q.dtype), q, grad_k, PRECISION)
    grad_v = _of_attended(grad_v, attended[:, None], key_bias_ptr)
    grad_k = _of_attended(grad_k, attended[:, None], key_bias_ptr)
    grad_at = b * stride_grad_kb + j * stride_grad_kj + h * stride_grad_kh
    grad_k_base, grad_v_base = grad_k_ptr + grad_at, grad_v_ptr + grad_at
    store_rows(grad_v_base, row, valid, stride_grad_kn, grad_v, HEAD_DIM, BLOCK_D)
    store_rows(grad_k_base, row, valid, stride_grad_kn, grad_k * scale, HEAD_DIM, BLOCK_D)
    grad_key_bias_base = None
    if grad_key_bias_ptr is not None:
        grad_key_bias_base = grad_key_bias_ptr + (sequence.to(tl.int64) * H + h) * Nk
        tl.store(grad_key_bias_base + token, _of_attended(grad_key_bias, attended, key_bias_ptr), mask=valid)
    if slots_ptr is not None:
        for block in range(0, (Nk - 1) // (blocks * BLOCK_N) + 1):  # range(0, Nk, blocks * BLOCK_N) could pass 2^31
            token = block * (blocks * BLOCK_N) + entry
            _clear_unnamed(
                grad_k_base, grad_v_base, grad_key_bias_base, start_base, token,
                token < Nk, stride_grad_kn, HEAD_DIM, BLOCK_D, 1,
            )  # fmt: skip


@triton.jit
def gathered_attention_bias_bwd_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_bias_ptr, index_ptr, bias_ptr, key_bias_ptr,
    stride_qb: tl.int64, stride_qj: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kj: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vj: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_gb: tl.int64, stride_gj: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    bias_stride_b: tl.int64, bias_stride_j: tl.int64, bias_stride_h: tl.int64, bias_stride_q: tl.int64,
    bias_stride_s: tl.int64, key_bias_stride_b: tl.int64, key_bias_stride_j: tl.int64, key_bias_stride_n: tl.int64,
    index_stride_b: tl.int64,
    sequences: tl.int32, sequences_per_program: tl.int32,
    J: tl.int32, H: tl.int32, Nq: tl.int32, Nk: tl.int32, S: tl.int32,
    logit_scale: tl.float32,
    HEAD_DIM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_bias [partials, H, Nq, slots]: one program per (sequences_per_program sequences, tile of logits, head).

    Channels are taken BLOCK_C at a time, since both matrix products sum over them.
    """
    h = (tl.program_id(0) % H).to(tl.int64)
    rest = tl.program_id(0) // H
    column_blocks, row_blocks = tl.cdiv(S, BLOCK_N), tl.cdiv(Nq, BLOCK_M)
    slot = (rest % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rest = rest // column_blocks
    i = (rest % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    partial = rest // row_blocks
    row_valid = i < Nq
    grad_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = partial * sequences_per_program
    for nth in range(0, tl.minimum(sequences_per_program, sequences - first)):
        sequence = first + nth
        b, j = sequence_of(sequence, J)
        index_at = None if index_ptr is None else index_ptr + b * index_stride_b + slot
        token, valid = rows_of_slots(index_at, slot, slot < S, Nk)
        key_bias_base = None if key_bias_ptr is None else key_bias_ptr + b * key_bias_stride_b + j * key_bias_stride_j
        key_bias, attended = load_key_bias(key_bias_base, token, valid, key_bias_stride_n)
        q_base = q_ptr + b * stride_qb + j * stride_qj + h * stride_qh
        k_base = k_ptr + b * stride_kb + j * stride_kj + h * stride_kh
        v_base = v_ptr + b * stride_vb + j * stride_vj + h * stride_vh
        grad_out_base = grad_out_ptr + b * stride_gb + j * stride_gj + h * stride_gh
        bias_rows = bias_ptr + b * bias_stride_b + j * bias_stride_j + h * bias_stride_h + i * bias_stride_q
        stat = (sequence.to(tl.int64) * H + h) * Nq + i
        lse = _load_lse(lse_ptr, stat, row_valid)
        delta = tl.load(delta_ptr + stat, mask=row_valid, other=0.0)
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        grad_p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for c in tl.static_range(0, HEAD_DIM, BLOCK_C):
            q = load_rows(q_base + c, i, row_valid, stride_qn, HEAD_DIM - c, BLOCK_C)
            k = load_rows(k_base + c, token, attended, stride_kn, HEAD_DIM - c, BLOCK_C)
            logits = product(q, tl.trans(k), logits, PRECISION)
            grad_out = load_rows(grad_out_base + c, i, row_valid, stride_gn, HEAD_DIM - c, BLOCK_C)
            v = load_rows(v_base + c, token, attended, stride_vn, HEAD_DIM - c, BLOCK_C)
            grad_p = product(grad_out, tl.trans(v), grad_p, PRECISION)
        logits *= logit_scale
        if key_bias_ptr is not None:
            logits += key_bias[None, :]
        p = _probabilities(
            logits, lse[:, None], row_valid[:, None], attended[None, :], slot[None, :],
            1, bias_rows[:, None], bias_stride_s, None, S,
        )  # fmt: skip
        grad_logits = p * (grad_p - delta[:, None])
        grad_bias += tl.where(attended[None, :], grad_logits, 0.0)  # not 0 * NaN, where a query is NaN
    grad_rows = grad_bias_ptr + ((partial.to(tl.int64) * H + h) * Nq + i) * S
    mask = row_valid[:, None] & (slot < S)[None, :]
    tl.store(grad_rows[:, None] + slot[None, :], grad_bias, mask=mask)


# ---- index per query -------------------------------------------------------------------------------------------------


@triton.jit
def gathered_attention_per_query_queries_bwd_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, out_ptr, lse_ptr, grad_lse_ptr, delta_ptr, grad_q_ptr, grad_bias_ptr, index_ptr,
    bias_ptr, key_bias_ptr,
    stride_qb: tl.int64, stride_qj: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kj: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vj: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_gb: tl.int64, stride_gj: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    stride_ob: tl.int64, stride_oj: tl.int64, stride_oh: tl.int64, stride_on: tl.int64,
    stride_grad_qb: tl.int64, stride_grad_qj: tl.int64, stride_grad_qh: tl.int64, stride_grad_qn: tl.int64,
    bias_stride_b: tl.int64, bias_stride_j: tl.int64, bias_stride_h: tl.int64, bias_stride_q: tl.int64,
    bias_stride_s: tl.int64, key_bias_stride_b: tl.int64, key_bias_stride_j: tl.int64, key_bias_stride_n: tl.int64,
    index_stride_b: tl.int64, index_stride_j: tl.int64, index_stride_h: tl.int64, index_stride_q: tl.int64,
    sequences: tl.int32, J: tl.int32, H: tl.int32, Nq: tl.int32, Nk: tl.int32, S: tl.int32,
    scale: tl.float32, logit_scale: tl.float32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INT: tl.constexpr,
):  # fmt: skip
    """grad_query, grad_bias and delta: one program per (block of all sequences' queries, head)."""
    h = (tl.program_id(0) % H).to(tl.int64)
    row = (tl.program_id(0) // H).to(INT) * BLOCK_M + tl.arange(0, BLOCK_M)
    sequence = row // Nq
    i = (row - sequence * Nq).to(tl.int64)
    row_valid = sequence < sequences
    b, j = sequence_of(sequence, J)
    stat = (sequence.to(tl.int64) * H + h) * Nq + i
    q_base = (q_ptr + b * stride_qb + j * stride_qj + h * stride_qh)[:, None]
    grad_out_base = (grad_out_ptr + b * stride_gb + j * stride_gj + h * stride_gh)[:, None]
    out_base = (out_ptr + b * stride_ob + j * stride_oj + h * stride_oh)[:, None]
    q = load_rows(q_base, i, row_valid, stride_qn, HEAD_DIM, BLOCK_D).to(tl.float32)
    grad_out = load_rows(grad_out_base, i, row_valid, stride_gn, HEAD_DIM, BLOCK_D).to(tl.float32)
    out = load_rows(out_base, i, row_valid, stride_on, HEAD_DIM, BLOCK_D)
    delta = _delta(grad_out, out, grad_lse_ptr, stat, row_valid)
    tl.store(delta_ptr + stat, delta, mask=row_valid)
    lse = _load_lse(lse_ptr, stat, row_valid)
    index_rows = index_ptr + b * index_stride_b + j * index_stride_j + h * index_stride_h + i * index_stride_q
    k_base = (k_ptr + b * stride_kb + j * stride_kj + h * stride_kh)[:, None, None]
    v_base = (v_ptr + b * stride_vb + j * stride_vj + h * stride_vh)[:, None, None]
    bias_rows, key_bias_base = None, None
    if bias_ptr is not None:
        bias_rows = bias_ptr + b * bias_stride_b + j * bias_stride_j + h * bias_stride_h + i * bias_stride_q
        bias_rows = bias_rows[:, None]
    if key_bias_ptr is not None:
        key_bias_base = (key_bias_ptr + b * key_bias_stride_b + j * key_bias_stride_j)[:, None]
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(0, S, BLOCK_N):
        slot = (block + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        asked = row_valid[:, None] & (slot < S)
        token, attended = rows_of_slots(index_rows[:, None] + slot, slot, asked, Nk)
        key_bias, attended = load_key_bias(key_bias_base, token, attended, key_bias_stride_n)
        k = load_rows(k_base, token, attended, stride_kn, HEAD_DIM, BLOCK_D).to(tl.float32)
        v = load_rows(v_base, token, attended, stride_vn, HEAD_DIM, BLOCK_D).to(tl.float32)
        logits = tl.sum(q[:, None, :] * k, -1) * logit_scale
        if key_bias_ptr is not None:
            logits += key_bias
        p = _probabilities(
            logits, lse[:, None], row_valid[:, None], attended, slot, 1, bias_rows, bias_stride_s, None, S
        )  # fmt: skip
        grad_logits = p * (tl.sum(grad_out[:, None, :] * v, -1) - delta[:, None])
        if grad_bias_ptr is not None:
            tl.store((grad_bias_ptr + stat * S)[:, None] + slot, tl.where(attended, grad_logits, 0.0), mask=asked)
        grad_q += tl.sum(grad_logits[:, :, None] * k, 1)
    grad_q_base = (grad_q_ptr + b * stride_grad_qb + j * stride_grad_qj + h * stride_grad_qh)[:, None]
    store_rows(grad_q_base, i, row_valid, stride_grad_qn, grad_q * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def gathered_attention_per_query_keys_bwd_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, grad_key_bias_ptr, start_ptr,
    slots_ptr, bias_ptr, key_bias_ptr,
    stride_qb: tl.int64, stride_qj: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kj: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vj: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_gb: tl.int64, stride_gj: tl.int64, stride_gh: tl.int64, stride_gn: tl.int64,
    stride_grad_kb: tl.int64, stride_grad_kj: tl.int64, stride_grad_kh: tl.int64, stride_grad_kn: tl.int64,
    bias_stride_b: tl.int64, bias_stride_j: tl.int64, bias_stride_h: tl.int64, bias_stride_q: tl.int64,
    bias_stride_s: tl.int64, key_bias_stride_b: tl.int64, key_bias_stride_j: tl.int64, key_bias_stride_n: tl.int64,
    start_stride_b: tl.int64, start_stride_j: tl.int64, start_stride_h: tl.int64,
    slots_stride_b: tl.int64, slots_stride_j: tl.int64, slots_stride_h: tl.int64,
    sequences: tl.int32, J: tl.int32, H: tl.int32, Nq: tl.int32, Nk: tl.int32, S: tl.int32,
    scale: tl.float32, logit_scale: tl.float32,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INT: tl.constexpr,
):  # fmt: skip
    """grad_key, grad_value, grad_key_bias: one program per (block of all sequences' keys, head).

    It walks the slots that name its keys in ascending order and recomputes their probabilities and grad_logits from
    rows of query and grad_out, which the sums need anyway.
    """
    h = (tl.program_id(0) % H).to(tl.int64)
    row = (tl.program_id(0) // H).to(INT) * BLOCK_N + tl.arange(0, BLOCK_N)
    sequence = row // Nk
    token = (row - sequence * Nk).to(tl.int64)
    valid = sequence < sequences
    b, j = sequence_of(sequence, J)
    key_bias_base = None if key_bias_ptr is None else key_bias_ptr + b * key_bias_stride_b + j * key_bias_stride_j
    key_bias, attended = load_key_bias(key_bias_base, token, valid, key_bias_stride_n)
    k_base = (k_ptr + b * stride_kb + j * stride_kj + h * stride_kh)[:, None]
    v_base = (v_ptr + b * stride_vb + j * stride_vj + h * stride_vh)[:, None]
    start_rows = start_ptr + b * start_stride_b + j * start_stride_j + h * start_stride_h + token
    entries = Nq.to(tl.int64) * S
    begin = tl.maximum(tl.load(start_rows, mask=attended, other=0), 0)
    end = tl.minimum(tl.load(start_rows + 1, mask=attended, other=0), entries)
    attended &= begin < end  # a key that no slot names is not read: it may be NaN
    k = load_rows(k_base, token, attended, stride_kn, HEAD_DIM, BLOCK_D).to(tl.float32)
    v = load_rows(v_base, token, attended, stride_vn, HEAD_DIM, BLOCK_D).to(tl.float32)
    q_base = (q_ptr + b * stride_qb + j * stride_qj + h * stride_qh)[:, None, None]
    grad_out_base = (grad_out_ptr + b * stride_gb + j * stride_gj + h * stride_gh)[:, None, None]
    stats = ((sequence.to(tl.int64) * H + h) * Nq)[:, None]
    slots_base = (slots_ptr + b * slots_stride_b + j * slots_stride_j + h * slots_stride_h)[:, None]
    if bias_ptr is not None:
        bias_base = (bias_ptr + b * bias_stride_b + j * bias_stride_j + h * bias_stride_h)[:, None]
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_key_bias = tl.zeros([BLOCK_N], tl.float32)
    for block in range(0, tl.max(end - begin).to(INT), BLOCK_M):
        entry = begin[:, None] + (block + tl.arange(0, BLOCK_M)).to(tl.int64)[None, :]
        named = entry < end[:, None]
        at = tl.load(slots_base + entry, mask=named, other=-1)
        named &= within(at, entries)
        i = (at.to(INT) // S).to(tl.int64)
        q = load_rows(q_base, i, named, stride_qn, HEAD_DIM, BLOCK_D).to(tl.float32)
        grad_out = load_rows(grad_out_base, i, named, stride_gn, HEAD_DIM, BLOCK_D).to(tl.float32)
        lse = _load_lse(lse_ptr, stats + i, named)
        delta = tl.load(delta_ptr + stats + i, mask=named, other=0.0)
        logits = tl.sum(k[:, None, :] * q, -1) * logit_scale
        if key_bias_ptr is not None:
            logits += key_bias[:, None]
        bias_rows = None
        if bias_ptr is not None:
            bias_rows = bias_base + i * bias_stride_q
        p = _probabilities(logits, lse, named, named, at - i * S, 1, bias_rows, bias_stride_s, None, S)
        grad_logits = p * (tl.sum(v[:, None, :] * grad_out, -1) - delta)
        grad_v += tl.sum(p[:, :, None] * grad_out, 1)
        grad_k += tl.sum(grad_logits[:, :, None] * q, 1)
        grad_key_bias += tl.sum(grad_logits, 1)
    grad_at = (b * stride_grad_kb + j * stride_grad_kj + h * stride_grad_kh)[:, None]
    store_rows(grad_k_ptr + grad_at, token, valid, stride_grad_kn, grad_k * scale, HEAD_DIM, BLOCK_D)
    store_rows(grad_v_ptr + grad_at, token, valid, stride_grad_kn, grad_v, HEAD_DIM, BLOCK_D)
    if grad_key_bias_ptr is not None:
        tl.store(grad_key_bias_ptr + (sequence.to(tl.int64) * H + h) * Nk + token, grad_key_bias, mask=valid)
