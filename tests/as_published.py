"""Drop-in modules held to the published ones, and an hourglass of all of them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from comparing import answers, assert_as_accurate
from torch import Tensor, nn

from hotkernels.bench.workloads import rounding_floor
from hotkernels.nn import Attention, TokenPruning, TokenRecovery

# Of attention and recovery.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"qkv_bias": True},
    {"qkv_bias": True, "qk_scale": 0.4},
    {"num_heads": 2, "qk_scale": 0},
]


def pair(ours: type[nn.Module], eager: type[nn.Module], *args: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Our module and the published one with the same parameters, none of them zero."""
    a, b = ours(*args, **options), eager(*args, **options)
    for parameter in b.parameters():
        nn.init.normal_(parameter, std=0.2)
    a.load_state_dict(b.state_dict(), strict=True)
    b.load_state_dict(a.state_dict(), strict=True)
    assert [(n, p.shape) for n, p in a.named_parameters()] == [(n, p.shape) for n, p in b.named_parameters()]
    return a, b


def _answers(module: nn.Module, call: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return answers(functools.partial(call, module), *inputs, parameters=module.parameters())


def assert_as_published(
    ours: nn.Module, eager: nn.Module, call: Any, inputs: list[Tensor], published: Any = None
) -> None:
    """Error against float64: at most 2x the published module's (forward), 3x (gradients), beside some roundings."""
    published = published or call
    mine, low = _answers(ours, call, inputs), _answers(eager, published, inputs)
    exact = _answers(copy.deepcopy(eager).double(), published, [x.double() for x in inputs])
    for i, (a, b, c) in enumerate(zip(mine, low, exact, strict=True)):
        assert a.dtype == b.dtype
        floor = rounding_floor(a.dtype, tensor_cores=False) * max(c.abs().max(), 1.0)
        assert_as_accurate(a, [b], c, 2 if i == 0 else 3, floor)


def assert_as_published_under_autocast(
    ours: Any, eager: Any, args: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    """The dtype of the published module, and values as near to the truth; gradients arrive in float32."""
    a, b = pair(ours, eager, *args, qkv_bias=True)
    x = torch.randn(shape)

    def call(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=x.dtype == torch.float32):
            return m(x)

    mine, low = _answers(a, call, [x]), _answers(b, call, [x])
    exact = _answers(copy.deepcopy(b).double(), call, [x.double()])
    largest = max(truth.norm() for truth in exact[1:])  # a gradient that is 0, linear_k.bias's, is all rounding noise
    for i, (one, other, truth) in enumerate(zip(mine, low, exact, strict=True)):
        assert one.dtype == other.dtype
        floor = 1e-6 * truth.norm() + (torch.finfo(dtype).eps / 8 * largest if i > 0 else 0)
        assert (one - truth).norm() <= 2 * (other - truth).norm() + floor


class Hourglass(nn.Module):
    """Prune, attend over the kept frames of each joint, recover."""

    def __init__(self) -> None:
        super().__init__()
        self.prune = TokenPruning(16, 9, center=True)
        self.attend = Attention(16, num_heads=2, qkv_bias=True)
        self.recover = TokenRecovery(16, 27, num_heads=2, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.prune(x)
        return self.recover(x + self.attend(x, along=-3))


def hourglass() -> Hourglass:
    module = Hourglass()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module
