"""`gathered_attention`: public function in api.py, definition in reference.py."""

from .api import gathered_attention

__all__ = ["gathered_attention"]
