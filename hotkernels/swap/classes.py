"""The subclass that a swapped module has: a twin's forward, methods that call other functions, and how to pickle it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

# Method -> what it calls instead of some functions of its file: ((method, ((name, function), ...)), ...).
Calls = tuple[tuple[str, tuple[tuple[str, Callable[..., Any]], ...]], ...]


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


def hidden_name(function: Callable[..., Any]) -> str:
    """The name under which a file's globals hold a function of ours."""
    return f"_hotkernels_{function.__module__.rpartition('.')[2]}_{function.__name__}"


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those defined inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from codes(const)


def _calling(method: FunctionType, renames: tuple[tuple[str, Callable[..., Any]], ...]) -> FunctionType:
    """A copy of a method that calls these functions where it names those of its file.

    The copy shares the file's globals, which `torch.compile` looks names up in, and in which they may change.
    """
    names = {name: hidden_name(function) for name, function in renames}
    method.__globals__.update((hidden_name(function), function) for _, function in renames)

    def rename(code: CodeType) -> CodeType:
        return code.replace(
            co_names=tuple(names.get(name, name) for name in code.co_names),
            co_consts=tuple(rename(c) if isinstance(c, CodeType) else c for c in code.co_consts),
        )

    copy: Any = FunctionType(
        rename(method.__code__), method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    functools.update_wrapper(copy, method)
    del copy.__wrapped__
    return copy
