"""The torch.autograd.Functions behind the public functions, to build on.

What the public functions convert and broadcast must come as the raw operators take it: they check it, and say so.
"""

from .ops.gather_tokens.api import GatherTokens
from .ops.gathered_attention.api import GatheredAttention, PackedAttention
from .ops.merge_tokens.api import MergeTokens
from .ops.recovery_attention.api import RecoveryAttention

__all__ = ["GatherTokens", "GatheredAttention", "MergeTokens", "PackedAttention", "RecoveryAttention"]
