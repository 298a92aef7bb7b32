"""The inverted index: which entries refer to each token? Backward passes sum over it, in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...backends import LIBRARIES, Kernel, call, choose, register
from ...dtypes import INTEGER
from ...errors import check_index, check_int, check_tensor, fail
from ...operators import fake
from .reference import invert_index_reference

_OP = "invert_index"
register(
    _OP,
    torch=Kernel(INTEGER),
    cpp=Kernel(INTEGER, device="cpu", library="_C_cpu"),
    cuda=Kernel(INTEGER, device="cuda", library="_C_cuda"),
)
if LIBRARIES["_C_cpu"] is None and LIBRARIES["_C_cuda"] is not None:
    # On a GPU without our CUDA library, Triton's attention still inverts its index, inside its backward.
    torch.library.impl("hotkernels::invert_index", "cuda")(invert_index_reference)


class InvertedIndex(NamedTuple):
    """An index together with its inverse. `gathered_attention` takes it in place of the index."""

    index: Tensor  # type: ignore[assignment]  # tuple.index, which nobody calls on this
    """The index as it was given, int64."""
    start: Tensor
    """[..., num_tokens + 1] int64: where each token's entries begin in `slots`; the last one is where they all end."""
    slots: Tensor
    """[..., L] int64: positions in the flattened index, token by token, ascending for each."""


def invert_index(index: Tensor, num_tokens: int, *, dims: int = 1, backend: str | None = None) -> InvertedIndex:
    """Invert an index once, for many backward passes (layers, heads, steps) that use it.

    Equivalent to, per row::

        order = index.sort(stable=True).indices
        slots_of_token_n = order[index[order] == n]

    Args:
        index: [..., L] int64 or int32 in [-1, num_tokens); -1 refers to nothing.
        num_tokens: N.
        dims: how many of the last dims are entries of one row: 1 for a set [B, M], 2 for keys per query [..., Nq, K].
        backend: "torch", "cpp", "cuda", or None for the fastest that can serve the call.

    Returns:
        InvertedIndex(index, start [..., N + 1], slots [..., L]); entries after start[..., N] are unspecified.

    Raises:
        ValueError, TypeError: ``invert_index: <arg> must be <expected>, got <actual>``.

    Cost: a counting sort, O(L + N) per row; on a GPU, rows of more than 8192 entries by a radix sort with 16 bytes of
    scratch per entry.

    Example::

        >>> import torch, hotkernels
        >>> inverted = hotkernels.invert_index(torch.tensor([[2, 0, 2]]), num_tokens=3)
        >>> inverted.start, inverted.slots
        (tensor([[0, 1, 1, 3]]), tensor([[1, 0, 2]]))
    """
    check_tensor(_OP, "index", index, "[..., L]", INTEGER)
    check_int(_OP, "num_tokens", num_tokens, 0, torch.iinfo(torch.int64).max - 1)
    check_int(_OP, "dims", dims, 1, None)
    if index.dim() < dims:
        fail(_OP, "index", f"of at least dims = {dims} dims", list(index.shape))
    index = index.long().contiguous()
    rows = index.flatten(-dims) if dims > 1 else index
    chosen = choose(_OP, index, backend)
    check_index(_OP, "index", index, num_tokens, chosen)
    if chosen == "torch":
        return InvertedIndex(index, *invert_index_reference(rows, num_tokens))
    return InvertedIndex(index, *call(torch.ops.hotkernels.invert_index, rows, num_tokens))


@fake("invert_index")
def _invert_index_fake(index: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    return index.new_empty(*index.shape[:-1], num_tokens + 1), torch.empty_like(index)
