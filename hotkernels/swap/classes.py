"""The subclass that a swapped module has: a twin's forward, methods that call other functions, and how to pickle it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# What a function calls instead of some functions of its file: name -> function, or name -> what that one calls instead.
Renames = tuple[tuple[str, Any], ...]
Calls = tuple[tuple[str, Renames], ...]  # the same per method


def is_swapped(module: nn.Module) -> bool:
    """Whether a module has a class of ours."""
    return "_hotkernels_spec" in vars(type(module))


def subclass(original: type[nn.Module], twin: type | None, calls: Calls = ()) -> type[nn.Module]:
    """The subclass of `original` with the twin's forward and the methods that `calls` names; made once."""
    spec = (twin, calls)
    for known in original.__subclasses__():
        if vars(known).get("_hotkernels_spec") == spec:
            return known
    namespace: dict[str, Any] = {
        "_hotkernels_spec": spec,
        "_hotkernels_original": original,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
    }
    for method, renames in calls:
        namespace[method] = _calling(getattr(original, method), renames)
    bases = (original,) if twin is None else (twin, original)
    metaclass: Any = type(original)
    return metaclass(f"Fused{original.__name__}", bases, namespace)


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """As the original class reduces, with that class in place of ours, which no import finds."""
    cls: Any = type(self)
    function, args, *rest = cls._hotkernels_original.__reduce_ex__(self, max(int(protocol), 2))
    args = tuple(cls._hotkernels_original if arg is cls else arg for arg in args)
    return _rebuild, (cls._hotkernels_original, *cls._hotkernels_spec, function, args), *rest


def _rebuild(
    original: type[nn.Module], twin: type | None, calls: Calls, function: Callable[..., Any], args: Any
) -> Any:
    module = function(*args)
    module.__class__ = subclass(original, twin, calls)
    return module


def hidden_name(name: str, target: Any) -> str:
    """The name under which a file's globals hold what is called in place of `name`."""
    return f"_hotkernels_{name}_{hash(target) & 0xFFFFFFFF:x}"


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those defined inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from codes(const)


def _calling(function: FunctionType, renames: Renames) -> FunctionType:
    """A copy of a function that calls others in place of those of its file.

    The copy shares the file's globals, which `torch.compile` looks names up in, and in which they may change.
    """
    names = {name: hidden_name(name, target) for name, target in renames}
    for name, target in renames:
        nested = isinstance(target, tuple)
        function.__globals__[names[name]] = _calling(function.__globals__[name], target) if nested else target

    def rename(code: CodeType) -> CodeType:
        return code.replace(
            co_names=tuple(names.get(name, name) for name in code.co_names),
            co_consts=tuple(rename(c) if isinstance(c, CodeType) else c for c in code.co_consts),
        )

    copy: Any = FunctionType(
        rename(function.__code__), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    del copy.__wrapped__
    return copy
