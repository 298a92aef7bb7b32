"""The torch.autograd.Functions behind the public functions, to build on. Inputs are not checked here."""

from .ops.gather_tokens.api import GatherTokens
from .ops.merge_tokens.api import MergeTokens

__all__ = ["GatherTokens", "MergeTokens"]
