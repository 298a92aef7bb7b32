"""Recovery cross-attention in plain PyTorch: learned queries, the same for all samples, attend to the kept tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gathered_attention.reference import gathered_attention_reference


def recovery_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return softmax(scale * query key^T) value, [*batch, H, L, D]; query may lack the batch dims."""
    query = query.expand(*key.shape[:-3], *query.shape[-3:])
    return gathered_attention_reference(
        query,
        key,
        value,
        key_bias=None if key_mask is None else mask_bias(key_mask, key),
        scale=scale,
        dropout_p=dropout_p,
        return_lse=False,
    )[0]


def mask_bias(key_mask: Tensor, key: Tensor) -> Tensor:
    """Turn a mask [*batch, M], True = attend, into a bias on the logits, 0 or -inf, of the type they have."""
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    return torch.zeros(key_mask.shape, dtype=dtype, device=key.device).masked_fill(~key_mask, -torch.inf)
