"""The published functions, one file per origin: same names, arguments, return order, dtypes and random-number use."""

from . import chat_univi, ermvp, hot, prunevid, tcformer, token_reduction

__all__ = ["chat_univi", "ermvp", "hot", "prunevid", "tcformer", "token_reduction"]
