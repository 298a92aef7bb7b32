"""The published functions, one file per origin: same names, arguments, return order, dtypes and random-number use."""

from . import chat_univi, ermvp, flashvid, hot, prunevid, sparsevlm, tcformer, token_reduction

__all__ = ["chat_univi", "ermvp", "flashvid", "hot", "prunevid", "sparsevlm", "tcformer", "token_reduction"]
