"""Inverting an index, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def invert_index_reference(index: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return (start [..., num_tokens + 1], slots [..., L]) of index [..., L]: a stable sort and its boundaries."""
    there = (index >= 0) & (index < num_tokens)
    owner, slots = index.where(there, num_tokens).sort(dim=-1, stable=True)
    counts = index.new_zeros(*index.shape[:-1], num_tokens + 2).scatter_add(
        -1, owner + 1, index.new_ones(()).expand_as(owner)
    )
    return counts.cumsum(-1)[..., :-1].contiguous(), slots
