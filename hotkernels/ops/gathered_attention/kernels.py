"""Attention over gathered keys in Triton, forward: softmax(scale * q k^T + bias) v over each query's slots.

Tensors are [B, J, H, N, D] of any strides, J = 1 where there is one batch dim; rows are gathered as they are loaded.
Logits are in base 2, log2(e) times the definition's, so that p is an exp2. Three kernels:
- long: all slots at once, or an online softmax over blocks of them;
- short: several pairs of sequence and head per program, each of at most 32 queries and 32 slots;
- per_query: each query has slots of its own, so matrix products would have a single row: it sums over channels instead.
"""

import math

import triton
import triton.language as tl

from ... import launcher

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))
LOWEST: tl.constexpr = tl.constexpr(-2.3e38)  # whose product with log2(e) is finite, and comes back from lse
INTERPRETED: tl.constexpr = tl.constexpr(launcher.INTERPRETED)

# ---- what kernels share ----------------------------------------------------------------------------------------------


@triton.jit
def sequence_of(sequence, J):
    """The batch indices (b, j) of a sequence, in int64 because they are multiplied by strides."""
    b = sequence.to(tl.uint32) // J.to(tl.uint32)
    return b.to(tl.int64), (sequence - b * J).to(tl.int64)


@triton.jit
def within(x, N):
    """Whether 0 <= x < N, in one comparison: a negative int64 is huge as a uint64."""
    return x.to(tl.uint64) < N.to(tl.uint64)


@triton.jit
def offsets(row, stride):
    """row * stride in int64 for 0 <= row < 2^31: two instructions where row is unsigned, five where it is signed."""
    return row.to(tl.uint32).to(tl.int64) * stride


@triton.jit
def in_base_2(x):
    """x * log2(e), -inf where x is and nowhere else: the lowest float32, a usual mask, counts as LOWEST."""
    return tl.where(x == float("-inf"), x, tl.maximum(x, LOWEST) * LOG2E)


@triton.jit
def rows_of_slots(index_at, slot, valid, Nk):
    """(row, valid): the row of key that each slot names, and whether it is in [0, Nk); if not, the slot is absent.

    index_at points at the slots' entries, or is None where slot n is row n. Any shape.
    """
    if index_at is None:
        row = slot.to(tl.int64)
    else:
        row = tl.load(index_at, mask=valid, other=-1)
        valid = valid & within(row, Nk)
    return row, valid


@triton.jit
def load_key_bias(key_bias_ptr, row, valid, stride_n):
    """(key_bias, attended): that of each valid row in base 2, 0 where there is none; the rows not masked by it.

    Only keys that are attended to may be read. Any shape.
    """
    if key_bias_ptr is None:
        key_bias = tl.zeros(valid.shape, tl.float32)
    else:
        key_bias = in_base_2(tl.load(key_bias_ptr + offsets(row, stride_n), mask=valid, other=float("-inf")))
        valid = valid & (key_bias != float("-inf"))
    return key_bias, valid


@triton.jit
def masked(logits, key_bias, attended, index_ptr, key_bias_ptr):
    """logits + key_bias, -inf where not attended to; all arguments broadcast to logits.

    Where none is, a query attends to nothing, and if it is NaN that must not show. Without index and key_bias some
    always are, and adding is all the masking that slots beyond the last one need.
    """
    if key_bias_ptr is not None:
        logits += key_bias
    if index_ptr is None and key_bias_ptr is None:
        logits += tl.where(attended, 0.0, float("-inf"))
    else:
        logits = tl.where(attended, logits, float("-inf"))
    return logits


