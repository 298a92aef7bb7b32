"""MLPs, which hotkernels.swap fuses where oneDNN serves them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published import TimmMlp
from torch import Tensor, nn

import hotkernels
from hotkernels.baselines import AttentionEager
from hotkernels.nn import linear


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Identity()], ids=str)
def test_mlp(act: nn.Module, products: list[bool]) -> None:
    module = TimmMlp(act)
    x = torch.randn(2, 5, 32, requires_grad=True)
    wanted = [x, *module.parameters()]
    expected = module(x)
    grads = torch.autograd.grad(expected.square().sum(), wanted)
    assert hotkernels.swap(module, example_inputs=x).replaced == [("", "MLP")]
    out = module(x)
    torch.testing.assert_close(out, expected)
    for got, want in zip(torch.autograd.grad(out.square().sum(), wanted), grads, strict=True):
        torch.testing.assert_close(got, want)
    products.clear()
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
    gelu = str(act) == "GELU(approximate='none')"
    intel = linear._MKL_IS_FAST
    assert products == ([True] if intel and gelu else [] if intel else [gelu, False])


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "dropout": lambda mlp: mlp.train(),
    "act": lambda mlp: setattr(mlp, "act", nn.Tanh()),
    "tanh": lambda mlp: setattr(mlp.act, "approximate", "tanh"),
    "fc1": lambda mlp: setattr(mlp, "fc1", nn.Sequential(mlp.fc1, nn.Tanh())),
    "fc2": lambda mlp: setattr(mlp, "fc2", nn.Sequential(mlp.fc2, nn.Tanh())),
    "hook on fc1": lambda mlp: mlp.fc1.register_forward_hook(double),
    "hook on act": lambda mlp: mlp.act.register_forward_hook(double),
    "hook on drop": lambda mlp: mlp.drop1.register_forward_hook(double),
}


@pytest.mark.parametrize("change", CHANGES)
def test_mlp_heeds_what_happens_to_its_layers(change: str, products: list[bool]) -> None:
    module, plain, x = TimmMlp(nn.GELU(), 0.5).eval(), TimmMlp(nn.GELU(), 0.5).eval(), torch.randn(2, 5, 32)
    plain.load_state_dict(module.state_dict())
    assert hotkernels.swap(module).replaced == [("", "MLP, in evaluation; training has drop = 0.5")]
    products.clear()
    module(x)
    assert len(products) == (0 if linear._MKL_IS_FAST else 2)  # gradients are wanted
    results = []
    for each in (module, plain):
        CHANGES[change](each)
        torch.manual_seed(0)
        results.append(each(x))
    torch.testing.assert_close(*results)


def test_mlp_calls_its_layers_where_all_modules_have_hooks(products: list[bool]) -> None:
    module = TimmMlp(nn.GELU())
    hotkernels.swap(module)
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        module(torch.randn(2, 5, 32))
    finally:
        handle.remove()
    assert seen[:-1] == [nn.Linear, nn.GELU, nn.Dropout, nn.Identity, nn.Linear, nn.Dropout]


@pytest.mark.parametrize("training", [True, False])
def test_mlp_in_a_sequence(training: bool, products: list[bool]) -> None:
    """Of whatever else lies in it; dropout draws as before."""
    layers = [nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Dropout(0.5), nn.Linear(48, 48), nn.GELU("tanh")]
    module = nn.Sequential(*layers, nn.Linear(48, 16), double_layer := nn.Linear(16, 8)).train(training)
    double_layer.register_forward_hook(double)
    plain, x = copy.deepcopy(module), torch.randn(2, 5, 32)
    assert hotkernels.swap(module).replaced == [("", "MLP")]
    with torch.no_grad():
        torch.manual_seed(0)
        expected = plain(x)
        torch.manual_seed(0)
        torch.testing.assert_close(module(x), expected)
    assert products == ([True] if linear._MKL_IS_FAST else [True, False, False])
    torch.testing.assert_close(module[1:3](x), plain[1:3](x))
    with pytest.raises(ValueError, match="swap: model must be one with a module that swap knows"):
        hotkernels.swap(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3)))


def test_mlps_that_gain_nothing_are_not_named(products: list[bool]) -> None:
    class Own(TimmMlp):
        def __init__(self) -> None:
            super().__init__(nn.GELU())
            self.gamma = nn.Parameter(torch.ones(24))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gamma

    class Gates(TimmMlp):
        def __init__(self) -> None:
            super().__init__(nn.GELU())
            self.fc1 = nn.Linear(32, 96)

        def forward(self, x: Tensor) -> Tensor:
            gate, x = self.fc1(x).chunk(2, -1)
            return self.fc2(self.act(gate) * x)

    others = [TimmMlp(nn.GELU(), norm=nn.LayerNorm(48)), TimmMlp(nn.GELU()).bfloat16(), Own(), Gates()]
    report = hotkernels.swap(nn.Sequential(AttentionEager(32, 4), *others))
    assert report.replaced == [("0", "attention")]
    assert report.left == []


@pytest.mark.skipif(not linear._HAS_ONEDNN, reason="torch has no oneDNN")
def test_a_sequence_is_not_tried_out() -> None:
    """What it does follows from its class: no copy of what may be a whole model, no use of lazy layers."""

    class Forbidden(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    module = nn.Sequential(
        Forbidden(4, 4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 0), nn.Linear(0, 4), nn.LazyLinear(3)
    )
    assert hotkernels.swap(module).replaced == [("", "MLP")]
