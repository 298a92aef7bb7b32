"""Whether two modules or functions do the same: run both on small random inputs, leaving no trace."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..dtypes import HALF

# In half precision, swapped HoT-MixSTEs of 16 blocks differ by up to 3.3 epsilons of the largest output (bfloat16,
# float16; 64 channels on 5 seeds, 256 on 2), smaller models by up to 1.7. The root of epsilon, 11 or 32 epsilons,
# would let other functions pass.
_HALF_EPSILONS = 8


class IncomparableError(TypeError):
    """A result holds an object that equals only itself; the text says what."""


def same(expected: Any, got: Any) -> bool:
    """Whether two results agree to rounding, relative to the largest value.

    Floats may differ by the root of their epsilon, in half precision by 8 epsilons. Raises IncomparableError.
    """
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        return _same_tensor(expected, got)
    if type(expected) is not type(got):
        return False
    if isinstance(expected, dict):
        return expected.keys() == got.keys() and all(same(expected[key], got[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(expected) == len(got) and all(map(same, expected, got))
    if isinstance(expected, (float, complex)):  # perhaps from a tensor in float32
        dtype = torch.complex64 if isinstance(expected, complex) else torch.float32
        return _same_tensor(torch.tensor(expected, dtype=dtype), torch.tensor(got, dtype=dtype))
    if isinstance(expected, (np.ndarray, np.generic)):
        if expected.dtype.kind in "fc" and expected.dtype == got.dtype:
            return _same_tensor(torch.tensor(expected), torch.tensor(got))
        return np.array_equal(expected, got)
    if hasattr(expected, "__dict__"):
        return same(vars(expected), vars(got))
    if type(expected).__eq__ is object.__eq__ and expected is not got:
        raise IncomparableError(f"a {type(expected).__name__}, which cannot be compared")
    return bool(expected == got)


def _same_tensor(expected: Tensor, got: Tensor) -> bool:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return False
    if expected.is_complex():
        return _same_tensor(torch.view_as_real(expected), torch.view_as_real(got))
    if not expected.is_floating_point():
        return torch.equal(expected, got)
    largest = expected.nan_to_num(0, 0, 0).abs().max().item() if expected.numel() else 0.0
    eps = torch.finfo(expected.dtype).eps
    tolerance = (_HALF_EPSILONS * eps if expected.dtype in HALF else eps**0.5) * largest
    close = (got - expected).abs() <= tolerance
    return bool(close.all()) or bool((close | (got == expected) | (got.isnan() & expected.isnan())).all())


def distance(expected: Any, got: Any) -> float:
    """The largest difference between floats of two results, relative to the largest one; inf where undefined."""
    ours, theirs = ([t for t in pytree.tree_leaves(r) if isinstance(t, Tensor)] for r in (expected, got))
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a.is_floating_point() and a.numel()]
    if len(ours) != len(theirs) or not pairs or any(a.shape != b.shape for a, b in pairs):
        return math.inf
    largest = max(a.abs().max().item() for a, _ in pairs)
    apart = max((a - b).abs().max().item() for a, b in pairs)
    return apart / largest if 0 < largest < math.inf and apart < math.inf else math.inf


def leaves(module: nn.Module, args: Any) -> list[Tensor]:
    """The parameters and the tensors in args that can have a gradient, made to require it.

    Not expanded ones: only the sum of their gradient over the expanded dims means something.
    """
    tensors = [*module.parameters(), *(leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor))]
    return [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point() and 0 not in tensor.stride()]


def gradients(out: Any, leaves: list[Tensor]) -> Tensor | None:
    """The gradients of a fixed sum over all outputs for all leaves, concatenated; None if it has none.

    In one tensor, as `same` compares with the largest value: the gradient of a bias of keys is zero but for rounding.
    """
    outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not outputs:
        return None
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in outputs]
    grads = torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


@contextlib.contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """No gradients, autocast, inference mode; new tensors on the device; random numbers from a seed, then restored."""
    accelerator = device.type not in ("cpu", "meta")
    others = random.getstate(), np.random.get_state()
    with (
        torch.random.fork_rng([device] if accelerator else [], device_type=device.type if accelerator else "cuda"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        device,  # new tensors are there, whatever the default
    ):
        try:
            seed(device)
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])


def seed(device: torch.device) -> None:
    """Start the random numbers of PyTorch on the CPU and a device anew."""
    torch.default_generator.manual_seed(0)
    if device.type not in ("cpu", "meta"):
        getattr(torch, device.type).manual_seed(0)


def random_state() -> tuple[Any, ...]:
    """What changes when a random number is drawn, of PyTorch, Python or NumPy."""
    _, keys, place, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(keys).tobytes(), place


IN_PROBE = "_hotkernels_in_probe"
_COMPILED = "_compiled_call_impl"  # what Module.compile() sets: it calls that very module, and is in no copy


def replica(module: nn.Module) -> nn.Module:
    """The same module tree without hooks, with random parameters and without dropout, marked as IN_PROBE.

    Random, since what is initialised to zero (a projection, a relative bias) would hide what it does.
    """
    twins: dict[int, nn.Module] = {}

    def twin_of(source: nn.Module) -> nn.Module:
        if id(source) not in twins:
            twin = twins[id(source)] = object.__new__(type(source))
            vars(twin).update({name: _copied(value) for name, value in vars(source).items() if name != _COMPILED})
            vars(twin).update({name: OrderedDict() for name in vars(source) if name.endswith("_hooks")})
            vars(twin)[IN_PROBE] = True
            vars(twin).update(
                _parameters={name: p if p is None else _random_like(p) for name, p in source._parameters.items()},
                _buffers={name: b if b is None else b.clone() for name, b in source._buffers.items()},
                _modules={name: m if m is None else twin_of(m) for name, m in source._modules.items()},
            )
            if isinstance(twin, nn.Dropout):
                twin.p = 0.0
        return twins[id(source)]

    return twin_of(module)


def _random_like(parameter: Tensor) -> Tensor:
    fan_in = parameter[0].numel() if parameter.dim() > 1 and len(parameter) else 1
    return torch.randn_like(parameter) * fan_in**-0.5 if parameter.is_floating_point() else parameter


_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)


def _copied(value: Any) -> Any:
    """An attribute of a module as its replica may change it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, _GENERATORS):
        return copy.deepcopy(value)
    return copy.copy(value) if isinstance(value, (list, dict, set, deque)) else value


