"""Recovery cross-attention in plain PyTorch: learned queries, the same for all samples, attend to the kept tokens."""

from __future__ import annotations

from torch import Tensor

from ..gathered_attention.reference import gathered_attention_reference, mask_bias


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
