"""The published functions, one file per origin: same names, arguments, return order, dtypes and random-number use."""

from . import chat_univi, hot, prunevid, tcformer

__all__ = ["chat_univi", "hot", "prunevid", "tcformer"]
