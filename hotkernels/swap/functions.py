"""The published functions that swap knows, and where the methods of a model call them."""

from __future__ import annotations

import dis
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import _lru_cache_wrapper, cached_property, partial, partialmethod
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compat import chat_univi, ermvp, flashvid, hot, prunevid, sparsevlm, tcformer, token_reduction
from . import probe
from .classes import Calls, Renames, bases, codes, methods, subclass

_B, _N, _M = 2, 24, 7  # of the probes; up to 25 tokens, cdist computes distances exactly
# N, M, k: more tokens, of which rounding reorders none (on 300 seeds; of 300 tokens, it does on one), and k > M.
_MORE, _K_ABOVE_M = (100, 30, 9), (_N, 3, 5)
_M_ABOVE_N, _K_ABOVE_N = (4, 5, 3), (4, 3, 5)  # errors, unless a function clamps them
_SIZES = (_N, _M, 3), _MORE, _M_ABOVE_N


def _tokens(dtype: torch.dtype, N: int = _N) -> Tensor:
    return torch.randn(_B, N, 8, dtype=torch.float32).to(dtype)


def _token_dict(dtype: torch.dtype, N: int = _N) -> dict[str, Any]:
    grid = {"token_num": N, "map_size": [4, 6], "init_grid_size": [6, 8]}
    return {
        "x": _tokens(dtype, N),
        "idx_token": torch.randint(N, (_B, 48)),
        "agg_weight": torch.rand(_B, 48, 1, dtype=torch.float32),
        **grid,
    }


@dataclass(frozen=True)
class Form:
    """A published function: ours, and the calls on which another must answer the same to be replaced by it.

    `index` is which result of a clustering says what it chose, if one does.
    """

    replacement: Callable[..., Any]
    calls: Callable[[], list[tuple[Any, ...]]]
    index: int | None = None


def _mask() -> Tensor:
    return (torch.arange(_N) % 5 != 3).expand(_B, -1)


def _clusterings(tokens: Callable[..., Any], *center: int, half: bool = False) -> list[tuple[Any, ...]]:
    plain = _M, 3, *center
    calls: list[tuple[Any, ...]] = [(tokens(torch.float32), *plain), (tokens(torch.float32), *plain, _mask())]
    for N, M, k in (_MORE, _M_ABOVE_N, _K_ABOVE_M, _K_ABOVE_N):
        calls.append((tokens(torch.float32, N), M, k, *center))
    return [*calls, (tokens(torch.bfloat16), *plain)] if half else calls


def _merges(*entries: str) -> list[tuple[Any, ...]]:
    """Calls with a token dict, or with these entries of it."""
    tokens, assignment = _token_dict(torch.float32), torch.randint(_M, (_B, _N))
    first = [tokens[key] for key in entries] if entries else [tokens]
    return [(*first, assignment, _M, w) for w in (None, torch.rand(_B, _N, 1, dtype=torch.float32))]


# Forms that always compute in float32 come before those that do not, which answer the same in float32.
FORMS: dict[str, list[Form]] = {
    "cluster_dpc_knn": [
        Form(hot.cluster_dpc_knn, lambda: _clusterings(_tokens), index=0),
        Form(token_reduction.cluster_dpc_knn, lambda: _clusterings(_tokens), index=1),
        Form(prunevid.cluster_dpc_knn, lambda: _clusterings(_tokens, half=True)),
        Form(ermvp.cluster_dpc_knn, lambda: _clusterings(_tokens)),
        Form(chat_univi.cluster_dpc_knn, lambda: _clusterings(_token_dict, half=True)),
        Form(tcformer.cluster_dpc_knn, lambda: _clusterings(_token_dict)),
    ],
    "cluster_dpc_knn_center": [Form(hot.cluster_dpc_knn_center, lambda: _clusterings(_tokens, 11), index=0)],
    "dpc_knn": [Form(flashvid.dpc_knn, lambda: _clusterings(_tokens, half=True), index=1)],
    "cluster_and_merge": [
        Form(sparsevlm.cluster_and_merge, lambda: [(_tokens(torch.float32, N), M) for N, M, _ in _SIZES])
    ],
    "merge_tokens": [
        Form(tcformer.merge_tokens, _merges),
        Form(chat_univi.merge_tokens, _merges),
        Form(token_reduction.merge_tokens, lambda: _merges("x", "idx_token", "agg_weight")),
        Form(ermvp.merge_tokens, lambda: _merges("x")),
    ],
}


CLUSTERINGS = frozenset({"cluster_dpc_knn", "cluster_dpc_knn_center", "dpc_knn"})  # of these `differences` can tell


