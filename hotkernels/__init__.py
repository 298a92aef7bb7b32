"""Fused kernels for token-pruning transformers: density-peak clustering, gathered attention, token recovery."""

from .backends import explain
from .errors import checked
from .ops.dpc_knn import DensityPeaks, dpc_knn
from .ops.gather_tokens import gather_tokens
from .ops.merge_tokens import merge_tokens

__version__ = "0.1.0"
__all__ = ["DensityPeaks", "checked", "dpc_knn", "explain", "gather_tokens", "merge_tokens"]
