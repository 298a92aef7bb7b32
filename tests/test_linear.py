"""hotkernels.nn.linear by oneDNN and by MKL against the layer itself: answers, gradients, what it leaves to PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hotkernels.nn import CrossAttention
from hotkernels.nn.linear import add_linear, linear

pytestmark = pytest.mark.usefixtures("small_layers_as_large_ones")


@pytest.mark.parametrize("least", [1, 5 * 7 * 4])
@pytest.mark.parametrize("mkl_is_fast", [True, False])
@pytest.mark.parametrize(("bias", "width"), [(True, 7), (False, 7), (True, 3)])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 4, 5), (0, 5)])
def test_linear_is_the_layer(
    shape: tuple[int, ...], bias: bool, width: int, mkl_is_fast: bool, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotkernels.nn.linear._LEAST", least)
    monkeypatch.setattr("hotkernels.nn.linear._MKL_IS_FAST", mkl_is_fast)
    layer = nn.Linear(5, width, bias=bias)
    x = torch.randn(*shape, requires_grad=True)
    weight = torch.randn(*shape[:-1], width)
    wanted = [x, *layer.parameters()]
    for gelu in (False, True):
        expected = nn.functional.gelu(layer(x)) if gelu else layer(x)
        out = linear(layer, x, gelu)
        torch.testing.assert_close(out, expected)
        with torch.no_grad():
            torch.testing.assert_close(linear(layer, x, gelu), expected)
        for ours, theirs in zip(
            torch.autograd.grad(out, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mkl_is_fast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5), (0, 5)])
def test_linear_added(shape: tuple[int, ...], bias: bool, mkl_is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a new tensor, with gradients; without them to one that is given, which may be the residual."""
    monkeypatch.setattr("hotkernels.nn.linear._MKL_IS_FAST", mkl_is_fast)
    layer, x, residual = nn.Linear(5, 7, bias=bias), torch.randn(shape), torch.randn(*shape[:-1], 7)
    expected = residual + layer(x)
    out = add_linear(residual, layer, x)
    torch.testing.assert_close(out, expected)
    assert out.requires_grad
    with torch.no_grad():
        for into in (torch.empty_like(residual), residual):
            assert add_linear(residual, layer, x, into) is into
            torch.testing.assert_close(into, expected)


@pytest.mark.parametrize("mkl_is_fast", [True, False])
def test_linear_with_hooks_runs_them(mkl_is_fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotkernels.nn.linear._MKL_IS_FAST", mkl_is_fast)
    layer, residual = nn.Linear(5, 7), torch.randn(3, 7)
    layer.register_forward_hook(lambda module, args, out: out + 1)
    x = torch.randn(3, 5)
    torch.testing.assert_close(linear(layer, x), layer(x))
    torch.testing.assert_close(linear(layer, x, gelu=True), nn.functional.gelu(layer(x)))
    with torch.no_grad():
        torch.testing.assert_close(add_linear(residual, layer, x, torch.empty(3, 7)), residual + layer(x))
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 7))
    torch.testing.assert_close(linear(normed, x), normed(x))


