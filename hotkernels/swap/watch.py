"""What a module held when it was swapped, and whether it still does: if not, no probe has seen what it computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .classes import codes, methods
from .probe import IN_PROBE, OF_EVERY_MODULE

SEEN = "_hotkernels_seen"
# Methods also look names up on tensors: those are not taken for attributes of the module.
_OF_EVERY_TENSOR = frozenset(dir(Tensor))
_NUMBERS = (int, float)  # the only objects that come back from pickle as two, if two places held one


def seen(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; names that its methods mention and it lacks (getattr with a default) map to `...`."""
    held = vars(module)
    mentioned: set[Any] = set()
    for name, method in methods(type(module)):
        if name != "__init__":
            for code in codes(method.__code__):
                mentioned.update(code.co_names, (c for c in code.co_consts if isinstance(c, str) and c.isidentifier()))
    layers = module._modules.keys() | module._parameters.keys() | module._buffers.keys()
    absent = sorted(mentioned - held.keys() - layers - _OF_EVERY_TENSOR - OF_EVERY_MODULE)
    attributes = {name: now for name, now in held.items() if name not in OF_EVERY_MODULE}
    # A property is not replaced by setting an attribute, and looking at it runs it.
    return attributes | {name: ... for name in absent if not isinstance(getattr(type(module), name, None), property)}


def in_probe(module: Any) -> bool:
    """Whether a module is the replica that a probe runs."""
    return IN_PROBE in module.__dict__


def _differs(now: Any, before: Any) -> bool:
    return now is not before and not (isinstance(now, _NUMBERS) and type(now) is type(before) and now == before)


def changed(module: Any) -> list[str]:
    """The attributes of a swapped module that were set since, so that it runs its own forward."""
    held = vars(module)
    return sorted(name for name, before in held.get(SEEN, {}).items() if _differs(held.get(name, ...), before))


def as_seen(module: Any, weights: Iterable[str]) -> bool:
    """Whether a swapped module has the attributes and the class's forward of the swap, and no own weights but these.

    Compared by identity, which is fast; changes inside an object are not noticed.
    """
    cls, held = type(module), module.__dict__
    if in_probe(module):
        return True
    then = held.get(SEEN)
    if then is None:  # not swap has made it, but a call of the class of a module that was swapped
        return False
    if torch.compiler.is_compiling():  # its guards check attributes, not whether a dict has a key
        for name in then:
            getattr(module, name, None)
    for name, before in then.items():
        if _differs(held.get(name, ...), before):
            return False
    own = module._parameters or module._buffers
    if own and any(
        t is not None and name not in weights for name, t in (*module._parameters.items(), *module._buffers.items())
    ):
        return False
    return cls._hotkernels_original.forward is cls._hotkernels_forward
