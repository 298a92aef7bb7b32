"""swap, unswap, swapped: the fused operators in a live model, with a report of what was replaced and what was left."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..dtypes import HALF
from ..errors import fail
from . import probe
from .classes import Calls, Renames, hidden_names, is_swapped, look_up, subclass
from .functions import CLUSTERINGS, differences, find_calls, find_held
from .twins import Twin, find_twin
from .watch import SEEN, changed, seen


@dataclass(frozen=True)
class SwapReport:
    """What `swap` did to a model; prints as a table.

    Paths that differ in numbers alone share a line, unless the report says different things of them.

    Attributes:
        replaced: (path, kind) of every module with a fused forward.
        functions: (path, what calls what) of every module that calls our function instead of its file's.
        left: (path, reason) of what looks like one of them and was left alone.
        choices: in the check by example_inputs, how many tokens the model's own clustering (HoT's, MHFormer's,
            TokenReduction's) chose, and how many others ours chooses in their place; None without one.
        clusters: in that check, how many tokens were assigned by a clustering that returns no choice (TCFormer's,
            Chat-UniVi's), and how many of them theirs separates from the majority of their cluster in ours; None
            without one.
        moved: in that check, how far outputs moved, relative to the largest, where that is more than rounding: at most
            4 times as far as the model's own move when its inputs are rounded differently; None where they agree.
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    functions: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    choices: tuple[int, int] | None = None
    clusters: tuple[int, int] | None = None
    moved: float | None = None

    def __str__(self) -> str:
        titles = ("replaced", "functions", "left")
        rows_of: dict[str, dict[tuple[str, str], set[str]]] = {}  # masked path -> row -> the paths that share it
        for title in titles:
            for path, what in getattr(self, title):
                rows_of.setdefault(_masked(path), {}).setdefault((title, what), set()).add(path)
        kept = {name for name, rows in rows_of.items() if len(set(map(frozenset, rows.values()))) > 1}
        lines = []
        for title in titles:
            counts: dict[tuple[str, str], int] = {}
            for path, what in getattr(self, title):
                row = (path if _masked(path) in kept else _masked(path)) or "(the model)", what
                counts[row] = counts.get(row, 0) + 1
            names = [f"{path} ({n})" if n > 1 else path for (path, _), n in counts.items()]
            width = max((len(name) for name in names), default=0)
            rows = [f"  {name:<{width}}  {what}" for name, (_, what) in zip(names, counts, strict=True)]
            lines += [title, *rows] if rows else []
        if self.choices:
            chosen, others = self.choices
            rest = _REST if others else ""
            lines += ["choices", f"  {chosen - others} of {chosen} kept tokens are the model's own choice{rest}"]
        if self.clusters:
            assigned, others = self.clusters
            rest = _REST if others else ""
            lines += ["clusters", f"  {assigned - others} of {assigned} tokens are in the model's own cluster{rest}"]
        if self.moved:
            own = f"at most {_AS_FAR} times as far as the model itself moves when its inputs are rounded differently"
            lines += ["moved", f"  outputs moved by {self.moved:.1e} of the largest, {own}"]
        return "\n".join(lines)


_REST = "; its rounding or noise decided the rest"
_AS_FAR = 4  # outputs may move this many times as far as the model's own when its inputs are rounded differently


def _masked(path: str) -> str:
    return re.sub(r"\d+", "*", path)


@dataclass(frozen=True)
class _Change:
    """A module and what its class becomes."""

    module: nn.Module
    twin: type[Twin] | None
    calls: Calls


def swap(model: nn.Module, *, example_inputs: Any = None) -> SwapReport:
    """Run a published model on the fused operators, in place: same parameters, same outputs but for near ties.

    What is replaced, whatever the file or the class is called:

    - the attention of timm's ViT, MixSTE, MHFormer, MotionBERT, MotionAGFormer, TCFormer, PVT (which takes x, H, W),
      TokenPose, PPT, VideoMAE, vit-pytorch, DynamicViT (without a policy), EViT, TokenReduction's EViT and top-k, and
      of timm's ViT that ToMe has patched;
    - HoT's cross-attention, and that with one layer for keys and values;
    - MLPs in float32 on a CPU, by oneDNN: an fc1, an act and an fc2, or an nn.Sequential;
    - modules of the forms that `register_twin` adds;
    - in methods, calls of `cluster_dpc_knn`, `cluster_dpc_knn_center`, FlashVID's `dpc_knn`, SparseVLM's
      `cluster_and_merge` and `merge_tokens`, by that name or as `utils.cluster_dpc_knn`, if the function answers as a
      published one. Other models keep calling theirs.

    Modules other than an nn.Sequential must also give the outputs and gradients of the fused form on random input, in
    evaluation and in training, with each of their dropouts, on long and on large input; a forward that stores
    something, changes its input or draws random numbers of its own is not replaced. Changes to globals and classes
    are not seen, nor what a forward does only under autocast.

    What is left and reported, with the reason:

    - a module that looks like one of these, but has another structure or computes something else; PyTorch's own
      nn.MultiheadAttention and nn.TransformerEncoderLayer, too (a twin of yours can serve them: `register_twin`);
    - such a function where it is held by an object, a container, a closure, a partial or the default of an argument;
    - such a function where it is called by a static method, a class method, a property or a decorated method.

    If you change a swapped module later (set an attribute, add a parameter or a buffer, replace or hook a layer that
    the fused forward does not call, give the class another forward), it falls back to its own forward. A projection of
    an attention that you replace, adapt or hook is called as it is, and the rest stays fused: so add adapters (LoRA)
    after the swap, since before it they are another form. Not noticed are changes inside an object that an attribute
    holds or a layer that is used, attributes set on the class, and new definitions of a clustering function or of a
    method that calls one. With a twin of your own, all this is up to its forward.
    HoT's cross-attention gives an expanded x_1 its gradient as `hotkernels.nn.CrossAttention` does.

    A call that no probe has seen goes to the module's own forward, too: with tokens of other dims than [B, N, C]
    (MotionAGFormer's: [B, T, J, C]), with queries and keys of different B, with further arguments, or traced by
    torch.fx.

    Swap before DDP or `torch.compile`, or after; before `fully_shard`, which leaves no way back for `unswap`.

    Outputs differ by rounding, and where a clustering chooses between tokens whose densities float32, or half precision
    if the published code computes in it, cannot tell apart: ours adds the noise and ranks in float64, so it may keep
    other frames than that code, and the poses move with them. For HoT, 243 frames to 81 in float32, that is 1 % to 10 %
    of the frames; with `example_inputs` the report says how many.
    EViT's tokens are ranked as published; rounding in the layers before may exchange two whose scores nearly tie.

    Args:
        model: any module; what is in it already swapped stays so.
        example_inputs: what to call the model with, a tensor, a tuple of arguments or a dict of named ones, to compare
            its outputs before and after. Both runs are in evaluation, without gradients, from the same random state,
            which is put back; hooks fire. As rounding alone changes which of two tied tokens a clustering chooses, the
            second run is given the choices of the first.

    Returns:
        A SwapReport: what was replaced, and what was left alone and why.

    Raises:
        TypeError, ValueError: ``swap: model must be ...`` where nothing matches (or everything is swapped already),
            where outputs differ by more than rounding and more than 4 times as much as the model's own do when its
            inputs are rounded differently, or where they hold what cannot be compared (an iterator);
            ``swap: example_inputs must be ...`` where the model cannot run on them. The model is then as it was.

    Numerics: as the operators; random numbers are drawn as by the original. In training, a module with dropout on the
        probabilities, whose random numbers have the original's layout, and an MLP of an fc1, an act and an fc2 with
        dropout run their original forward.

        Probes run on the model's own devices, in its dtypes and, for half precision, in float32, with random
        parameters: outputs and gradients of a few tokens, outputs alone of some hundred. They and the check by
        example_inputs allow differences up to the root of the dtype's epsilon (in half precision 8 epsilons), relative
        to the largest value. The check sees what probes do not, as a window of 512 tokens.

        `torch.jit.script`, the derivatives of `torch.func`, second derivatives and forward mode refuse a swapped model,
        and `torch.jit.trace` takes it under `torch.no_grad` alone: unswap for them.

    Cost: no memory; some tenths of a second per form and size (HoT-MixSTE: 0.7 s in all); with example_inputs two runs
        of the model, three where outputs differ.

    Example::

        >>> import torch, hotkernels
        >>> from hotkernels.baselines import AttentionEager  # as timm publishes it
        >>> model = torch.nn.Sequential(AttentionEager(64), torch.nn.ReLU(), AttentionEager(64))
        >>> print(hotkernels.swap(model, example_inputs=torch.randn(2, 10, 64)))
        replaced
          * (2)  attention
        >>> hotkernels.unswap(model)
    """
    changes, report = _plan(model)
    if not changes:
        _refuse(model, report)
    return _apply(model, changes, example_inputs, report)


def unswap(model: nn.Module) -> None:
    """Undo `swap`: every swapped module in the model gets its own class back.

    Args:
        model: a model with swapped modules.

    Raises:
        ValueError: ``unswap: model must be one with swapped modules, got ...``, also if a class was derived from a
            swapped one, as register_parametrization does: undo that first. Nothing is undone then.

    Example::

        >>> import torch, hotkernels
        >>> from hotkernels.baselines import AttentionEager
        >>> model = AttentionEager(64)
        >>> report = hotkernels.swap(model)
        >>> hotkernels.unswap(model)
        >>> type(model) is AttentionEager
        True
    """
    _check_module("unswap", model)
    modules: list[Any] = [module for module in model.modules() if is_swapped(module)]
    if not modules:
        fail("unswap", "model", "one with swapped modules", f"{type(model).__name__} without any")
    _check_classes("unswap", model, modules)
    _set_classes([(module, type(module)._hotkernels_original) for module in modules])


@contextlib.contextmanager
def swapped(model: nn.Module, *, example_inputs: Any = None) -> Iterator[SwapReport]:
    """`swap` for the length of a `with` block; what was swapped before it stays swapped after it.

    A model that is swapped completely already is no error: nothing changes, and everything is reported as left.

    Args:
        model, example_inputs: as `swap`, whose report the block gets.

    Raises:
        TypeError, ValueError: as `swap`, and after the block ``swapped: model must be ...`` if a class was derived in
            it from one that the block gave, as register_parametrization does.

    Example::

        >>> import torch, hotkernels
        >>> from hotkernels.baselines import AttentionEager
        >>> model, x = AttentionEager(64), torch.randn(2, 10, 64)
        >>> with hotkernels.swapped(model) as report:
        ...     y = model(x)
        >>> torch.allclose(y, model(x), atol=1e-6)
        True
    """
    changes, report = _plan(model)
    if not changes and not _any_swapped(model):
        _refuse(model, report)
    before = [(change.module, type(change.module)) for change in changes]
    report = _apply(model, changes, example_inputs, report)
    try:
        yield report
    finally:
        changed = [(module, cls) for module, cls in before if type(module) is not cls]
        _check_classes("swapped", model, [module for module, _ in changed])
        _set_classes(changed)


def _refuse(model: nn.Module, report: SwapReport) -> NoReturn:
    """Say that there is nothing to change."""
    name = getattr(type(model), "_hotkernels_original", type(model)).__name__
    if _any_swapped(model):
        fail("swap", "model", "one that is not swapped yet", f"{name}, which is (unswap undoes it)")
    found = "; ".join(sorted({reason for _, reason in report.left}))
    fail(
        "swap",
        "model",
        "one with a module that swap knows",
        name + (f" ({found})" if found else ""),
    )


def _any_swapped(model: nn.Module) -> bool:
    return any(map(is_swapped, model.modules()))


def _apply(model: nn.Module, changes: list[_Change], example_inputs: Any, report: SwapReport) -> SwapReport:
    """Make the changes, unless the model's outputs for example_inputs would change with them; completes the report."""
    tape: list[Any] = []
    found: list[tuple[str, int, int]] = []
    if example_inputs is not None:
        args, kwargs = _arguments(example_inputs)
        with _stand_ins(changes, lambda theirs, ours: _recorder(theirs, tape), fused=False):
            try:
                expected = _run(model, args, kwargs)
            except Exception as error:  # a model may raise anything
                fail("swap", "example_inputs", "what the model takes", f"{type(error).__name__}: {error}")
        chosen = [*tape]
        with _stand_ins(changes, lambda theirs, ours: _player(ours, tape, found), fused=True):
            try:
                got = _run(model, args, kwargs)
            except Exception as error:  # as where a threshold decides how many tokens there are
                fail("swap", "model", "one whose swapped outputs are the same", f"{type(error).__name__}: {error}")
        try:
            if not probe.same(expected, got):
                with _stand_ins(changes, lambda theirs, ours: _player(theirs, chosen, None), fused=False):
                    rounded = _run(model, *_rounded_differently(args, kwargs))
                moved, own = probe.distance(expected, got), probe.distance(expected, rounded)
                if moved == math.inf or moved > _AS_FAR * own:
                    size = "" if moved == math.inf else f" (by {moved:.1e} of the largest)"
                    what = f"a difference beyond rounding{size}"
                    fail("swap", "model", "one whose swapped outputs are the same", what)
                report = replace(report, moved=moved)
        except probe.IncomparableError as error:
            fail("swap", "model", "one whose swapped outputs are the same", error)
    _set_classes([(c.module, subclass(type(c.module), c.twin, c.calls)) for c in changes])
    return replace(report, choices=_total(found, "choices"), clusters=_total(found, "clusters"))


def _total(found: list[tuple[str, int, int]], kind: str) -> tuple[int, int] | None:
    counts = [(n, others) for known, n, others in found if known == kind]
    return (sum(n for n, _ in counts), sum(others for _, others in counts)) if counts else None


def _check_classes(op: str, model: nn.Module, modules: list[Any]) -> None:
    """Check that these modules of a model still have the classes that swap gave them."""
    for path, module in model.named_modules():
        if module in modules and "_hotkernels_spec" not in vars(type(module)):
            what = f"{type(module).__name__} at {path or 'the model'}, derived since"
            fail(op, "model", "one whose modules have the classes that swap gave them", what)


def _check_module(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        fail(op, "model", "a torch.nn.Module", type(model).__name__, TypeError)


def _plan(model: nn.Module) -> tuple[list[_Change], SwapReport]:
    """What to change, and the report of it. Nothing is changed yet."""
    _check_module("swap", model)
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    changes, report = [], SwapReport()
    verdicts: dict[Any, str | None] = {}
    called: dict[type, tuple[Calls, list[tuple[str, str]]]] = {}
    for module, names in paths.items():
        path, cls = ", ".join(names), type(module)
        if is_swapped(module):
            since = ", ".join(changed(module))
            more = f", but runs its own forward since {since} changed (unswap, then swap again)" if since else ""
            report.left.append((path, f"swapped already{more}"))
            continue
        twin = find_twin(module, verdicts)
        if isinstance(twin, str):
            report.left.append((path, twin))
            twin = None
        if cls not in called:
            called[cls] = find_calls(cls)
        calls, refused = called[cls]
        own = {name: value for name, value in vars(module).items() if name not in dict(calls)}
        refused = [*refused, *find_held(cls, own)]
        refused.extend((m, "it was replaced on the instance") for m, _ in calls if m in vars(module))
        calls = tuple(call for call in calls if call[0] not in vars(module))
        if twin is not None:
            report.replaced.append((path, twin.describe(module)))
            calls = tuple(call for call in calls if call[0] != "forward")
        report.functions.extend((path, line) for method, renames in calls for line in _lines(method, renames))
        report.left.extend((path, f"{method}: {why}") for method, why in refused)
        if twin is not None or calls:
            changes.append(_Change(module, twin, calls))
    return changes, report


def _lines(caller: str, renames: Renames) -> Iterator[str]:
    for name, target in renames:
        if isinstance(target, tuple):
            yield from _lines(f"{caller}, {name}", target)
        else:
            yield f"{caller}: {name} is {target.__module__}.{target.__name__}"


def _set_classes(classes: Sequence[tuple[Any, type[nn.Module]]]) -> None:
    """Give these modules these classes, all of them or none."""
    before = [(module, type(module)) for module, _ in classes]
    try:
        for module, cls in classes:
            vars(module).pop(SEEN, None)
            if issubclass(cls, Twin):
                vars(module)[SEEN] = seen(module)
            module.__class__ = cls
            # In PyTorch 2.11, compiled code checks a module's class again only after a write to one of its dicts; with
            # Python 3.13, it does not notice a write to the module's __dict__ itself.
            module._modules["_hotkernels"] = None
            del module._modules["_hotkernels"]
    except TypeError:  # raised if the memory layouts of the classes differ
        _set_classes(before)
        raise


@contextlib.contextmanager
def _stand_ins(
    changes: list[_Change], stand_in: Callable[[Any, Any], Callable[..., Any]], fused: bool
) -> Iterator[None]:
    """Make the changes for a while, with `stand_in(theirs, ours)` for clustering functions, fused forwards or not."""
    installed: list[tuple[dict[str, Any], str]] = []

    def renamed(renames: Renames, names: dict[str, Any]) -> Renames:
        out: list[tuple[str, Any]] = []
        for path, ours in renames:
            theirs = look_up(names, path)
            if isinstance(ours, tuple):
                target: Any = renamed(ours, theirs.__globals__)
            elif theirs.__name__ in CLUSTERINGS:  # what returns no choices is theirs or ours
                target = stand_in(theirs, ours)
            else:
                target = ours if fused else ()
            if target:
                out.append((path, target))
        kept = hidden_names(renames).values()  # by these, other swapped models of the file call ours: they stay
        installed.extend((names, hidden[0]) for hidden in hidden_names(tuple(out)).values() if hidden not in kept)
        return tuple(out)

    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    for change in changes:
        original = type(change.module)
        calls = tuple((m, renamed(renames, getattr(original, m).__globals__)) for m, renames in change.calls)
        classes.append((change.module, subclass(original, change.twin if fused else None, calls)))
    before = [(change.module, type(change.module)) for change in changes]
    try:
        _set_classes(classes)
        yield
    finally:
        _set_classes(before)
        for names, name in installed:
            names.pop(name, None)


def _recorder(theirs: Callable[..., Any], tape: list[Any]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        tape.append(theirs(*args, **kwargs))
        return tape[-1]

    return recorded


def _player(
    function: Callable[..., Any], tape: list[Any], found: list[tuple[str, int, int]] | None
) -> Callable[..., Any]:
    """A function that returns the recorded results in turn; if `found` is given, it adds how ours differ from them."""

    def played(*args: Any, **kwargs: Any) -> Any:
        got, recorded = function(*args, **kwargs), tape.pop(0)  # called for the random numbers it draws
        if found is not None:
            found.append(differences(function, got, recorded))
        return recorded

    return played


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    fail("swap", "example_inputs", "a tensor, a tuple or a dict", type(example_inputs).__name__, TypeError)


def _rounded_differently(args: Any, kwargs: Any) -> Any:
    """The same inputs, each moved by up to 32 roundings, about as many as a model of some layers makes.

    Inputs in half precision move by one, as 32 would be a quarter of a value.
    """

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(leaf) * 2 - 1
        return leaf + leaf * noise * ((1 if leaf.dtype in HALF else 32) * torch.finfo(leaf.dtype).eps)

    return pytree.tree_map(moved, (args, kwargs))


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's outputs in evaluation, leaving flags, buffers, inputs and random state as they were."""
    flags = [(module, module.training) for module in model.modules()]
    held: list[tuple[Any, dict[str, Any]]] = [(m._buffers, dict(m._buffers.items())) for m in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if _is_writable(buffer)]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    try:
        with torch.random.fork_rng(list(devices)), torch.no_grad():
            model.eval()
            return model(*args, **kwargs)
    finally:
        for module, training in flags:
            module.training = training
        for now, before in held:
            for name in {*now.keys()} - before.keys():
                del now[name]
            for name, buffer in before.items():
                if name not in now or now[name] is not buffer:
                    now[name] = buffer
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _is_writable(buffer: Tensor) -> bool:
    """Whether a forward can write to a buffer: not to an expanded one, nor to an inference tensor elsewhere."""
    if buffer.is_inference() and not torch.is_inference_mode_enabled():
        return False
    if buffer.layout is not torch.strided or buffer.is_nested:
        return True
    return not any(size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True))