@triton.jit
def load_rows(ptr, row, valid, stride_n, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[..., BLOCK_D]: the valid rows; zeros for others and beyond HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(valid, -1)
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)
    return tl.load((ptr + d) + tl.expand_dims(offsets(row, stride_n), -1), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, row, valid, stride_n, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [..., BLOCK_D] to the valid rows, rounded to their dtype."""
    d = tl.arange(0, BLOCK_D)
    mask = tl.expand_dims(valid, -1)
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)
    at = (ptr + d) + tl.expand_dims(offsets(row, stride_n), -1)
    tl.store(at, values.to(at.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(bias_rows, slot, valid, stride_s):
    """The bias of slots in base 2, 0 where not valid; bias_rows points at slot 0 of each query's. Any shape."""
    return in_base_2(tl.load(bias_rows + offsets(slot, stride_s), mask=valid, other=0.0))


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a b + acc; acc may be None.

    A single TF32 product rounds its operands first: tensor cores would truncate them, with four times the error.
    """
    if PRECISION == "tf32" and not INTERPRETED:
        a = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [a], dtype=tl.float32, is_pure=True, pack=1)
        b = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [b], dtype=tl.float32, is_pure=True, pack=1)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def softmax_shift(row_max):
    """What to subtract from logits: row_max, or 0 where all are -inf, for exp2(-inf - 0) = 0 and not NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def reciprocal(row_sum):
    """1 / row_sum, or 1 where row_sum is 0: what it multiplies is zero already."""
    return 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)


@triton.jit
def log_sum_exp(row_max, row_sum):
    """The natural log(row_sum * 2^row_max), -inf where row_sum is 0."""
    return tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum))) * LN2)


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def slots_from(start, S, Nk, index_base, key_bias_base, key_bias_stride_n, BLOCK_N: tl.constexpr):
    """(slot, row, key_bias, valid) [BLOCK_N] of the slots from `start` on."""
    slot = start + tl.arange(0, BLOCK_N)
    row, valid = rows_of_slots(None if index_base is None else index_base + slot, slot, slot < S, Nk)
    key_bias, valid = load_key_bias(key_bias_base, row, valid, key_bias_stride_n)
    return slot, row, key_bias, valid


