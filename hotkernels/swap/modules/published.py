"""What the published forms share: their structure, the arguments of their forwards, and when a call is fused."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.attention import Attention, CrossAttention
from ...nn.linear import linear
from ...nn.plain import DROPS, has_hooks, is_idle
from ...ops.gathered_attention.api import MAX_HEAD_DIM
from ..twins import TAKES, Twin
from ..watch import as_seen

# Tokens of a long example: more than windows have (49, 196, 256), or attention that scales with log N was trained on.
LONG = 300
QKV = {"qkv": 3}  # linear layers -> how many times C they make of C channels
AFTER = ("proj", "proj_drop")  # what `project` calls


def attention_obstacle(module: Any, takes: int, linears: dict[str, int], weights: Iterable[str] = ()) -> str | None:
    """What in its structure keeps a module from being plain attention; None if nothing does.

    Args:
        module: with the children that `linears` names.
        takes: arguments of its forward; any further must be off, None or False, by default.
        linears: which layers project, and how many times C they make of C channels.
        weights: the parameters of its own that the twin knows.
    """
    if isinstance(module, (Attention, CrossAttention)):
        return "it is fused as it is"
    if obstacle := forward_obstacle(module, takes, weights):
        return obstacle
    if not isinstance(getattr(module, "sr_ratio", 1), int):
        return f"sr_ratio is {module.sr_ratio}"
    known = (*linears, *AFTER, "attn_drop")
    reducing = _reducing(module, linears)
    for name, child in module.named_children():
        if name not in known and not isinstance(child, reducing.get(name, nn.Identity)):
            return f"it has {name}, a {type(child).__name__}"
        if name not in (*linears, *AFTER, *reducing) and has_hooks(child):
            return f"{name} has hooks, which would not run"
    for name in known:
        child, kinds = getattr(module, name, None), DROPS if "drop" in name else (nn.Linear,)
        if name == "proj_drop" and not hasattr(module, name):  # Hiera's, and many an own ViT's
            continue
        if not isinstance(child, kinds) or (name == "attn_drop" and type(child) not in kinds):
            return f"{name} is {torch.typename(child)}"
    heads, scale = getattr(module, "num_heads", None), getattr(module, "scale", None)
    if not isinstance(heads, int) or not isinstance(scale, (int, float)):
        return f"num_heads and scale are {heads} and {scale}"
    C = module.proj.in_features
    for name, times in linears.items():
        linear = getattr(module, name)
        if (linear.in_features, linear.out_features) != (C, times * C):
            return f"{name} makes {linear.out_features} channels of {linear.in_features} where proj takes {C}"
    if C % heads != 0 or C // heads > MAX_HEAD_DIM:
        return f"{heads} heads of {C} channels: a head has at most {MAX_HEAD_DIM}"
    return None


def plain_attention(module: Any, takes: int, linears: dict[str, int], weights: Iterable[str] = ()) -> bool | str:
    """What `Twin.fits` answers where the module must be plain attention; arguments as `attention_obstacle`."""
    return attention_obstacle(module, takes, linears, weights) or True


def forward_obstacle(module: Any, takes: int, weights: Iterable[str] = ()) -> str | None:
    """What in its forward, or in weights of its own but these, keeps a module from being replaced."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if type(module).forward is nn.Module.forward:
        return "it has no forward"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if hasattr(type(module).forward, "__wrapped__"):
        return "its forward is decorated"
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    more = [p.name for p in parameters[takes:] if p.default is not None and p.default is not False]
    if more or len(parameters) < takes:
        return f"{TAKES} {', '.join(p.name for p in parameters)}"
    held = (*module._parameters.items(), *module._buffers.items())
    own = [name for name, t in held if t is not None and name not in weights]
    return f"it has {own[0]}" if own else None


def has_layers(module: nn.Module, *children: str) -> bool:
    """Whether a module has these children, and a proj."""
    return all(name in module._modules for name in (*children, "proj"))


def child_of(module: nn.Module, name: str) -> Any:
    """The child of that name, None without one."""
    return module._modules[name] if name in module._modules else None  # noqa: SIM401  (a ScriptModule's has no get)


