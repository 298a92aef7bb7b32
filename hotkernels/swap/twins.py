"""Twins: fused forwards for forms of modules, their registry, and whether a module computes what its twin does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..dtypes import HALF
from ..errors import fail
from . import probe
from .classes import subclass


class Twin:
    """The fused forward for one form of module; it runs with the module's own parameters and attributes as `self`.

    Derive from it and register the class with `hotkernels.register_twin`. There, `super().forward` is the module's own,
    for the calls that yours does not serve.
    """

    kind: ClassVar[str]
    forward: Callable[..., Any]
    _hotkernels_probed: ClassVar[bool] = True  # False: its class alone says what it does, as nn.Sequential

    @classmethod
    def fits(cls, module: nn.Module) -> bool | str:
        """Whether `module` has this form. A string says why one that looks like it is left alone."""
        raise NotImplementedError

    @classmethod
    def examples(cls, module: nn.Module) -> list[tuple[Any, ...]]:
        """Small random inputs, of the module's dtype and device, on which both forwards are compared."""
        raise NotImplementedError

    @classmethod
    def long_examples(cls, module: nn.Module) -> list[tuple[Any, ...]]:
        """The same with a few hundred tokens, to compare outputs alone: they reveal windows and top-k attention."""
        return []

    @classmethod
    def describe(cls, module: nn.Module) -> str:
        """What a report says of a module that is served."""
        return cls.kind


T = TypeVar("T", bound=type[Twin])
TAKES = "its forward takes"
_FAILS = "its forward or its gradient fails"
TWINS: list[type[Twin]] = []


def register_twin(twin: T) -> T:
    """Make `hotkernels.swap` know one more form of module; decorates a class derived from `hotkernels.Twin`.

    The class has a name for reports (`kind`) and says which modules it fits, on which inputs to compare, and what the
    fused forward is. It is asked before those registered earlier. A module whose output differs is left alone. The
    fused forward has to heed what is set on a module after the swap, and hooks on layers that it does not call.

    Args:
        twin: the class.

    Returns:
        twin.

    Raises:
        TypeError: ``register_twin: twin must be a subclass of hotkernels.Twin with ..., got ...``.

    Example::

        >>> import torch, hotkernels
        >>> class MyAttention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.to_qkv = torch.nn.Linear(32, 96)
        ...     def forward(self, x):  # [B, N, C], 4 heads
        ...         q, k, v = self.to_qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        ...         return ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        >>> @hotkernels.register_twin
        ... class FusedMyAttention(hotkernels.Twin):
        ...     kind = "my attention"
        ...     fits = staticmethod(lambda module: isinstance(module, MyAttention))
        ...     examples = staticmethod(lambda module: [(torch.randn(2, 5, 32),)])
        ...     def forward(self, x):
        ...         q, k, v = self.to_qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        ...         return hotkernels.gathered_attention(q, k, v).transpose(1, 2).flatten(2)
        >>> print(hotkernels.swap(torch.nn.Sequential(MyAttention(), MyAttention())))
        replaced
          * (2)  my attention
    """
    if not (isinstance(twin, type) and issubclass(twin, Twin)):
        fail("register_twin", "twin", "a subclass of hotkernels.Twin", repr(twin), TypeError)
    for name in ("kind", "fits", "examples", "forward"):
        if inspect.getattr_static(twin, name, None) is inspect.getattr_static(Twin, name, None):
            expected = "a subclass of hotkernels.Twin with kind, fits, examples and forward"
            fail("register_twin", "twin", expected, f"{twin.__name__} without {name}", TypeError)
    TWINS.insert(0, twin)
    return twin


def find_twin(module: nn.Module, verdicts: dict[Any, str | None]) -> type[Twin] | str | None:
    """The twin that serves a module, why a module that looks like attention is left alone, or None for any other.

    `verdicts` keeps what probes of modules like this one have said.
    """
    reasons: list[str] = []
    for twin in TWINS:
        fits = twin.fits(module)
        if isinstance(fits, str):
            reasons.append(fits)
        elif fits and not twin._hotkernels_probed:
            if not (underived := _underived(module, twin)):
                return twin
            reasons.append(underived)
        elif fits and any(map(nn.parameter.is_lazy, (*module.parameters(), *module.buffers()))):
            reasons.append("it has parameters whose shape is not known yet")
        elif fits:
            key = (twin, probe.fingerprint(module))
            if key not in verdicts:
                verdicts[key] = _difference(module, twin)
            if verdicts[key] is None:
                return twin
            reasons.append(str(verdicts[key]))
    if reasons:  # rather that of a form whose arguments it takes, and on whose examples it runs
        return min(reasons, key=lambda reason: (reason.startswith(TAKES), reason.startswith(_FAILS)))
    return "a form of attention that swap does not know" if _looks_like_attention(module) else None