@triton.jit
def logits_of(
    q, k, slot, key_bias, valid, q_valid, index_ptr, bias_rows, key_bias_ptr, bias_stride_s, end, S, logit_scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of the slots before `end`, -inf where not attended to.

    Scaled here and not within exp2(logits * scale - shift), one operation less: from 2^32 on the shift is rounded by so
    much that this would overflow, as it did in FlashAttention (github.com/pytorch/pytorch/issues/121558).
    """
    logits = product(q, tl.trans(k), None, PRECISION) * logit_scale
    if index_ptr is None and key_bias_ptr is None and (q.dtype != tl.float32 or q.shape[1] <= 64):
        if end > S:  # only then are slots absent; float32 of more channels has no registers for a branch
            logits = tl.where(valid[None, :], logits, float("-inf"))
    else:
        logits = masked(logits, key_bias[None, :], valid[None, :], index_ptr, key_bias_ptr)
    if bias_rows is not None:
        both = q_valid[:, None] & valid[None, :]
        logits += load_bias(bias_rows, slot[None, :], both, bias_stride_s)
    return logits


@triton.jit
def gathered_attention_long_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, index_ptr, bias_ptr, key_bias_ptr,
    stride_qb: tl.int64, stride_qj: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kj: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vj: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_ob: tl.int64, stride_oj: tl.int64, stride_oh: tl.int64, stride_on: tl.int64,
    index_stride_b: tl.int64,
    bias_stride_b: tl.int64, bias_stride_j: tl.int64, bias_stride_h: tl.int64, bias_stride_q: tl.int64,
    bias_stride_s: tl.int64, key_bias_stride_b: tl.int64, key_bias_stride_j: tl.int64, key_bias_stride_n: tl.int64,
    J: tl.int32, H: tl.int32, Nq: tl.int32, Nk: tl.int32, S: tl.int32,
    logit_scale: tl.float32,  # scale times log2(e)
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr, PRECISION: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """One program per (sequence, block of queries, head); heads, which are neighbours in memory, vary fastest.

    If ONCE, the first BLOCK_N slots and the next REST_N, which may be none, are all there are.
    """
    program = tl.program_id(0).to(tl.uint32)
    rest = program // H.to(tl.uint32)
    h = (program - rest * H.to(tl.uint32)).to(tl.int64)
    blocks = (Nq.to(tl.uint32) + BLOCK_M - 1) // BLOCK_M
    sequence = rest // blocks
    m = (rest - sequence * blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    b, j = sequence_of(sequence, J)
    q_row, q_valid = m.to(tl.int64), m < Nq
    q_base = q_ptr + b * stride_qb + j * stride_qj + h * stride_qh
    k_base = k_ptr + b * stride_kb + j * stride_kj + h * stride_kh
    v_base = v_ptr + b * stride_vb + j * stride_vj + h * stride_vh
    index_base = None if index_ptr is None else index_ptr + b * index_stride_b
    bias_rows = None
    if bias_ptr is not None:
        bias_rows = bias_ptr + b * bias_stride_b + j * bias_stride_j + h * bias_stride_h
        bias_rows += offsets(m, bias_stride_q)[:, None]
    key_bias_base = None if key_bias_ptr is None else key_bias_ptr + b * key_bias_stride_b + j * key_bias_stride_j
    q = load_rows(q_base, q_row, q_valid, stride_qn, HEAD_DIM, BLOCK_D)

    if ONCE:
        slot, row, key_bias, valid = slots_from(0, S, Nk, index_base, key_bias_base, key_bias_stride_n, BLOCK_N)
        k = load_rows(k_base, row, valid, stride_kn, HEAD_DIM, BLOCK_D)
        v = load_rows(v_base, row, valid, stride_vn, HEAD_DIM, BLOCK_D)
        if REST_N > 0:
            slot2, row2, key_bias2, valid2 = slots_from(
                BLOCK_N, S, Nk, index_base, key_bias_base, key_bias_stride_n, REST_N
            )
            k2 = load_rows(k_base, row2, valid2, stride_kn, HEAD_DIM, BLOCK_D)
            v2 = load_rows(v_base, row2, valid2, stride_vn, HEAD_DIM, BLOCK_D)
        logits = logits_of(
            q, k, slot, key_bias, valid, q_valid, index_ptr, bias_rows, key_bias_ptr, bias_stride_s, BLOCK_N, S,
            logit_scale, PRECISION,
        )  # fmt: skip
        row_max = tl.max(logits, 1)
        if REST_N > 0:
            logits2 = logits_of(
                q, k2, slot2, key_bias2, valid2, q_valid, index_ptr, bias_rows, key_bias_ptr, bias_stride_s,
                BLOCK_N + REST_N, S, logit_scale, PRECISION,
            )  # fmt: skip
            row_max = tl.maximum(row_max, tl.max(logits2, 1))
        shift = softmax_shift(row_max)
        p = tl.exp2(logits - shift[:, None])
        row_sum = tl.sum(p, 1)
        acc = product(p.to(v.dtype), v, None, PRECISION)
        if REST_N > 0:
            p2 = tl.exp2(logits2 - shift[:, None])
            row_sum += tl.sum(p2, 1)
            acc = product(p2.to(v.dtype), v2, acc, PRECISION)
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, S, BLOCK_N):
            slot, row, key_bias, valid = slots_from(start, S, Nk, index_base, key_bias_base, key_bias_stride_n, BLOCK_N)
            k = load_rows(k_base, row, valid, stride_kn, HEAD_DIM, BLOCK_D)
            logits = logits_of(
                q, k, slot, key_bias, valid, q_valid, index_ptr, bias_rows, key_bias_ptr, bias_stride_s,
                start + BLOCK_N, S, logit_scale, PRECISION,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(logits, 1))
            shift = softmax_shift(new_max)
            p = tl.exp2(logits - shift[:, None])
            rescale = tl.exp2(row_max - shift)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            v = load_rows(v_base, row, valid, stride_vn, HEAD_DIM, BLOCK_D)
            acc = product(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)
            row_max = new_max

    out = acc * reciprocal(row_sum)[:, None]
    out_base = out_ptr + b * stride_ob + j * stride_oj + h * stride_oh
    store_rows(out_base, q_row, q_valid, stride_on, out, HEAD_DIM, BLOCK_D)
    each = tl.arange(0, BLOCK_M)  # four lanes hold each row, and all would take its logarithm: let one have it
    lse = log_sum_exp(tl.gather(row_max, each, 0), tl.gather(row_sum, each, 0))
    tl.store(lse_ptr + (sequence.to(tl.int64) * H + h) * Nq + m, lse, mask=q_valid)


@triton.jit
def gathered_attention_short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, index_ptr, bias_ptr, key_bias_ptr,
    stride_qb: tl.int64, stride_qj: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kj: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vj: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_ob: tl.int64, stride_oj: tl.int64, stride_oh: tl.int64, stride_on: tl.int64,
    index_stride_b: tl.int64,
    bias_stride_b: tl.int64, bias_stride_j: tl.int64, bias_stride_h: tl.int64, bias_stride_q: tl.int64,
    bias_stride_s: tl.int64, key_bias_stride_b: tl.int64, key_bias_stride_j: tl.int64, key_bias_stride_n: tl.int64,
    sequences: tl.int32, J: tl.int32, H: tl.int32, Nq: tl.int32, Nk: tl.int32, S: tl.int32,
    logit_scale: tl.float32,  # scale times log2(e)
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program per PAIRS pairs of sequence and head; heads, which are neighbours in memory, vary fastest."""
    pair = (tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)).to(tl.uint32)
    sequence = pair // H.to(tl.uint32)
    live = sequence < sequences.to(tl.uint32)
    h = (pair - sequence * H).to(tl.int64)
    b, j = sequence_of(sequence, J)
    m, slot = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[None, :]
    q_valid, valid = live[:, None] & (m < Nq), live[:, None] & (slot < S)
    q_row = m.to(tl.int64)

    index_at = None if index_ptr is None else index_ptr + (b * index_stride_b)[:, None] + slot
    row, valid = rows_of_slots(index_at, slot, valid, Nk)
    key_bias_base = None
    if key_bias_ptr is not None:
        key_bias_base = key_bias_ptr + (b * key_bias_stride_b + j * key_bias_stride_j)[:, None]
    key_bias, valid = load_key_bias(key_bias_base, row, valid, key_bias_stride_n)
    q_base = q_ptr + (b * stride_qb + j * stride_qj + h * stride_qh)[:, None, None]
    k_base = k_ptr + (b * stride_kb + j * stride_kj + h * stride_kh)[:, None, None]
    v_base = v_ptr + (b * stride_vb + j * stride_vj + h * stride_vh)[:, None, None]
    q = load_rows(q_base, q_row, q_valid, stride_qn, HEAD_DIM, BLOCK_D)
    k = load_rows(k_base, row, valid, stride_kn, HEAD_DIM, BLOCK_D)
    v = load_rows(v_base, row, valid, stride_vn, HEAD_DIM, BLOCK_D)
    logits = product(q, tl.permute(k, 0, 2, 1), None, PRECISION) * logit_scale
    logits = masked(logits, key_bias[:, None, :], valid[:, None, :], index_ptr, key_bias_ptr)
    if bias_ptr is not None:
        bias_rows = bias_ptr + (b * bias_stride_b + j * bias_stride_j + h * bias_stride_h)[:, None, None]
        bias_rows += offsets(m[:, :, None], bias_stride_q)
        both = q_valid[:, :, None] & valid[:, None, :]
        logits += load_bias(bias_rows, slot[:, None, :], both, bias_stride_s)

    row_max = tl.max(logits, 2)
    p = tl.exp2(logits - softmax_shift(row_max)[:, :, None])
    row_sum = tl.sum(p, 2)
    acc = product(p.to(v.dtype), v, None, PRECISION)
    out = acc * reciprocal(row_sum)[:, :, None]
    out_base = out_ptr + (b * stride_ob + j * stride_oj + h * stride_oh)[:, None, None]
    store_rows(out_base, q_row, q_valid, stride_on, out, HEAD_DIM, BLOCK_D)
    lse_at = lse_ptr + (sequence.to(tl.int64) * H + h)[:, None] * Nq + m
    tl.store(lse_at, log_sum_exp(row_max, row_sum), mask=q_valid)


