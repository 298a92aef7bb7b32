"""`invert_index`: public function in api.py, definition in reference.py."""

from .api import InvertedIndex, invert_index

__all__ = ["InvertedIndex", "invert_index"]
