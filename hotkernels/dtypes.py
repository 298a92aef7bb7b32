"""The dtypes that operators take and sum in, and how messages name them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

HALF = (torch.float16, torch.bfloat16)
FUSED = (torch.float32, *HALF)  # which kernels take
FLOATING = (*FUSED, torch.float64)
INTEGER = (torch.int64, torch.int32)
REAL = (*FLOATING, *INTEGER, torch.int16, torch.int8, torch.uint8, torch.bool)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over a dtype: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def names(dtypes: Sequence[torch.dtype]) -> str:
    """`float32, float16 or bfloat16`."""
    words = [str(d).removeprefix("torch.") for d in dtypes]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
