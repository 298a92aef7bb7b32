"""Attention over tokens chosen by an index, without first copying them out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ...backends import TRITON_DEVICE, Kernel, choose_attention, register
from ...dtypes import FLOATING, FUSED, INTEGER, accumulator
from ...errors import check_bool, check_float, check_index, check_tensor, fail, matches
from ...operators import composite, differentiable_once, fake, implement_in_triton, wants_grad
from ..invert_index import InvertedIndex
from .reference import gathered_attention_reference, mask_bias

_OP = "gathered_attention"
_BIAS = (*FLOATING, torch.bool)
MAX_HEAD_DIM = 256
register(
    _OP,
    triton=Kernel(FUSED, device=TRITON_DEVICE, library="triton"),
    cpp=Kernel(FLOATING, device="cpu", library="_C_cpu"),
    torch=Kernel(FLOATING),
)
implement_in_triton("gathered_attention_fwd", module="hotkernels.ops.gathered_attention.launches")
implement_in_triton(
    "gathered_attention_bwd",
    "gathered_attention_packed_bwd",
    module="hotkernels.ops.gathered_attention.launches_backward",
)


class GatheredAttention(torch.autograd.Function):
    """gathered_attention over the raw operators; index, start and slots are an InvertedIndex's, or None.

    key and value may have the batch dim 1, one for all samples.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        index: Tensor | None,
        start: Tensor | None,
        slots: Tensor | None,
        bias: Tensor | None,
        key_bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Attend; keep the log sum exp of the logits for the backward pass."""
        ctx.of_all_samples = key.shape[0] != query.shape[0]
        key, value = _for_each_sample(query, key, value)
        out, lse = torch.ops.hotkernels.gathered_attention_fwd(query, key, value, index, bias, key_bias, scale)
        ctx.save_for_backward(query, key, value, out, lse, index, start, slots, bias, key_bias)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Recompute the probabilities from lse; no [Nq, Nk] tensor is kept."""
        query, key, value, out, lse, index, start, slots, bias, key_bias = saved
        need_bias, need_key_bias = ctx.needs_input_grad[6:8]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        by_slot = ctx.of_all_samples and index is not None and index.dim() == 2 and not need_key_bias
        if by_slot:
            start = slots = None
        elif index is not None and start is None:
            rows = index if index.dim() == 2 else index.flatten(-2)
            start, slots = torch.ops.hotkernels.invert_index(rows, key.shape[-2])
        grad_query, grad_key, grad_value, grad_bias, grad_key_bias = torch.ops.hotkernels.gathered_attention_bwd(
            grad_out, grad_lse, query, key, value, out, lse, index, start, slots, bias, key_bias, ctx.scale,
            need_bias, need_key_bias,
        )  # fmt: skip
        if by_slot:
            grad_key, grad_value = (_sum_over_samples(grad, index, key.shape[-2]) for grad in (grad_key, grad_value))
        elif ctx.of_all_samples:
            grad_key, grad_value = (grad.sum(0, keepdim=True) for grad in (grad_key, grad_value))
        return (
            grad_query,
            grad_key,
            grad_value,
            None,
            None,
            None,
            grad_bias.sum_to_size(bias.shape) if need_bias else None,
            grad_key_bias.sum(-2).sum_to_size(key_bias.shape) if need_key_bias else None,
            None,
        )


