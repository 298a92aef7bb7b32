"""The torch.autograd.Functions behind the public functions, for those who build on them. Inputs are not checked here."""

from .ops.gather_tokens.api import GatherTokens
from .ops.merge_tokens.api import MergeTokens

__all__ = ["GatherTokens", "MergeTokens"]
