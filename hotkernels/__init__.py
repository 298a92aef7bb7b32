"""Fused kernels for token-pruning transformers: density-peak clustering, gathered attention, token recovery."""

from . import autograd, compat, models, nn
from .backends import Explanation, explain
from .errors import checked
from .ops.dpc_knn import DensityPeaks, dpc_knn
from .ops.gather_tokens import gather_tokens
from .ops.gathered_attention import gathered_attention
from .ops.invert_index import InvertedIndex, invert_index
from .ops.merge_tokens import merge_tokens
from .ops.recovery_attention import recovery_attention
from .swap import SwapReport, Twin, register_twin, swap, swapped, unswap

__version__ = "0.1.0"
__all__ = [
    "DensityPeaks",
    "Explanation",
    "InvertedIndex",
    "SwapReport",
    "Twin",
    "autograd",
    "checked",
    "compat",
    "dpc_knn",
    "explain",
    "gather_tokens",
    "gathered_attention",
    "invert_index",
    "merge_tokens",
    "models",
    "nn",
    "recovery_attention",
    "register_twin",
    "swap",
    "swapped",
    "unswap",
]