def _for_each_sample(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value in query's batch, where they may be there once for all samples."""
    if key.shape[0] == query.shape[0]:
        return key, value
    return key.expand(query.shape[0], *key.shape[1:]), value.expand(query.shape[0], *value.shape[1:])


def _sum_over_samples(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Gradients [1, (J,) H, N, D] of tokens for all samples, from those [B, (J,) H, M, D] of the sets [B or 1, M]."""
    rows = grad.movedim(-2, 1)  # as they are stored
    named = index.expand(rows.shape[:2]).reshape(1, -1).contiguous()  # a slot for all samples is expanded, too
    return torch.ops.hotkernels.gather_tokens_bwd(rows.reshape(1, -1, *rows.shape[2:]), named, num_tokens).movedim(
        1, -2
    )


class PackedAttention(torch.autograd.Function):
    """Dense self-attention on one projection qkv [B, N, 3, H, D] or [B, N, J, 3, H, D]; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:
        """Attend to [*batch, H, N, D] views of qkv."""
        out, lse = torch.ops.hotkernels.gathered_attention_fwd(*unpack(qkv), None, None, None, scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], grad_out: Tensor) -> tuple[Tensor, None]:
        """Write the three gradients where the projection's backward reads them."""
        qkv, out, lse = saved
        return torch.ops.hotkernels.gathered_attention_packed_bwd(grad_out, *unpack(qkv), out, lse, ctx.scale), None


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """The query, key and value [*batch, H, N, D] in qkv [B, N, 3, H, D] or [B, N, J, 3, H, D]: views."""
    return qkv.permute((2, 0, 3, 1, 4) if qkv.dim() == 5 else (3, 0, 2, 4, 1, 5)).unbind(0)


def packed_attention(qkv: Tensor, scale: float, dropout_p: float = 0.0, backend: str | None = None) -> Tensor:
    """`gathered_attention` of the three parts of qkv [B, N, 3, H, D] or [B, N, J, 3, H, D], without an index."""
    if choose_attention(_OP, qkv, dropout_p, backend) == "torch":
        query, key, value = unpack(qkv)
        return gathered_attention_reference(query, key, value, scale=scale, dropout_p=dropout_p, return_lse=False)[0]
    return _packed(qkv, scale)


@composite("packed_attention(Tensor qkv, float scale) -> Tensor")
def _packed(qkv: Tensor, scale: float) -> Tensor:
    if not wants_grad(qkv):
        return torch.ops.hotkernels.gathered_attention_fwd(*unpack(qkv), None, None, None, scale)[0]
    return PackedAttention.apply(qkv, scale)


def checked_heads(
    op: str, query: Tensor, key: Tensor, value: Tensor, query_dims: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value, checked but for the batch dims; under autocast in its dtype, as SDPA takes them."""
    layout = "[*batch, H, N, D] with one or two batch dims"
    check_tensor(op, "query", query, layout, FLOATING)
    device = query.device
    kind = device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and query.dtype in FUSED:  # not float64
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (
            t.to(dtype) if isinstance(t, Tensor) and t.dtype in FUSED else t for t in (query, key, value)
        )
    dtypes = (query.dtype,)
    check_tensor(op, "key", key, layout, dtypes, device=device)
    check_tensor(op, "value", value, layout, dtypes, device=device)
    q, k, v = query.shape, key.shape, value.shape
    shared = "[H, L, D] or " if query_dims else ""
    if len(k) not in (4, 5):
        if len(q) not in (4, 5, *query_dims):
            fail(op, "query", f"{shared}{layout}", list(q))
        fail(op, "key", layout, list(k))
    if len(v) != len(k):
        fail(op, "value", f"{layout}, as key has {len(k) - 3}", list(v))
    if len(q) not in (len(k), *query_dims):
        fail(op, "query", f"{shared}{layout}, as key has {len(k) - 3}", list(q))
    *_, H, Nk, D = k
    if v != k and v[-3:] != k[-3:]:
        fail(op, "value", f"[*batch, H = {H}, Nk = {Nk}, D = {D}] as key", list(v))
    if q[-3] != H or q[-1] != D:
        fail(op, "query", f"[*batch, H = {H}, Nq, D = {D}] as key", list(q))
    if not 1 <= D <= MAX_HEAD_DIM:
        fail(op, "query", f"of a head dim in [1, {MAX_HEAD_DIM}]", D)
    if q[-2] < 1 or Nk < 1:
        arg, shape = ("query", q) if q[-2] < 1 else ("key", k)
        fail(op, arg, "of at least one token", list(shape))
    return query, key, value


def distinct(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors, also where some are one: torch.compile gives no tensor to a Function twice."""
    if torch.compiler.is_compiling():
        key = key.view_as(key) if key is query else key
        value = value.view_as(value) if value is query or value is key else value
    return query, key, value


def check_scale(op: str, scale: float | None, D: int) -> float:
    """The scale of the logits: 1 / sqrt(D) unless given."""
    if scale is None:
        return D**-0.5
    check_float(op, "scale", scale)
    return float(scale)


@overload
def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | InvertedIndex | None = ...,
    *,
    bias: Tensor | None = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | InvertedIndex | None = ...,
    *,
    bias: Tensor | None = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | InvertedIndex | None = None,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend to all keys, to a set of keys per sample, or to keys chosen per query, reading them where they lie.

    Equivalent to, for a set of keys [B, M] (and for keys per query with one gather more)::

        k, v = (t.gather(-2, index[:, None, :, None].expand(-1, H, -1, D)) for t in (key, value))
        out = torch.softmax(scale * query @ k.mT + bias, -1) @ v

    Args:
        query: [*batch, H, Nq, D] float32, float16, bfloat16 or float64; one or two batch dims, (B) or (B, J). Any
            strides with a contiguous last dim are read in place: ``qkv.reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4)``,
            or [B, F, J, H * D] seen as [B, J, H, F, D]. D from 1 to 256.
        key, value: [*batch, H, Nk, D], as query. Batch dims of query, key and value broadcast. Under autocast all three
            are cast, as SDPA casts its own.
        index: int64 or int32 in [-1, Nk), -1 = no key. None: dense. [B, M]: one set for all heads, queries and J of a
            sample. [*batch, Nq, K]: per query. [*batch, H, Nq, K]: per head and query. Batch dims and H may be 1, for
            all. Keys may repeat, and count each time. An InvertedIndex saves the backward pass the inversion.
        bias: added to the logits of the slots, broadcastable to [*batch, H, Nq, Nk or M or K]; or bool, True = attend.
        key_bias: [*batch, Nk], each dim whole or 1, added to the logits of a key wherever it appears; -inf masks it:
            then nothing in it or its value matters, not even NaN, as where no index names it. Or bool, True = attend.
        scale: of the logits; None = 1 / sqrt(D).
        dropout_p: dropout on the probabilities, always applied if > 0 (on the torch backend).
        return_lse: return (out, lse).
        backend: "torch", "cpp", "triton", or None for the fastest that can serve the call.

    Returns:
        out [*batch, H, Nq, D] of query's dtype, stored token by token, so that ``out.transpose(-3, -2).flatten(-2)`` is
        a view. A query with nothing to attend to gives 0. With return_lse, lse [*batch, H, Nq] float32 (float64 for
        float64) too: the logarithm of the sum of exponentiated logits, -inf where there are none. Differentiable once
        in query, key, value, bias and key_bias.

    Raises:
        ValueError, TypeError: ``gathered_attention: <arg> must be <expected>, got <actual>``.

    Numerics: softmax and sums in float32 (float64 for float64), also for half types. Gradients of keys under an index
    are summed in ascending order of the slots that name them: the same bits every time. On GPUs, matrix products take
    float32 in three TF32 ones, or in one where ``torch.backends.cuda.matmul`` allows TF32, and half types round the
    probabilities to their own precision, backward the gradients of the logits, too; so does bfloat16, without keys per
    query, on AMD CPUs with AVX512-BF16. On GPUs, backward takes lse as float32 has it, as SDPA's does: where it is
    1,000, probabilities are known to 3e-5. So mask with -inf: a query whose every logit is some large negative number
    attends to all keys alike, and its lse has no digits left for their gradients. On GPUs, a slot whose index is out of
    range counts as absent.

    Cost: no [Nq, Nk] tensor and no gathered copy of the keys, forward or backward; under an index per query, backward
    keeps two floats per slot. Where each sample has a set [B, M] of keys that are there once for all samples (batch dim
    1: a memory, or the regions of an image), backward holds gradients of the B * M slots, not of all keys B times,
    unless key_bias has a gradient.

    Source: Vaswani et al. 2017, eq. 1; online softmax: Milakov & Gimelshein 2018; backward from lse: Dao et al. 2022
    (FlashAttention); sets of keys as in HoT (Li et al., CVPR 2024), keys per query as in RoITr (Yu et al., CVPR 2023).

    Example::

        >>> import torch, hotkernels
        >>> q, k, v = torch.randn(3, 2, 8, 243, 64).unbind(0)
        >>> every_third = torch.arange(0, 243, 3).expand(2, -1)
        >>> hotkernels.gathered_attention(q, k, v, every_third).shape
        torch.Size([2, 8, 243, 64])
    """
    query, key, value = checked_heads(_OP, query, key, value, ())
    *_, H, Nq, D = query.shape
    scale = check_scale(_OP, scale, D)
    shape = key.shape
    Nk = shape[-2]
    batch: tuple[int, ...] = shape[:-3]
    start = slots = None
    if isinstance(index, InvertedIndex):
        index, start, slots = index
    if value.shape != shape or query.shape[:-3] != batch:  # they broadcast, which takes PyTorch 12 us and more to say
        batch = common_batch(_OP, query, key, value)
        # Under sets, keys that are there once stay so: backward sums over slots, not over all keys of all samples.
        once = key.shape[0] == value.shape[0] == 1 and isinstance(index, Tensor) and index.dim() == 2
        of_keys = (1, *batch[1:]) if once else batch
        query = query.expand(*batch, *query.shape[-3:])
        key, value = (t.expand(*of_keys, *t.shape[-3:]) for t in (key, value))
    num_slots = Nk
    if index is not None:
        index = _checked_index(index, batch, H, Nq, query.device)
        num_slots = index.shape[-1]
        if start is not None or slots is not None:
            _check_inverse(index, start, slots, Nk)
    if bias is not None:
        bias = _to_logits(_checked_bias(bias, (*batch, H, Nq, num_slots), query.device), query)
    if key_bias is not None:
        key_bias = checked_per_key(_OP, "key_bias", key_bias, "[*batch, Nk]", _BIAS, (*batch, Nk), query.device)
        key_bias = _to_logits(key_bias, query)
    check_bool(_OP, "return_lse", return_lse)
    chosen = choose_attention(_OP, query, dropout_p, backend)
    if index is not None:
        check_index(_OP, "index", index, Nk, chosen)
    if chosen == "torch":
        key, value = _for_each_sample(query, key, value)
        out, lse = gathered_attention_reference(
            query, key, value, index, bias, key_bias, scale, dropout_p, bool(return_lse)
        )
    else:
        out, lse = _fused(query, key, value, index, start, slots, bias, key_bias, scale)
    return (out, lse) if return_lse else out


@composite(
    "gathered_attention(Tensor query, Tensor key, Tensor value, Tensor? index, Tensor? start, Tensor? slots, "
    "Tensor? bias, Tensor? key_bias, float scale) -> (Tensor out, Tensor lse)"
)
def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    start: Tensor | None,
    slots: Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if not wants_grad(query, key, value, bias, key_bias):
        key, value = _for_each_sample(query, key, value)
        return torch.ops.hotkernels.gathered_attention_fwd(query, key, value, index, bias, key_bias, scale)
    query, key, value = distinct(query, key, value)
    return GatheredAttention.apply(query, key, value, index, start, slots, bias, key_bias, scale)


def common_batch(op: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The batch dims of query, key and value, broadcast."""
    try:
        return tuple(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3]))
    except RuntimeError:
        shapes = [list(t.shape[:-3]) for t in (query, key, value)]
        fail(op, "the batch dims of query, key and value", "broadcastable", f"{shapes[0]}, {shapes[1]} and {shapes[2]}")