def differences(ours: Callable[..., Any], got: Any, expected: Any) -> tuple[str, int, int]:
    """How results of a clustering differ: ("choices", tokens kept, others), or ("clusters", tokens, elsewhere).

    Choices are counted where they are returned. A token is elsewhere if their clustering separates it from the majority
    of its cluster in ours.
    """
    at = next(form.index for forms in FORMS.values() for form in forms if form.replacement is ours)
    if at is not None:
        others = (got[at][:, :, None] != expected[at][:, None, :]).all(-1)
        return "choices", others.numel(), int(others.sum())
    assigned, M = got[0], got[1]
    ours_of = torch.arange(len(assigned), device=assigned.device)[:, None] * M + assigned
    both, sizes = (ours_of * M + expected[0]).unique(return_counts=True)
    together = sizes.new_zeros(len(assigned) * M).scatter_reduce(0, both // M, sizes, "amax").sum()
    return "clusters", assigned.numel(), assigned.numel() - int(together)


_OF_AN_OBJECT = "it is an attribute of an object"


def find_calls(cls: type[nn.Module]) -> tuple[Calls, list[tuple[str, str]]]:
    """What the methods of a class call that can be replaced, and what cannot: (method, why not)."""
    calls: list[tuple[str, Renames]] = []
    left: list[tuple[str, str]] = []
    underived = ""
    for base in bases(cls):
        held = {name: value for name, value in vars(base).items() if not isinstance(value, FunctionType)}
        left.extend(find_held(cls, held))
    for method, function in methods(cls):
        if method == "__init__":  # does not run again; find_held looks at what it left
            continue
        refused: dict[str, str] = {}
        renames = _find_renames(function, (), refused)
        if renames and not calls:
            try:
                subclass(cls, None)
            except Exception as error:  # of its metaclass or __init_subclass__
                underived = f"its class cannot be derived from ({error})"
        if renames and getattr(cls, method) is not function:
            refused.update((path, "called in a method that a derived class overrides") for path, _ in renames)
        elif underived:
            refused.update((path, underived) for path, _ in renames)
        elif renames:
            calls.append((method, renames))
        own = {name for name, _ in methods(cls)}
        refused.update(
            (path, "it is a method") for path, why in refused.items() if why == _OF_AN_OBJECT and path in own
        )
        left.extend((method, f"{path}: {why}") for path, why in refused.items())
    return tuple(calls), left


def find_held(cls: type[nn.Module], attributes: dict[str, Any]) -> list[tuple[str, str]]:
    """The published functions that attributes of a module or its class are, hold or call: (attribute, why left)."""
    left: list[tuple[str, str]] = []
    own = [function for _, function in methods(cls)]
    for name, value in attributes.items():
        kind = type(value).__name__ if isinstance(value, _CALLED_AS_METHODS) else ""
        why = f"called in a {kind}" if kind else "called by a function that an attribute holds"
        for function in _functions(value):
            form = _form_name(function)
            if form and name not in FORMS:
                left.append((name, f"it is {form}, held as an attribute" if _form_name(value) else f"it holds {form}"))
            elif not form and isinstance(function, FunctionType) and any(_related(function, m) for m in own):
                refused: dict[str, str] = {}
                refused.update((path, why) for path, _ in _find_renames(function, (), refused))
                left.extend((name, f"{path}: {reason}") for path, reason in refused.items())
    return list(dict.fromkeys(left))


_CALLED_AS_METHODS = (staticmethod, classmethod, property, cached_property)


def _functions(value: Any, depth: int = 3) -> Iterator[FunctionType | torch.jit.ScriptFunction]:
    """The functions that an object is made of: a partial, a property, a container to some depth, a method."""
    parts: Iterable[Any] = ()
    if isinstance(value, (FunctionType, torch.jit.ScriptFunction)):
        yield value
    elif isinstance(value, (staticmethod, classmethod, MethodType)):
        parts = (value.__func__,)
    elif isinstance(value, (partial, partialmethod)):
        parts = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, property):
        parts = (value.fget, value.fset, value.fdel)
    elif isinstance(value, cached_property):
        parts = (value.func,)
    elif isinstance(value, _lru_cache_wrapper):
        parts = (value.__wrapped__,)
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        parts = value.values() if isinstance(value, dict) else value
    if depth:
        for part in parts:
            yield from _functions(part, depth - 1)


def _find_renames(function: FunctionType, callers: tuple[FunctionType, ...], refused: dict[str, str]) -> Renames:
    """What a function calls that can be replaced, itself or through other functions of its package.

    What it calls that cannot be replaced is added to `refused`, with the reason.
    """
    code, names = function.__code__, function.__globals__
    callers = (*callers, function)
    loaded = _loaded(code)
    targets = dict(sorted(_through_modules(names, dotted) for dotted in loaded))
    renames: list[tuple[str, Any]] = []
    for path, target in targets.items():
        found = _replacement(target, callers, refused)
        if found and not isinstance(found, str):
            first, *attributes = path.split(".")
            if _uses(code, first) != {"LOAD_GLOBAL"}:
                found = f"{first} is also the name of an attribute"
            elif attributes and (first,) in loaded:
                found = f"{first} is also used by itself"
        if isinstance(found, str):
            refused[path] = found
        elif found:
            renames.append((path, found))
    if renames:
        refused.update(
            (path, "from inside itself, it is called as it was") for path, f in targets.items() if f is function
        )
    _refuse_held(function, callers, {path.rpartition(".")[2] for path in targets}, refused)
    return tuple(renames)


