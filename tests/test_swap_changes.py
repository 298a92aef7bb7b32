"""What happens to a swapped module later: what is set on it, hooked to it, put in its place or derived from it."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from published import LowRank
from swapping import answer, gradients, made, swapped_modules
from torch import Tensor, nn

import hotkernels
from hotkernels.baselines import AttentionEager, CrossAttentionEager
from hotkernels.models.eager import Mlp
from hotkernels.swap.modules import self_attention


class Switched(AttentionEager):
    """With what a user may set on it: a mask, flags, norms, a default of the class, and what may not be there."""

    comb = False

    def __init__(self) -> None:
        super().__init__(32, 4)
        self.mask: Any = None
        self.vis = False
        self.q_norm, self.norm = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = self.q_norm(q) @ k.mT * self.scale
        if self.mask is not None:
            logits = logits.masked_fill(~self.mask, -torch.inf)
        attn = logits.softmax(-1) * getattr(self, "gate", 1)
        if self.vis:
            self.attn_map = attn
        x = self.norm(((attn + 1 if self.comb else attn) @ v).transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(x))


def set_on(name: str, value: Any) -> Callable[[nn.Module], object]:
    return lambda module: setattr(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], value)


SET: dict[str, Callable[[Any], object]] = {
    "mask": set_on("mask", torch.ones(5, 5, dtype=torch.bool).tril()),
    "vis": set_on("vis", True),
    "comb": set_on("comb", True),
    "absent": set_on("gate", 0.5),
    "buffer": lambda module: module.register_buffer("gate", torch.tensor(0.5)),
    "parameter": set_on("scale", nn.Parameter(torch.tensor(0.3))),
    "number": set_on("scale", 0.3),
    "norm": set_on("q_norm", nn.LayerNorm(8)),
    "child's forward": set_on("norm.forward", torch.neg),
    "hook": lambda module: module.q_norm.register_forward_hook(lambda _, __, out: out * 2),
    "pre-hook": lambda module: module.norm.register_forward_pre_hook(lambda _, args: args[0] * 2),
    "backward hook": lambda module: module.norm.register_full_backward_hook(lambda _, grads, __: (grads[0] * 2,)),
}


def both_set(name: str, change: Callable[[nn.Module], nn.Module] = lambda module: module) -> tuple[Any, Any]:
    """A swapped module, or what `change` makes of it, and a plain one, on which the same was set since."""
    plain = Switched()
    ours = copy.deepcopy(plain)
    hotkernels.swap(ours)
    ours = change(ours)
    for each in (ours, plain):
        SET[name](each)
    return ours, plain


@pytest.mark.parametrize("name", SET)
def test_what_is_set_after_the_swap(name: str) -> None:
    """It counts, in a copy of before or of since, too; unset, the forward is fused again."""
    x = torch.randn(2, 5, 32)
    for change in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        ours, plain = both_set(name, change)
        for each in (ours, copy.deepcopy(ours)):
            expected = gradients(plain, x)
            for key, grad in gradients(each, x).items():
                assert torch.equal(grad, expected[key]), key
            assert torch.equal(getattr(each, "attn_map", x), getattr(plain, "attn_map", x))
            assert "scale" not in dict(plain.named_parameters()) or "scale" in expected


@pytest.mark.parametrize("name", ["mask", "comb", "absent", "parameter", "norm"])
def test_what_is_set_after_the_swap_counts_in_compiled_code(name: str) -> None:
    """Compiled before or after it is set."""
    x = torch.randn(2, 5, 32)
    plain = Switched()
    ours = copy.deepcopy(plain)
    hotkernels.swap(ours)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x))
    for each in (ours, plain):
        SET[name](each)
    torch.testing.assert_close(compiled(x), plain(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager", fullgraph=True)(x), plain(x))


def test_a_second_swap_says_which_modules_run_their_own_forward_since_they_were_changed() -> None:
    model = nn.Sequential(*[AttentionEager(32) for _ in range(3)])
    hotkernels.swap(model)
    model[1].scale = model[1].scale * 0.5
    model[2].scale = float(model[2].scale)  # an equal number
    model.append(AttentionEager(32))
    left = dict(hotkernels.swap(model).left)
    own = "swapped already, but runs its own forward since scale changed (unswap, then swap again)"
    assert left == {"0": "swapped already", "1": own, "2": "swapped already"}
    hotkernels.unswap(model)
    assert len(hotkernels.swap(model).replaced) == 4


def test_a_forward_of_the_class_set_after_the_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs, and a swap after it sees it; without it, the module is fused as before."""
    module, x = Switched(), torch.randn(2, 5, 32)
    expected, forward = module(x), Switched.forward
    hotkernels.swap(module)
    with monkeypatch.context() as patch:
        patch.setattr(Switched, "forward", lambda self, x: forward(self, x) * 2)
        torch.testing.assert_close(module(x), 2 * expected)
        with pytest.raises(ValueError, match="its output differs from attention"):
            hotkernels.swap(Switched())
        patch.setattr(Switched, "forward", lambda self, x: forward(self, x))
        other = Switched()
        other.load_state_dict(module.state_dict())
        hotkernels.swap(other)
        assert fused_calls(other, x) == 1
        assert fused_calls(module, x) == 0
    assert fused_calls(module, x) == 1