def broadcastable(shape: torch.Size, to: tuple[int, ...]) -> bool:
    """Whether a shape of as many dims as `to` is whole or 1 in each."""
    for a, b in zip(shape, to, strict=True):  # noqa: SIM110  a plain loop: this runs in every call
        if a not in (1, b):
            return False
    return True


def rows_of_index(dims: int, batch: tuple[int, ...], H: int, Nq: int) -> tuple[int, ...] | None:
    """What the dims of an index but the last broadcast to: a set, per query, or per head and query; else None."""
    return {2: (batch[0],), len(batch) + 2: (*batch, Nq), len(batch) + 3: (*batch, H, Nq)}.get(dims)


def fits_rows(index: Tensor, rows: tuple[int, ...]) -> bool:
    """Whether an index has these rows. Sets and heads broadcast, queries do not."""
    return broadcastable(index.shape[:-1], rows) and (len(rows) == 1 or index.shape[-2] == rows[-1])


def _checked_index(index: Tensor, batch: tuple[int, ...], H: int, Nq: int, device: torch.device) -> Tensor:
    meanings = (
        "[B, M] (one set of keys per sample), [*batch, Nq, K] (per query) or [*batch, H, Nq, K] (per head and query)"
    )
    check_tensor(_OP, "index", index, meanings, INTEGER, device=device)
    rows = rows_of_index(index.dim(), batch, H, Nq)
    if rows is None:
        fail(_OP, "index", f"{meanings}, batch being {list(batch)}", list(index.shape))
    if not fits_rows(index, rows):
        fail(_OP, "index", f"{[*rows, 'slots']}".replace("'", ""), list(index.shape))
    if index.shape[-1] < 1:
        fail(_OP, "index", "of at least one slot", list(index.shape))
    return index.long().contiguous()