@triton.jit
def gathered_attention_per_query_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, index_ptr, bias_ptr, key_bias_ptr,
    stride_qb: tl.int64, stride_qj: tl.int64, stride_qh: tl.int64, stride_qn: tl.int64,
    stride_kb: tl.int64, stride_kj: tl.int64, stride_kh: tl.int64, stride_kn: tl.int64,
    stride_vb: tl.int64, stride_vj: tl.int64, stride_vh: tl.int64, stride_vn: tl.int64,
    stride_ob: tl.int64, stride_oj: tl.int64, stride_oh: tl.int64, stride_on: tl.int64,
    index_stride_b: tl.int64, index_stride_j: tl.int64, index_stride_h: tl.int64, index_stride_q: tl.int64,
    bias_stride_b: tl.int64, bias_stride_j: tl.int64, bias_stride_h: tl.int64, bias_stride_q: tl.int64,
    bias_stride_s: tl.int64, key_bias_stride_b: tl.int64, key_bias_stride_j: tl.int64, key_bias_stride_n: tl.int64,
    J: tl.int32, H: tl.int32, Nq: tl.int32, Nk: tl.int32, S: tl.int32,
    logit_scale: tl.float32,  # scale times log2(e)
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per (query, block of heads); a block is one head where heads have slots of their own.

    A tile is [BLOCK_S, BLOCK_H * BLOCK_D], since the heads of a token are neighbours in memory.
    """
    program = tl.program_id(0)
    head_blocks = (H + BLOCK_H - 1) // BLOCK_H
    rest = program // head_blocks
    first = (program - rest * head_blocks) * BLOCK_H
    h = (first + tl.arange(0, BLOCK_H)).to(tl.int64)
    live = h < H
    sequence = rest // Nq
    m = (rest - sequence * Nq).to(tl.int64)
    b, j = sequence_of(sequence, J)
    column = tl.arange(0, BLOCK_H * BLOCK_D)
    column_h, d = (first + column // BLOCK_D).to(tl.int64), column % BLOCK_D
    column_valid = column_h < H
    if HEAD_DIM != BLOCK_D:
        column_valid = column_valid & (d < HEAD_DIM)
    q_at = q_ptr + b * stride_qb + j * stride_qj + m * stride_qn + column_h * stride_qh + d
    k_at = k_ptr + b * stride_kb + j * stride_kj + column_h * stride_kh + d
    v_at = v_ptr + b * stride_vb + j * stride_vj + column_h * stride_vh + d
    index_base = index_ptr + b * index_stride_b + j * index_stride_j + first.to(tl.int64) * index_stride_h
    index_base += m * index_stride_q
    key_bias_base = None if key_bias_ptr is None else key_bias_ptr + b * key_bias_stride_b + j * key_bias_stride_j
    q = tl.load(q_at, mask=column_valid, other=0.0).to(tl.float32)

    row_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(0, S, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        row, valid = rows_of_slots(index_base + slot, slot, slot < S, Nk)
        key_bias, valid = load_key_bias(key_bias_base, row, valid, key_bias_stride_n)
        mask = valid[:, None] & column_valid[None, :]
        k = tl.load(k_at[None, :] + offsets(row, stride_kn)[:, None], mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_at[None, :] + offsets(row, stride_vn)[:, None], mask=mask, other=0.0).to(tl.float32)
        products = tl.reshape(q[None, :] * k, [BLOCK_S, BLOCK_H, BLOCK_D])
        logits = tl.sum(products, 2) * logit_scale
        logits = masked(logits, key_bias[:, None], valid[:, None], index_ptr, key_bias_ptr)
        if bias_ptr is not None:
            bias_rows = bias_ptr + b * bias_stride_b + j * bias_stride_j + (h * bias_stride_h)[None, :]
            bias_rows += m * bias_stride_q
            both = valid[:, None] & live[None, :]
            logits += load_bias(bias_rows, slot[:, None], both, bias_stride_s)
        new_max = tl.maximum(row_max, tl.max(logits, 0))
        shift = softmax_shift(new_max)
        p = tl.exp2(logits - shift[None, :])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 0)
        acc = acc * rescale[:, None] + tl.sum(p[:, :, None] * tl.reshape(v, [BLOCK_S, BLOCK_H, BLOCK_D]), 0)
        row_max = new_max

    out = acc * reciprocal(row_sum)[:, None]
    store_rows(out_ptr + b * stride_ob + j * stride_oj + m * stride_on, h, live, stride_oh, out, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (sequence.to(tl.int64) * H + h) * Nq + m, log_sum_exp(row_max, row_sum), mask=live)
