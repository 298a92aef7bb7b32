"""The subclass that a swapped module has: a twin's forward, methods that call other functions, and how to pickle it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

# Replacements inside one function: a name that it calls, as "cluster" or "utils.cluster" -> our function, or -> Renames
# inside the function of that name.
Renames = tuple[tuple[str, Any], ...]
Calls = tuple[tuple[str, Renames], ...]  # method -> its Renames
_OF_TWINS = ("kind", "fits", "examples", "long_examples", "describe")


def is_swapped(module: nn.Module) -> bool:
    """Whether a module has a class of ours, or one derived from it since, as by register_parametrization."""
    return any("_hotkernels_spec" in vars(cls) for cls in type(module).__mro__)


def subclass(original: type[nn.Module], twin: type | None, calls: Calls = ()) -> type[nn.Module]:
    """The subclass of `original` with the twin's forward and the methods that `calls` names; made once."""
    spec = (twin, calls)
    for known in original.__subclasses__():
        if vars(known).get("_hotkernels_spec") == spec and vars(known)["_hotkernels_forward"] is original.forward:
            return known
    namespace: dict[str, Any] = {
        "_hotkernels_original": original,
        "_hotkernels_forward": original.forward,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
    }
    # A twin lends its forward alone: the other names of Twin must not hide what the module has under them.
    own = {name for name in _OF_TWINS if twin is not None and hasattr(original, name)}
    namespace |= {name: inspect.getattr_static(original, name) for name in own}
    for method, renames in calls:
        namespace[method] = _calling(getattr(original, method), renames)
    parents = (original,) if twin is None else (twin, original)
    metaclass: Any = type(original)
    made = metaclass(f"Fused{original.__name__}", parents, namespace)
    made._hotkernels_spec = spec  # not before: a class whose __init_subclass__ fails stays among __subclasses__()
    return made


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Reduce as the original class does, with that class in place of ours, which no import finds."""
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


def look_up(names: dict[str, Any], path: str) -> Any:
    """What a dotted name is in a file's globals."""
    first, *attributes = path.split(".")
    return functools.reduce(getattr, attributes, names[first])


def hidden_names(renames: Renames) -> dict[str, tuple[str, Renames]]:
    """Per name of a file: the one under which its globals hold what replaces it, and what is replaced inside it.

    A function is replaced itself, ("", ours); a module by one that differs in some functions.
    """
    inside: dict[str, list[tuple[str, Any]]] = {}
    for path, target in renames:
        first, _, rest = path.partition(".")
        inside.setdefault(first, []).append((rest, target))
    return {
        name: (f"_hotkernels_{name}_{hash(tuple(parts)) & 0xFFFFFFFF:x}", tuple(parts))
        for name, parts in inside.items()
    }


def bases(cls: type) -> list[type]:
    """A class and its bases, without those of torch."""
    return [base for base in cls.__mro__ if not base.__module__.startswith("torch.")]


def methods(cls: type) -> list[tuple[str, FunctionType]]:
    """The methods of a class, with those that derived classes override."""
    return [
        (name, attribute)
        for base in bases(cls)
        for name, attribute in vars(base).items()
        if isinstance(attribute, FunctionType)
    ]


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those defined inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from codes(const)


def _replaced(theirs: Any, parts: Renames) -> Any:
    """What a name of a file stands for once these parts of it are replaced."""
    if isinstance(theirs, ModuleType):
        module: Any = ModuleType(theirs.__name__)
        module.__getattr__ = lambda name: getattr(theirs, name)  # the rest is looked up when it is used
        for name, (_, inner) in hidden_names(parts).items():
            setattr(module, name, _replaced(getattr(theirs, name), inner))
        return module
    ((_, target),) = parts
    return _calling(theirs, target) if isinstance(target, tuple) else target


def _calling(function: FunctionType, renames: Renames) -> FunctionType:
    """A copy of a function that calls others in place of those of its file.

    The copy shares the file's globals, where `torch.compile` looks names up, and which may change.
    """
    hidden = hidden_names(renames)
    for name, (ours, parts) in hidden.items():
        function.__globals__[ours] = _replaced(function.__globals__[name], parts)
    names = {name: ours for name, (ours, _) in hidden.items()}

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