def fused_calls(module: nn.Module, x: Tensor) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls: list[Any] = []
        attend = self_attention.self_attention
        patch.setattr(self_attention, "self_attention", lambda *args: calls.append(1) or attend(*args))
        module(x)
    return len(calls)


def test_what_leaves_a_swapped_module_fused() -> None:
    """Other weights, adapted layers, modes, a copy, what no method looks at, and what was set and is unset."""
    module, x = Switched(), torch.randn(2, 5, 32)
    hotkernels.swap(module)
    module.load_state_dict(Switched().state_dict())
    module.qkv, module.proj_drop = LowRank(32, 96), nn.AlphaDropout(0.1)
    module.proj.register_forward_hook(lambda *_: None)
    module.name_in_model = "blocks.0.attn"
    module.mask = torch.ones(5, 5, dtype=torch.bool)
    assert fused_calls(module, x) == 0
    module.mask = None
    handle = module.norm.register_forward_hook(lambda *_: None)
    assert fused_calls(module, x) == 0
    handle.remove()
    for each in (module, module.eval(), module.double().float()):
        assert fused_calls(each, x) == 1
    module.qkv = nn.Linear(32, 96)
    for each in (module, copy.deepcopy(module)):
        assert fused_calls(each, x) == 1
    del module.proj._forward_hooks[next(iter(module.proj._forward_hooks))]  # a lambda does not pickle
    assert fused_calls(pickle.loads(pickle.dumps(module)), x) == 1
    hotkernels.unswap(module)
    assert vars(module).keys() == {*vars(Switched()), "name_in_model"}


def test_hooks_fire_in_use_and_not_in_the_probe() -> None:
    model, x = made("HoT-MixSTE")
    attn, fired = model.STEblocks[0].attn, []
    attn.register_forward_pre_hook(lambda *_: fired.append("before"))
    attn.register_forward_hook(lambda *_: fired.append("after"))
    attn.register_full_backward_hook(lambda *_: fired.append("backward"))
    attn.qkv.register_forward_hook(lambda *_: fired.append("qkv"))
    hotkernels.swap(model)
    assert fired == []
    answer(model, x)[0].sum().backward()
    assert fired == ["before", "qkv", "after", "backward"]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_class_derived_since_the_swap() -> None:
    """Parametrized after the swap: nothing of the model is undone until that is; then all is."""
    model = nn.Sequential(AttentionEager(32, 4), AttentionEager(32, 4))
    hotkernels.swap(model)
    model[1].register_parameter("temperature", nn.Parameter(torch.ones(1)))
    nn.utils.parametrize.register_parametrization(model[1], "temperature", Doubled())
    classes = [type(module) for module in model]
    assert ("1", "swapped already") in hotkernels.swap(nn.ModuleDict({"0": AttentionEager(32), "1": model[1]})).left
    with pytest.raises(
        ValueError, match=r"unswap: model must be one whose modules .+, got Param\w+ at 1, derived since"
    ):
        hotkernels.unswap(model)
    assert [type(module) for module in model] == classes
    nn.utils.parametrize.remove_parametrizations(model[1], "temperature")
    hotkernels.unswap(model)
    assert {type(module) for module in model} == {AttentionEager}


