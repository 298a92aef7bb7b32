"""The torch.autograd.Functions behind the public functions, to build on. Inputs are not checked here."""

from .ops.gather_tokens.api import GatherTokens
from .ops.gathered_attention.api import GatheredAttention, PackedAttention
from .ops.merge_tokens.api import MergeTokens
from .ops.recovery_attention.api import RecoveryAttention

__all__ = ["GatherTokens", "GatheredAttention", "MergeTokens", "PackedAttention", "RecoveryAttention"]
