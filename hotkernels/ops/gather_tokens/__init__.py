"""`gather_tokens`: public function in api.py, definition in reference.py."""

from .api import gather_tokens

__all__ = ["gather_tokens"]
