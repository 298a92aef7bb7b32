"""The published functions that swap knows, and where the methods of a model call them."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compat import chat_univi, hot, prunevid, tcformer
from . import probe
from .classes import Calls, Renames, codes

_B, _N, _M = 2, 24, 7  # of the probes; up to 25 tokens, cdist computes distances exactly


def _tokens(dtype: torch.dtype) -> Tensor:
    return torch.randn(_B, _N, 8).to(dtype)


def _token_dict(dtype: torch.dtype) -> dict[str, Any]:
    grid = {"token_num": _N, "map_size": [4, 6], "init_grid_size": [6, 8]}
    return {
        "x": _tokens(dtype),
        "idx_token": torch.randint(_N, (_B, 48)),
        "agg_weight": torch.rand(_B, 48, 1),
        **grid,
    }


@dataclass(frozen=True)
class Form:
    """A published function: ours, and the calls on which another must answer the same to be replaced by it."""

    replacement: Callable[..., Any]
    calls: Callable[[], list[tuple[Any, ...]]]


def _mask() -> Tensor:
    return (torch.arange(_N) % 5 != 3).expand(_B, -1)


def _clusterings(tokens: Callable[[torch.dtype], Any], *arguments: int, half: bool = False) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = [(tokens(torch.float32), *arguments), (tokens(torch.float32), *arguments, _mask())]
    return [*calls, (tokens(torch.bfloat16), *arguments)] if half else calls


def _merges() -> list[tuple[Any, ...]]:
    assignment = torch.randint(_M, (_B, _N))
    return [(_token_dict(torch.float32), assignment, _M, w) for w in (None, torch.rand(_B, _N, 1))]


# Those that compute in float32 whatever they get come before those that do not, which answer the same in float32.
FORMS: dict[str, list[Form]] = {
    "cluster_dpc_knn": [
        Form(hot.cluster_dpc_knn, lambda: _clusterings(_tokens, _M, 3)),
        Form(prunevid.cluster_dpc_knn, lambda: _clusterings(_tokens, _M, 3, half=True)),
        Form(chat_univi.cluster_dpc_knn, lambda: _clusterings(_token_dict, _M, 3, half=True)),
        Form(tcformer.cluster_dpc_knn, lambda: _clusterings(_token_dict, _M, 3)),
    ],
    "cluster_dpc_knn_center": [Form(hot.cluster_dpc_knn_center, lambda: _clusterings(_tokens, _M, 3, 11))],
    "merge_tokens": [Form(tcformer.merge_tokens, _merges), Form(chat_univi.merge_tokens, _merges)],
}


def find_calls(cls: type[nn.Module]) -> tuple[Calls, list[tuple[str, str]]]:
    """What the methods of a class call that can be replaced, and what cannot: (method, why not)."""
    calls: list[tuple[str, Renames]] = []
    left: list[tuple[str, str]] = []
    for method, function in _methods(cls):
        refused: list[str] = []
        renames = _find_renames(function, (), refused)
        if renames and getattr(cls, method) is not function:
            refused.extend(f"{name}: called in a method that a derived class overrides" for name, _ in renames)
        elif renames:
            calls.append((method, renames))
        left.extend((method, why) for why in refused)
    return tuple(calls), left


def _find_renames(function: FunctionType, callers: tuple[FunctionType, ...], refused: list[str]) -> Renames:
    """What a function calls that can be replaced, itself or through other functions of its package."""
    renames: list[tuple[str, Any]] = []
    for name in sorted({name for code in codes(function.__code__) for name in code.co_names}):
        target = function.__globals__.get(name)
        if not isinstance(target, FunctionType) or target.__module__.startswith("hotkernels.compat."):
            continue
        found: Any = ()
        if target.__name__ in FORMS:
            found = find_form(target)
        elif target not in (function, *callers) and _package(target) == _package(function):
            found = _find_renames(target, (*callers, function), refused)
        uses = _uses(function.__code__, name) if found else set()
        if "LOAD_GLOBAL" not in uses:
            continue
        if isinstance(found, str) or uses != {"LOAD_GLOBAL"}:
            refused.append(f"{name}: {found if isinstance(found, str) else 'it is also the name of an attribute'}")
        else:
            renames.append((name, found))
    return tuple(renames)


def _package(function: FunctionType) -> str:
    return function.__module__.partition(".")[0]


def _methods(cls: type) -> list[tuple[str, FunctionType]]:
    """The methods of a class and of its bases, up to those of torch."""
    return [
        (name, attribute)
        for base in cls.__mro__
        if not base.__module__.startswith("torch.")
        for name, attribute in vars(base).items()
        if isinstance(attribute, FunctionType)
    ]


def _uses(function: CodeType, name: str) -> set[str]:
    """The kinds of instruction by which a code uses a name."""
    return {step.opname for code in codes(function) for step in dis.get_instructions(code) if step.argval == name}


def find_form(function: FunctionType) -> Callable[..., Any] | str:
    """Our function that answers as a published one of its name does; a string says why there is none."""
    forms = [form for form in FORMS[function.__name__] if _accepts(form.replacement, function)]
    if not forms:
        return f"its arguments {inspect.signature(function)} are of no published form"
    for form in forms:
        with probe.seeded(torch.device("cpu")):
            if all(_answers_alike(function, form.replacement, args) for args in form.calls()):
                return form.replacement
    return "its answers are of no published form"


def _accepts(ours: Callable[..., Any], theirs: FunctionType) -> bool:
    """Whether every call of theirs is one of ours."""
    mine, given = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    needed = [p for p in mine[len(given) :] if p.default is p.empty]
    return (
        not needed
        and len(given) <= len(mine)
        and all(
            (a.name, a.kind) == (b.name, b.kind) and b.default in (b.empty, a.default)
            for a, b in zip(mine, given, strict=False)
        )
    )


def _answers_alike(theirs: FunctionType, ours: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether both return the same and leave the generator in the same state."""
    masked = isinstance(args[-1], Tensor) and args[-1].dtype == torch.bool
    if masked and len(args) > len(inspect.signature(theirs).parameters):
        return True  # it takes no mask
    state = torch.get_rng_state()
    try:
        expected = theirs(*args), torch.get_rng_state()
    except Exception:  # an unknown function may raise anything
        return False
    torch.set_rng_state(state)
    got = ours(*args), torch.get_rng_state()
    if masked:  # what becomes of masked tokens differs, see compat.hot
        expected, got = ((pytree.tree_map(lambda t: _of_valid(t, args[-1]), r[0]), r[1]) for r in (expected, got))
    return probe.same(expected, got)


def _of_valid(result: Any, mask: Tensor) -> Any:
    """Of a clustering, the chosen tokens in ascending order, or which pairs of valid tokens share a cluster."""
    if not isinstance(result, Tensor):
        return result
    if result.shape != mask.shape:
        return result.sort(-1).values
    return (result[:, :, None] == result[:, None, :]) & mask[:, :, None] & mask[:, None, :]