def _refuse_held(
    function: FunctionType, callers: tuple[FunctionType, ...], called: set[str], refused: dict[str, str]
) -> None:
    """Add to `refused` the published functions that a function reaches otherwise than by a name of its file."""
    wrapped = vars(function).get("__wrapped__")
    for name, held in _closure(function).items():
        inner: dict[str, str] = {}
        found = _replacement(held, callers, inner)
        if held is wrapped and isinstance(found, tuple):
            refused.update(inner)
            refused.update((path, "called in a decorated function") for path, _ in found)
        elif found or inner:
            refused[name] = "a closure holds it"
    for name, default in _defaults(function).items():
        inner = {}
        if _replacement(default, callers, inner) or inner:
            refused[name] = "the default of an argument holds it"
    for name in FORMS.keys() - called - refused.keys():
        uses = _uses(function.__code__, name)
        if "IMPORT_FROM" in uses:
            refused[name] = "it is imported inside the function"
        elif uses & {*_ATTRIBUTES}:
            refused[name] = _OF_AN_OBJECT


def _replacement(target: Any, callers: tuple[FunctionType, ...], refused: dict[str, str]) -> Any:
    """What replaces a call of `target`: our function, renames inside `target`, () for nothing, or why it cannot be."""
    name = _form_name(target)
    if not isinstance(target, FunctionType):
        inner: dict[str, str] = {}
        parts = (part for part in _functions(target) if part is not target)
        reaches = name or any(_replacement(part, callers, inner) for part in parts) or inner
        return f"it is a {type(target).__name__}" if reaches else ()
    if name:
        return find_form(target)
    related = target not in callers and _related(target, callers[-1])
    return _find_renames(target, callers, refused) if related else ()


_OURS = ("hotkernels.compat.", "hotkernels.ops.")


def _form_name(value: Any) -> str | None:
    """The published name of a function, or of what a partial, a static method or a scripted function is made from."""
    while isinstance(value, (partial, staticmethod, classmethod, MethodType)):
        value = value.func if isinstance(value, partial) else value.__func__
    if not isinstance(value, (FunctionType, torch.jit.ScriptFunction)):
        return None
    name = value.__name__ if isinstance(value, FunctionType) else value.name
    return name if name in FORMS and not str(value.__module__).startswith(_OURS) else None


def _related(one: FunctionType, other: FunctionType) -> bool:
    """Whether two functions are of one package, or of files in one folder."""
    packages = {str(f.__module__).partition(".")[0] for f in (one, other)}
    return len(packages) == 1 or len({os.path.dirname(f.__code__.co_filename) for f in (one, other)}) == 1


def _defaults(function: FunctionType) -> dict[str, Any]:
    """The arguments of a function that have a default, each with it."""
    values, positional = function.__defaults__ or (), function.__code__.co_argcount
    names = function.__code__.co_varnames[positional - len(values) : positional]
    return {**dict(zip(names, values, strict=True)), **(function.__kwdefaults__ or {})}


def _closure(function: FunctionType) -> dict[str, Any]:
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        if cell != CellType()  # an empty one
    }


_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


def _loaded(function: CodeType) -> set[tuple[str, ...]]:
    """The names that code loads from its file, each with the attributes that follow it: ("utils", "cluster")."""
    found: list[list[str]] = []
    for code in codes(function):
        follows = False
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_GLOBAL":
                found.append([step.argval])
                follows = True
            elif follows and step.opname in _ATTRIBUTES:
                found[-1].append(step.argval)
            elif step.opname != "EXTENDED_ARG":
                follows = False
    return {tuple(names) for names in found}


def _through_modules(names: dict[str, Any], dotted: tuple[str, ...]) -> tuple[str, Any]:
    """How far a dotted name leads through modules, and to what; nothing is imported for it."""
    target = names.get(dotted[0])
    for i, name in enumerate(dotted[1:], 1):
        if not isinstance(target, ModuleType):
            return ".".join(dotted[:i]), target
        target = vars(target).get(name)
    return ".".join(dotted), target


def _uses(function: CodeType, name: str) -> set[str]:
    """The kinds of instruction by which code uses a name."""
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
    """Whether ours accepts every call that theirs does."""
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
    """Whether both return the same and leave the generator in the same state, or both fail."""
    masked = isinstance(args[-1], Tensor) and args[-1].dtype == torch.bool
    if masked and len(args) > len(inspect.signature(theirs).parameters):
        return True  # it takes no mask
    state = torch.get_rng_state()
    try:
        expected = theirs(*args), torch.get_rng_state()
    except Exception:  # an unknown function may raise anything
        expected = None
    torch.set_rng_state(state)
    try:
        got = ours(*args), torch.get_rng_state()
    except ValueError:
        return expected is None
    if expected is None:
        return False
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