def _checked_bias(bias: Tensor, full: tuple[int, ...], device: torch.device) -> Tensor:
    check_tensor(_OP, "bias", bias, "[*batch, H, Nq, slots]", _BIAS, device=device)
    if bias.dim() > len(full) or not broadcastable(bias.shape, full[len(full) - bias.dim() :]):
        fail(_OP, "bias", f"broadcastable to [*batch, H, Nq, slots] = {list(full)}", list(bias.shape))
    return bias if bias.dim() == len(full) else bias[(None,) * (len(full) - bias.dim())]


def checked_per_key(
    op: str,
    arg: str,
    value: Tensor,
    layout: str,
    dtypes: Sequence[torch.dtype],
    full: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """What says something about each key: of shape `full` (`layout`), any dim 1; the last comes back whole."""
    check_tensor(op, arg, value, layout, dtypes, device=device)
    if value.dim() != len(full) or not broadcastable(value.shape, full):
        fail(op, arg, f"{layout} = {list(full)}", list(value.shape))
    return value if value.shape[-1] == full[-1] else value.expand(*value.shape[:-1], full[-1])


def _to_logits(bias: Tensor, query: Tensor) -> Tensor:
    """A bias, or a mask, in the type of the logits."""
    return mask_bias(bias, query) if bias.dtype == torch.bool else bias.to(accumulator(query.dtype))


def _check_inverse(index: Tensor, start: Any, slots: Any, num_tokens: int) -> None:
    """Check that start and slots are of this many tokens and of the dims of this index: backward looks at all they say.

    An index is [B, M], or per query; its inverse has one row, or one per batch entry (and head).
    """
    for arg, t in (("start", start), ("slots", slots)):
        check_tensor(_OP, f"index.{arg}", t, "as invert_index returns it", (torch.int64,), device=index.device)
    dims = 1 if index.dim() == 2 else 2
    lead = index.shape[:-dims]
    shapes = [*lead, num_tokens + 1], [*lead, math.prod(index.shape[-dims:])]
    if not (matches(start.shape, shapes[0]) and matches(slots.shape, shapes[1])):
        expected = f"inverted with num_tokens = {num_tokens}, dims = {dims}: {shapes[0]} and {shapes[1]}"
        fail(_OP, "index", expected, f"{list(start.shape)} and {list(slots.shape)}")


def token_major(like: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """An empty [*batch, H, N, D] stored [B, N, (J,) H, D], as the kernels allocate it."""
    if len(shape) == 4:
        B, H, N, D = shape
        return like.new_empty(B, N, H, D).transpose(1, 2)
    B, J, H, N, D = shape
    return like.new_empty(B, N, J, H, D).transpose(1, 2).transpose(2, 3)


@fake("gathered_attention_fwd")
def _gathered_attention_fwd_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    shape = (*key.shape[:-2], query.shape[-2])
    return token_major(query, (*shape, key.shape[-1])), query.new_empty(shape, dtype=accumulator(query.dtype))


@fake("gathered_attention_bwd")
def _gathered_attention_bwd_fake(
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
    batch, H, Nk = key.shape[:-3], key.shape[-3], key.shape[-2]
    shared = query.dim() == 3
    grad_query = lse.new_empty(query.shape) if shared else token_major(query, query.shape)
    grad_bias, grad_key_bias = lse.new_empty(0), lse.new_empty(0)
    if need_bias and bias is not None:
        per_query = index is not None and index.dim() > 2
        batch_free = not per_query and all(size == 1 for size in bias.shape[:-3])
        slots_of = Nk if index is None else index.shape[-1]
        lead = [1] * len(batch) if batch_free else list(batch)
        grad_bias = lse.new_empty(*lead, H, query.shape[-2], slots_of)
    if need_key_bias:
        grad_key_bias = lse.new_empty(*batch, H, Nk)
    rows = (*batch, H, index.shape[-1] if index is not None and start is None else Nk, key.shape[-1])
    return grad_query, token_major(key, rows), token_major(value, rows), grad_bias, grad_key_bias


@fake("gathered_attention_packed_bwd")
def _gathered_attention_packed_bwd_fake(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Tensor:
    *batch, H, N, D = query.shape
    return query.new_empty(batch[0], N, *batch[1:], 3, H, D)