def _looks_like_attention(module: nn.Module) -> bool:
    """By its name, if it has projections, directly or in a container, and no attention inside."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    names = [type(m).__name__.lower() for m in module.modules()]
    known = [isinstance(m, nn.MultiheadAttention) for m in module.modules()]
    named = [k or "attention" in name or "attn" in name for k, name in zip(known, names, strict=True)]
    linears = sum(isinstance(m, nn.Linear) for m in module.modules())
    return named[0] and not any(named[1:]) and linears > 1


def _difference(module: nn.Module, twin: type[Twin]) -> str | None:
    """How a module differs from its twin, in evaluation or in training without dropout; None if it does not."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return "on the meta device nothing can be compared"
    with probe.seeded(device):
        copy = probe.replica(module)
        if any(p.dtype in HALF for p in copy.parameters()):
            for args in twin.examples(copy):
                if found := _differs(copy, twin, args, []):
                    return found
            copy.float()  # whose rounding cannot hide another function
        with torch.enable_grad():
            for args in pytree.tree_map(_wide, twin.examples(copy)):
                leaves = probe.leaves(copy, args)
                for training in (False, True):
                    if found := _differs(copy.train(training), twin, args, leaves):
                        return found + (" in training" if training else "")
        copy.eval().requires_grad_(False)
        for args in pytree.tree_map(_wide, twin.long_examples(copy)):
            if found := _differs(copy, twin, args, []):
                return found + " on long input"
            if found := _differs(copy, twin, pytree.tree_map(_large, args), []):
                return found + " on large input"
        for args in pytree.tree_map(_wide, twin.examples(copy)):
            if found := _drops_elsewhere(copy.train(), twin, args, device):
                return found
    return None


def _large(value: Any) -> Any:
    """What an example holds, 8 times as large: so that logits reach hundreds, where some code clamps them."""
    return value * 8 if isinstance(value, Tensor) and value.is_floating_point() else value


def _drops_elsewhere(copy: nn.Module, twin: type[Twin], args: Any, device: torch.device) -> str | None:
    """Which of a replica's dropouts its forward applies elsewhere than the twin, from the same random numbers."""
    original = type(copy)
    for name, drop in copy.named_modules():
        if type(drop) is not nn.Dropout:
            continue
        drop.p, results = 0.5, []
        try:
            for cls in (original, subclass(original, twin)):
                copy.__class__ = cls
                probe.seed(device)
                results.append(copy.forward(*args))
        finally:
            copy.__class__, drop.p = original, 0.0
        if not probe.same(*results):
            return f"it applies {name} elsewhere than {twin.kind}"
    return None


def _wide(value: Any) -> Any:
    """What an example holds, in float32 if it is in half precision."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _differs(copy: nn.Module, twin: type[Twin], args: tuple[Any, ...], leaves: list[Tensor]) -> str | None:
    """How a replica's forward differs from the twin's on one input; None if it does not."""
    original = type(copy)
    state, before = probe.random_state(), probe.attributes(copy)
    given = [(leaf, leaf.detach().clone()) for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    try:
        expected = copy.forward(*args)
        drawn = state != probe.random_state()
        gradients = probe.gradients(expected, leaves)
    except Exception as error:  # an unknown module may raise anything
        values = ", ".join(str([*a.shape] if isinstance(a, Tensor) else a) for a in pytree.tree_leaves(args))
        return f"{_FAILS} ({type(error).__name__} on {values})"
    if drawn:
        return "its forward draws random numbers"
    if not all(torch.equal(leaf, value) for leaf, value in given):
        return "its forward changes its input"
    if stored := probe.stored(copy, before):
        return f"its forward stores {stored}"
    if underived := _underived(copy, twin):
        return underived
    copy.__class__ = subclass(original, twin)
    try:
        got = copy.forward(*args)
    except Exception as error:  # of shapes other than the form's
        return f"{twin.kind} fails on what it takes ({type(error).__name__})"
    finally:
        copy.__class__ = original
    try:
        if not probe.same(expected, got):
            if not isinstance(expected, Tensor) and isinstance(got, Tensor):
                return f"it returns a {type(expected).__name__}"
            return f"its output differs from {twin.kind}"
    except probe.IncomparableError as error:
        return f"its output is {error}"
    if not probe.same(gradients, probe.gradients(got, leaves)):
        return f"its gradients differ from {twin.kind}"
    return None


def _underived(module: nn.Module, twin: type[Twin]) -> str | None:
    """Why a module cannot have a class that is derived from its own; None if it can."""
    try:
        subclass(type(module), twin)
    except Exception as error:  # of its metaclass or __init_subclass__
        return f"its class cannot be derived from ({error})"
    return None