def test_a_class_derived_while_swapped() -> None:
    model = AttentionEager(32, 4)
    context = hotkernels.swapped(model)
    context.__enter__()
    model.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    nn.utils.parametrize.register_parametrization(model, "temperature", Doubled())
    with pytest.raises(ValueError, match=r"swapped: model must be one whose .+ at the model, derived since"):
        context.__exit__(None, None, None)
    assert nn.utils.parametrize.is_parametrized(model)


def test_swapped_leaves_a_swapped_model_swapped() -> None:
    """Whether all of it or a part, in nested blocks too; what others derive in the block is theirs."""
    model, x = made("HoT-MixSTE")
    with hotkernels.swapped(model) as outer:
        all_of_it = swapped_modules(model)
        with hotkernels.swapped(model, example_inputs=x) as inner:
            assert swapped_modules(model) == all_of_it
            nn.utils.parametrizations.weight_norm(model.STEblocks[0].mlp.fc1)
        assert swapped_modules(model) == all_of_it
        nn.utils.parametrize.remove_parametrizations(model.STEblocks[0].mlp.fc1, "weight")
    assert not swapped_modules(model)
    assert not inner.replaced
    assert not inner.functions
    assert {path for path, why in inner.left if why == "swapped already"} == all_of_it
    assert {path for path, _ in outer.replaced + outer.functions} == all_of_it


def test_unswapped_in_the_block() -> None:
    model = AttentionEager(32, 4)
    with hotkernels.swapped(model):
        hotkernels.unswap(model)
    assert type(model) is AttentionEager


def test_a_forward_that_was_wrapped_while_swapped(products: list[bool]) -> None:
    """As libraries do that hook into it: unswapped, the module computes as its own."""
    model, x = nn.Sequential(AttentionEager(32, 4), Mlp(32, 48)), torch.randn(2, 5, 32)
    expected = model(x)
    hotkernels.swap(model)
    for module in model:
        module.forward = functools.partial(module.forward)
    torch.testing.assert_close(model(x), expected)
    hotkernels.unswap(model)
    assert torch.equal(model(x), expected)


def test_a_copy_of_what_was_compiled_in_place_before_the_swap() -> None:
    """It is not compiled, but fused; so is attention of which a layer was."""
    model, x = nn.Sequential(AttentionEager(32, 4), AttentionEager(32, 4)), torch.randn(2, 5, 32)
    expected = model(x)
    torch._dynamo.reset()
    for module in (model[0], model[1].qkv):
        module.compile(backend="aot_eager")
    assert not hotkernels.swap(model).left
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fused_calls(each, x) == 2
        torch.testing.assert_close(each(x), expected)
    torch.testing.assert_close(model(x), expected)


def test_what_the_class_of_a_swapped_module_makes_computes_as_its_own() -> None:
    """No probe has seen it, nor swap what it holds."""
    model = nn.Sequential(Switched())
    hotkernels.swap(model)
    made, x = type(model[0])(), torch.randn(2, 5, 32)
    made.mask = torch.ones(5, 5, dtype=torch.bool).tril()
    own = Switched()
    own.mask = made.mask
    own.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(x), own(x))


class Drawing(Switched):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random() * np.random.rand()


def test_signatures_and_random_numbers_are_as_before() -> None:
    model = nn.Sequential(Switched(), Drawing())
    before = inspect.signature(model[0].forward)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    hotkernels.swap(model)
    assert inspect.signature(model[0].forward) == before
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2])


@pytest.mark.parametrize("name", ["linear_k", "linear_v"])
def test_one_bias_of_keys_or_values_is_taken_away(name: str) -> None:
    model = nn.ModuleList([CrossAttentionEager(32, 4, qkv_bias=True)])
    own = copy.deepcopy(model)
    hotkernels.swap(model)
    for one in (own, model):
        getattr(one[0], name).bias = None
    x_1, x = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    torch.testing.assert_close(model[0](x_1, x, x), own[0](x_1, x, x))


def test_what_is_put_in_the_place_of_linear_q_gets_its_input() -> None:
    model, seen = nn.ModuleList([CrossAttentionEager(32, 4)]), []
    hotkernels.swap(model)
    model[0].linear_q.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    x = torch.randn(3, 7, 32)
    model[0](torch.randn(1, 5, 32).expand(3, -1, -1), x, x)
    model[0](torch.randn(1, 5, 32), x[:1], x[:1])
    assert seen == [(3, 5, 32), (1, 5, 32)]
