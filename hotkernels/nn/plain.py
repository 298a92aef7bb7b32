"""Whether a layer does what its class does and nothing else, so that its work may be done without calling it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

DROPS = (nn.Dropout, nn.Identity)


def has_hooks(layer: nn.Module) -> bool:
    """Whether calling a layer also calls hooks of its own."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks)


def is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling a layer only runs the forward of one of these classes; derived classes do not count.

    So it has no hooks (weight_norm is one), no global module hooks are set, and no forward is set on the instance.
    """
    return type(layer) in kinds and not (has_hooks(layer) or _has_any_global_hook() or "forward" in vars(layer))


def dropout_p(drop: nn.Module) -> float:
    """The probability with which a Dropout, or an Identity in its place, drops in its present mode."""
    return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0


def is_idle(drop: nn.Module) -> bool:
    """Whether what stands in a Dropout's place passes its input on, in its present mode, and does nothing else."""
    return is_plain(drop, *DROPS) and not dropout_p(drop)
