"""`recovery_attention`: public function in api.py, definition in reference.py."""

from .api import recovery_attention

__all__ = ["recovery_attention"]
