"""`merge_tokens`: public function in api.py, definition in reference.py."""

from .api import merge_tokens

__all__ = ["merge_tokens"]
