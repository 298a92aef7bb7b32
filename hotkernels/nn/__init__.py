"""Drop-in modules: constructor arguments, attribute names and state_dict keys of the published ones, fused inside."""

from .attention import Attention, CrossAttention
from .hourglass import TokenPruning, TokenRecovery
from .routing import BiLevelRoutingAttention

__all__ = ["Attention", "BiLevelRoutingAttention", "CrossAttention", "TokenPruning", "TokenRecovery"]