def attributes(module: nn.Module) -> dict[str, list[Any]]:
    """What a module and those inside it hold, with the contents of what can change: what `stored` compares with."""
    held: dict[str, list[Any]] = {}
    for path, inner in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in {**inner._parameters, **inner._buffers, **vars(inner)}.items():
            held[prefix + name] = [value, *_contents(value)]
    return held


def _contents(value: Any, depth: int = 3) -> list[Any]:
    """What lies inside a container, or an object that is not a module, to some depth."""
    if isinstance(value, Tensor):
        return [value._version]
    if isinstance(value, np.ndarray):
        return [value.tobytes()]
    if isinstance(value, torch.Generator):
        return [value.get_state().numpy().tobytes()]
    if isinstance(value, _GENERATORS):
        return [pickle.dumps(value)]
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, deque)):
        inside = [*value]
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type, FunctionType, ModuleType)):
        inside = [*vars(value).keys(), *vars(value).values()]
    return inside + [leaf for part in inside for leaf in _contents(part, depth - 1)] if depth else []


def _is(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and type(now) in (bytes, int, str) and bool(now == then))


def stored(module: nn.Module, before: dict[str, list[Any]]) -> str | None:
    """The first attribute or buffer that a module did not hold before, or that has changed."""
    for name, now in attributes(module).items():
        then = before.get(name, [])
        if len(now) != len(then) or not all(map(_is, now, then)):
            return name
    return None


OF_EVERY_MODULE = frozenset({*vars(nn.Module()), _COMPILED})


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What a probe's verdict depends on: equal for modules that differ in the values of parameters alone.

    An attribute or buffer that is not a plain value must be the same object in both.
    """
    held = {k: v for k, v in vars(module).items() if k not in OF_EVERY_MODULE}
    others = [(k, _value(v)) for k, v in (*held.items(), *module._buffers.items())]
    parameters = [(k, p.shape, p.dtype, p.device) for k, p in module._parameters.items() if p is not None]
    children = [(name, fingerprint(child)) for name, child in module.named_children()]
    return type(module), *others, *parameters, *children


def _value(attribute: Any) -> Any:
    """Plain values, and containers of them, by value; anything else by identity."""
    if isinstance(attribute, (list, tuple)):
        return type(attribute), *map(_value, attribute)
    if isinstance(attribute, dict):
        return dict, *((key, _value(value)) for key, value in attribute.items())
    plain = isinstance(attribute, (bool, int, float, str, type(None), torch.dtype, torch.device))
    return (type(attribute), repr(attribute)) if plain else id(attribute)