def arguments(module: nn.Module) -> int:
    """How many arguments its forward takes, -1 if any number.

    A scripted module does not say. It gets 2, so that some form refuses it.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return 2
    parameters = inspect.signature(type(module).forward).parameters.values()
    return -1 if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters) else len(parameters) - 1


def project(module: Any, attended: Tensor) -> Tensor:
    """What comes after the attention: proj, and its dropout if it has one."""
    out, drop = linear(module.proj, attended), child_of(module, "proj_drop")
    return out if drop is None else drop(out)


def served(module: Any, uses: Iterable[str], tokens: tuple[Any, ...], dims: int | None = 3) -> bool:
    """Whether a call is fused: with tokens, and the module does what the probe saw.

    `uses` names the layers, and parameters of the module's own, that the twin uses; `dims` is how many the tokens had
    in the probe, None if their number means nothing. There, all were of as many samples. In torch.fx, which traces the
    module's own forward, they are no tensors.

    So nothing was set since the swap that its own forward may heed. That forward also runs what a twin would not call:
    dropout on the probabilities, which draws random numbers in their layout, and whatever was put in the place of a
    Dropout or an Identity, or hooked to it.
    """
    for x in tokens:
        if not isinstance(x, Tensor) or dims not in (None, x.dim()):
            return False
    for x in tokens[1:]:
        if x.shape[0] != tokens[0].shape[0]:
            return False
    if not as_seen(module, uses):
        return False
    called = (*uses, *_reducing(module, uses))
    for name, child in module._modules.items():
        if name in called or child is None:
            continue
        if not is_idle(child) or (module.training and getattr(child, "p", 0)):  # timm's drops by its own mode
            return False
    return all(x.numel() for x in tokens)


def reduces(module: Any) -> bool:
    """Whether a module attends to a reduced map of its keys."""
    return getattr(module, "sr_ratio", 1) != 1


def _reducing(module: Any, layers: Iterable[str]) -> dict[str, type[nn.Module]]:
    """What reduces the keys of a module that projects them apart from the queries."""
    return {"sr": nn.Conv2d, "norm": nn.LayerNorm} if "kv" in layers and reduces(module) else {}


def random_tokens(linear: Any, *shape: int) -> Tensor:
    """Random input [*shape, C] of a linear layer."""
    weight = linear.weight
    return torch.randn(*shape, linear.in_features, dtype=weight.dtype, device=weight.device)


def described(twin: type[Published], module: Any, name: str, drop: nn.Module | None, *where: str) -> str:
    """What a twin says of a module it serves: for which arguments, and whether that dropout keeps it from training."""
    theirs, ours = (inspect.signature(cls.forward).parameters.values() for cls in (type(module), twin))
    where += tuple(f"{p.name} is {p.default}" for p in [*theirs][len(ours) :])
    kind = f"{twin.kind}, where {' and '.join(where)}" if where else twin.kind
    p = getattr(drop, "p", 0)
    return f"{kind}, in evaluation; training has {name} = {p}" if p else kind


class Published(Twin):
    """A twin that is called by the names that the original has for its arguments."""

    _hotkernels_first = "qkv"  # the layer that takes tokens [B, N, C], for twins without examples of their own

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        original = vars(cls).get("_hotkernels_original")
        if original is None:
            return
        # A caller may pass arguments by the original's names for them, and further ones that are off. Any other call,
        # with fewer or more than the twin takes, is the original's.
        twin = cls.forward
        theirs, ours = ([*inspect.signature(f).parameters.values()][1:] for f in (original.forward, twin))
        count = len(ours)
        least = sum(p.default is p.empty for p in ours)
        first = {p.name: p.default for p in theirs[:count] if p.kind is p.POSITIONAL_OR_KEYWORD}
        names = tuple(first)
        off = {p.name: p.default for p in theirs[count:]}
        defaults = tuple(off.values())

        def forward(self: Any, *args: Any, **named: Any) -> Any:
            if not isinstance(self, cls):  # unswapped since this was bound to it
                return original.forward(self, *args, **named)
            missing = names[len(args) :]
            while missing and missing[-1] not in named:
                missing = missing[:-1]
            for name in missing:
                if name not in named and first[name] is inspect.Parameter.empty:
                    break
                args = (*args, named.pop(name, first[name]))
            more = args[count:]
            if len(more) <= len(defaults) and all(map(operator.is_, more, defaults)):
                args = args[:count]
            if named and all(name in off and value is off[name] for name, value in named.items()):
                named = {}
            if named or not least <= len(args) <= count:
                return original.forward(self, *args, **named)
            return twin(self, *args)

        forward.__wrapped__ = original.forward  # type: ignore[attr-defined]  # callers and torch.fx ask for its arguments
        cls.forward = forward

    @classmethod
    def examples(cls, module: Any) -> list[tuple[Any, ...]]:  # noqa: D102  (as Twin)
        return [(random_tokens(getattr(module, cls._hotkernels_first), 2, 5),)]

    @classmethod
    def long_examples(cls, module: Any) -> list[tuple[Any, ...]]:  # noqa: D102
        return [(random_tokens(getattr(module, cls._hotkernels_first), 1, LONG),)]

    @classmethod
    def describe(cls, module: Any) -> str:  # noqa: D102
        return described(cls, module, "attn_drop", module.attn_drop)