class Doubled(Tensor):
    """A weight that F.linear takes for another, as quantised ones are."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            args = [2 * a.as_subclass(Tensor) if isinstance(a, Doubled) else a for a in args]
        return super().__torch_function__(func, types, args, kwargs or {})


def test_linear_leaves_other_weights_to_pytorch() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    expected = nn.functional.linear(x, 2 * layer.weight, layer.bias)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x, gelu=True), nn.functional.gelu(expected))
        torch.testing.assert_close(add_linear(torch.ones(3, 7), layer, x, torch.empty(3, 7)), 1 + expected)


@torch.no_grad()
def test_cross_attention_leaves_other_weights_to_pytorch() -> None:
    """Keys and values are one product only of weights that can be one."""
    module, x, kept = CrossAttention(16, 2), torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    doubled = copy.deepcopy(module)
    doubled.linear_k.weight.mul_(2)
    expected = doubled.attend(x, kept, kept)
    module.linear_k.weight = nn.Parameter(module.linear_k.weight.detach().as_subclass(Doubled), requires_grad=False)
    torch.testing.assert_close(module.attend(x, kept, kept).as_subclass(Tensor), expected)


@torch.no_grad()
def test_linear_heeds_autocast_and_the_switch_of_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, x, gelu=True).dtype == torch.bfloat16
    monkeypatch.delattr("hotkernels.nn.linear._onednn")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    torch.testing.assert_close(linear(layer, x, gelu=True), nn.functional.gelu(layer(x)))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacfwd, torch.func.vmap])
def test_linear_leaves_transforms_to_pytorch(transform: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotkernels.nn.linear._MKL_IS_FAST", False)
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    ours, theirs = (transform(lambda x, f=f: f(x).square().sum())(x) for f in (lambda x: linear(layer, x), layer))
    torch.testing.assert_close(ours, theirs)
    if transform is torch.func.vmap:
        for a, b in zip(*(torch.autograd.grad(y.sum(), layer.parameters()) for y in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b)


def test_linear_has_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotkernels.nn.linear._MKL_IS_FAST", False)
    layer, x, tangent = nn.Linear(5, 7), torch.randn(3, 5), torch.randn(3, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = linear(layer, torch.autograd.forward_ad.make_dual(x, tangent))
        got = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(got, tangent @ layer.weight.T)


@pytest.mark.parametrize("width", [3, 7])
@pytest.mark.parametrize("mkl_is_fast", [True, False])
def test_second_derivatives(mkl_is_fast: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotkernels.nn.linear._MKL_IS_FAST", mkl_is_fast)
    layer, x = nn.Linear(5, width), torch.randn(4, 3, 5, requires_grad=True)
    wanted = [x, *layer.parameters()]
    results = []
    for call in (lambda x: linear(layer, x, gelu=True), lambda x: nn.functional.gelu(layer(x))):
        grads = torch.autograd.grad(call(x).square().sum(), wanted, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        results.append([*grads, *torch.autograd.grad(penalty, wanted)])
    torch.testing.assert_close(*results)


def test_gradients_are_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch's: people see them in hooks, and flatten them by view."""
    monkeypatch.setattr("hotkernels.nn.linear._MKL_IS_FAST", False)
    for width in (3, 7):
        layer, x = nn.Linear(5, width), torch.randn(4, 5, requires_grad=True)
        for grad in torch.autograd.grad(linear(layer, x).square().sum(), [x, *layer.parameters()]):
            assert grad.is_contiguous()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layouts_that_onednn_does_not_serve_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotkernels.nn.linear._MKL_IS_FAST", False)
    layer, x = nn.Linear(5, 7), torch.randn(4, 5)
    nested = torch.nested.nested_tensor([x, x[:2]])
    for ours, theirs in zip(linear(layer, nested, gelu=False).unbind(), layer(nested).unbind(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(linear(layer, x.to_sparse_csr()), layer(x))
    layer.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(linear(layer, x), layer(x))
    with pytest.raises(RuntimeError) as theirs_error:
        nn.functional.linear(torch.tensor(1.0), torch.randn(7, 5))
    with pytest.raises(type(theirs_error.value)):
        linear(nn.Linear(5, 7), torch.tensor(1.0))


@pytest.mark.parametrize("grad", [True, False])
def test_wrong_channels_are_refused_as_by_pytorch(grad: bool) -> None:
    """oneDNN says only that it has no such product."""
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"\(10x8 and 16x48\)"):
        linear(nn.Linear(16, 48), torch.zeros(2, 5, 8))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_linear_keeps_only_what_gradients_need(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do not need may be written to, as after PyTorch's own product."""
    monkeypatch.setattr("hotkernels.nn.linear._MKL_IS_FAST", False)
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=frozen == "weight")
    layer.weight.requires_grad_(frozen == "x")
    copied = x * 1
    out = linear(layer, copied)
    expected = torch.autograd.grad(layer(x * 1).sum(), layer.weight if frozen == "x" else x)
    with torch.no_grad():
        (layer.weight if frozen == "x" else copied).add_(1)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), layer.weight if frozen == "x" else x), expected)
