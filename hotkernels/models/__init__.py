"""HoT's pose transformers in native layout: published parameters and answers, and not one layout copy."""

from . import strategies
from .mixste import HoTMixSTE
from .motionbert import HoTMotionBERT

__all__ = ["HoTMixSTE", "HoTMotionBERT", "strategies"]
