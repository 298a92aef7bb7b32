"""hotkernels.swap on published models: same answers, gradients and random numbers; what it leaves alone; what stays."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import published
import published_tcformer
import pytest
import torch
from published import VisionAttention, ViT, hot_mixste, hot_motionbert
from published_tcformer import GridAttention, TCAttention, TCFormer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import hotkernels
from hotkernels.baselines import AttentionEager, CrossAttentionEager
from hotkernels.compat import hot
from hotkernels.models import eager
from hotkernels.models.eager import cluster_dpc_knn

# Five neighbours where published models take two: then no densities tie, which rounding would order differently.
MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "HoT-MixSTE": (lambda: hot_mixste(k=5), (2, 27, 5, 2)),
    "TPC-MixSTE": (lambda: hot_mixste(center=True, recover=None, k=5), (2, 27, 5, 2)),
    "HoT-MotionBERT": (lambda: hot_motionbert(k=5), (2, 27, 5, 3)),
    "HoT-MotionAGFormer": (lambda: published.MotionAGFormer(k=5), (2, 27, 5, 3)),
    "TPC-MHFormer": (lambda: published.MHFormer(k=5), (2, 27, 4, 2)),
    "TCFormer": (TCFormer, (2, 3, 32, 32)),
    "ViT": (ViT, (2, 3, 16, 16)),
}
each_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    return make(), torch.randn(shape)


def answer(model: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The model's output from a seed, and the random state that it leaves."""
    torch.manual_seed(seed)
    out = model(x)
    return out[0] if isinstance(out, tuple) else out, torch.get_rng_state()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out, _ = answer(model, x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    return {"": out.detach(), **{n: g for n, g in zip(names, grads, strict=True) if g is not None}}


def tokens(N: int, score: bool = False) -> dict[str, Any]:
    """N tokens as TCFormer has them, of an initial grid of 8 x 12 and for a map of 4 x 6."""
    out = {
        "x": torch.randn(2, N, 32),
        "token_num": N,
        "map_size": [4, 6],
        "init_grid_size": [8, 12],
        "idx_token": torch.randint(N, (2, 96)),
        "agg_weight": torch.rand(2, 96, 1),
    }
    return out | ({"token_score": torch.randn(2, N, 1)} if score else {})


def swapped_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__.startswith("Fused")}


@each_model
def test_outputs_and_gradients(name: str) -> None:
    """Our error against float64 is at most 2x the plain model's (3x for gradients), beside some roundings."""
    model, x = made(name)
    model.eval()
    plain = gradients(model, x)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    hotkernels.swap(model)
    ours = gradients(model, x)
    assert ours.keys() == plain.keys()
    for key, want in exact.items():
        error, allowed = (ours[key] - want).abs().max(), (plain[key] - want).abs().max()
        floor = 16 * torch.finfo(torch.float32).eps * max(want.abs().max(), 1.0)
        assert error <= (3 if key else 2) * allowed + floor, (key, error, allowed)


@each_model
def test_training_draws_the_same_random_numbers(name: str) -> None:
    """DropPath, dropout of projections and the noise of the clustering: none of it moves."""
    model, x = made(name)
    expected, state = answer(copy.deepcopy(model).train(), x)
    hotkernels.swap(model)
    out, left = answer(model.train(), x)
    assert torch.equal(left, state)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


REPORTS = {
    "HoT-MixSTE": {"STEblocks.0.attn", "TTEblocks.2.attn", "cross_attention", ""},
    "TPC-MixSTE": {"STEblocks.0.attn", "TTEblocks.2.attn", ""},
    "HoT-MotionBERT": {"blocks_st.0.attn_s", "blocks_ts.1.attn_t", "cross_attention", ""},
    "HoT-MotionAGFormer": {"layers.0.att_spatial.mixer", "layers.1.att_temporal.mixer", "cross_attention", ""},
    "TPC-MHFormer": {"encoder_1.attn", "SHR_blocks.0.attn_3", "CHI_blocks.0.attn_1", ""},
    "TCFormer": {"block1.0.attn", "block1.1.attn", "block2.0.attn", "block3.1.attn", "ctm1", "ctm2"},
    "ViT": {"blocks.0.attn", "blocks.1.attn"},
}


@each_model
def test_report(name: str) -> None:
    model, x = made(name)
    attentions = {
        n for n, m in model.named_modules() if isinstance(m, (AttentionEager, VisionAttention, GridAttention))
    }
    crossed = {n for n, m in model.named_modules() if isinstance(m, CrossAttentionEager)}
    report = hotkernels.swap(model, example_inputs=x)
    assert swapped_modules(model) >= REPORTS[name]
    assert {path for path, _ in report.replaced + report.left if not path.startswith("ctm")} == attentions | crossed
    assert {path for path, _ in report.replaced + report.functions} == swapped_modules(model)
    assert report.left == []
    assert str(report).startswith("replaced\n")


@each_model
def test_unswap_gives_the_same_bits(name: str) -> None:
    model, x = made(name)
    classes = [type(module) for module in model.modules()]
    expected, _ = answer(model, x)
    hotkernels.swap(model, example_inputs=x)
    hotkernels.unswap(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(answer(model, x)[0], expected)


@each_model
def test_deepcopy_pickle_and_state_dict(name: str) -> None:
    model, x = made(name)
    keys = list(model.state_dict())
    hotkernels.swap(model)
    expected, _ = answer(model, x)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert swapped_modules(other) == swapped_modules(model)
        assert list(map(type, other.modules())) == list(map(type, model.modules()))
        assert torch.equal(answer(other, x)[0], expected)
        hotkernels.unswap(other)
        assert not swapped_modules(other)
    assert swapped_modules(model)
    assert list(model.state_dict()) == keys
    fresh, _ = made(name)
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(made(name)[0].state_dict(), strict=True)
    model.load_state_dict(fresh.state_dict(), strict=True)
    assert torch.equal(answer(model, x)[0], expected)


def test_unpickles_in_a_process_that_has_swapped_nothing(tmp_path: Path) -> None:
    model, x = made("HoT-MixSTE")
    hotkernels.swap(model)
    torch.save((model, x, answer(model, x)[0]), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, x, out = torch.load(sys.argv[1], weights_only=False); torch.manual_seed(0)\n"
        "assert type(model).__name__ == 'FusedHoTMixSTEEager' and torch.allclose(model(x), out, atol=1e-5)"
    )
    paths = ":".join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pt"], env={"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["TCFormer", "ViT"])
@torch.no_grad()
def test_compiles_after_the_swap(name: str) -> None:
    model, x = made(name)
    hotkernels.swap(model.eval())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(answer(compiled, x)[0], answer(model, x)[0])


@pytest.mark.parametrize("name", ["HoT-MixSTE", "HoT-MotionBERT"])
def test_trains_compiled_after_the_swap(name: str) -> None:
    model, x = made(name)
    hotkernels.swap(model.eval())
    torch._dynamo.reset()
    compiled, expected = torch.compile(model, backend="aot_eager"), gradients(model, x)
    for key, grad in gradients(compiled, x).items():
        torch.testing.assert_close(grad, expected[key.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True)  # as in PyTorch 2.11
def test_swap_after_compile_and_back() -> None:
    model, x = made("ViT")
    plain, _ = answer(copy.deepcopy(model).eval(), x)
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend="aot_eager")
    answer(compiled, x)
    calls: list[Any] = []
    hotkernels.swap(compiled)
    attn = model.blocks[0].attn
    attn.proj.register_forward_hook(lambda *_: calls.append(type(attn).__name__))
    torch.testing.assert_close(answer(compiled, x)[0], plain, rtol=1e-4, atol=1e-5)
    assert calls == ["FusedVisionAttention"]
    hotkernels.unswap(compiled)
    torch.testing.assert_close(answer(compiled, x)[0], plain)


def test_optimizer_and_parameters_stay() -> None:
    model, x = made("HoT-MixSTE")
    plain = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, plain))
    before = list(model.parameters())
    hotkernels.swap(model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    for _ in range(3):
        for m, o in ((model, optimizer), (plain, other)):
            o.zero_grad()
            answer(m.train(), x)[0].square().mean().backward()
            o.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_ddp_afterwards(tmp_path: Path) -> None:
    model, x = made("HoT-MixSTE")
    expected = gradients(model.eval(), x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hotkernels.swap(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        weight = torch.randn(expected[""].shape, generator=torch.Generator().manual_seed(1))
        (answer(wrapped, x)[0] * weight).sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)
        hotkernels.unswap(wrapped)
        assert hotkernels.swap(wrapped).replaced[0][0].startswith("module.")
    finally:
        torch.distributed.destroy_process_group()


DROPS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "ViT": (lambda: VisionAttention(32, 4), (torch.randn(3, 5, 32),)),
    "MixSTE": (lambda: AttentionEager(32, 4), (torch.randn(3, 5, 32),)),
    "MotionBERT": (lambda: eager.MotionBERTAttention(32, 4, "temporal"), (torch.randn(6, 5, 32), 3)),
    "MotionAGFormer": (lambda: published.FramesAttention(32, 32, 4, "temporal"), (torch.randn(2, 3, 5, 32),)),
    "HoT": (lambda: CrossAttentionEager(32, 4), (torch.randn(1, 9, 32).expand(3, -1, -1), *torch.randn(2, 3, 5, 32))),
    "PVT": (lambda: GridAttention(32, 4, sr_ratio=2), (torch.randn(3, 24, 32), 4, 6)),
    "TCFormer": (lambda: TCAttention(32, 4, sr_ratio=2), (tokens(12), tokens(20, score=True))),
}


@pytest.mark.parametrize("name", DROPS)
def test_dropout_on_the_probabilities(name: str) -> None:
    """In training it draws what the original draws; in evaluation the forward is fused."""
    make, args = DROPS[name]
    module = make()
    module.attn_drop.p = 0.5
    for training in (True, False):
        plain, ours = copy.deepcopy(module).train(training), copy.deepcopy(module).train(training)
        report = hotkernels.swap(ours)
        assert report.replaced[0][1].endswith(", in evaluation; training has attn_drop = 0.5")
        results = []
        for each in (plain, ours):
            torch.manual_seed(3)
            out = each(*args)
            out.square().sum().backward()
            results.append([out, torch.get_rng_state(), *(p.grad for p in each.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not torch.equal(plain(*args), module.train()(*args))


@pytest.mark.parametrize("change", ["hook", "backward hook", "AlphaDropout"])
@pytest.mark.parametrize("name", DROPS)
def test_what_sees_the_probabilities_after_the_swap(name: str, change: str) -> None:
    make, args = DROPS[name]
    module, plain = make(), make()
    plain.load_state_dict(module.state_dict())
    hotkernels.swap(module)
    seen: list[Any] = []
    for each in (module, plain):
        if change == "AlphaDropout":
            each.attn_drop = nn.AlphaDropout(0.5)
        elif change == "hook":
            each.attn_drop.register_forward_hook(lambda _, __, out: seen.append(out.shape) or out * 2)
        else:
            each.attn_drop.register_full_backward_hook(lambda _, __, out: seen.append(out[0].shape))
    torch.manual_seed(1)
    out = module(*args)
    out.sum().backward()
    torch.manual_seed(1)
    expected = plain(*args)
    expected.sum().backward()
    assert torch.equal(out, expected)
    assert len(seen) == (2 if "hook" in change and name != "ViT" else 0)  # which gives its probability to the operator
    assert seen[:1] == seen[1:]


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


def test_swap_leaves_no_trace() -> None:
    """Random state, train and eval flags, buffers, gradients: with and without example_inputs."""
    model, x = made("TPC-MHFormer")
    model.SHR_blocks.eval()
    flags = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    state, given = torch.get_rng_state(), x.clone()
    hotkernels.swap(model, example_inputs=(x,))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)
    assert [module.training for module in model.modules()] == flags
    assert all(map(torch.equal, model.buffers(), buffers))
    assert all(parameter.grad is None for parameter in model.parameters())
    added = {value for name, value in vars(published).items() if name.startswith("_hotkernels")}
    assert added <= {hot.cluster_dpc_knn, hot.cluster_dpc_knn_center}


def test_two_models_of_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the swapped one calls ours; what else changes in the file is seen by both."""
    calls = []
    theirs, recovered = eager.cluster_dpc_knn, eager._recovered
    one, other = hot_mixste(), hot_mixste()
    hotkernels.swap(one)
    monkeypatch.setattr(eager, "cluster_dpc_knn", lambda *args: calls.append("theirs") or theirs(*args))
    monkeypatch.setattr(eager, "_recovered", lambda *args: calls.append("recovered") or recovered(*args))
    one(torch.randn(1, 27, 5, 2))
    assert calls == ["recovered"]
    other(torch.randn(1, 27, 5, 2))
    assert calls == ["recovered", "theirs", "recovered"]
    assert type(other) is eager.HoTMixSTEEager


def test_the_check_of_one_model_leaves_another_of_its_file_alone() -> None:
    (one, x), (other, _) = made("TCFormer"), made("TCFormer")
    hotkernels.swap(one)
    expected, _ = answer(one, x)
    hotkernels.swap(other, example_inputs=x)
    assert torch.equal(answer(one, x)[0], expected)
    hotkernels.unswap(one)
    answer(other, x)


def test_swapped_restores_whatever_happens() -> None:
    model, x = made("HoT-MixSTE")
    expected, _ = answer(model.eval(), x)
    hotkernels.swap(model.STEblocks)
    kept = swapped_modules(model)
    with contextlib.suppress(KeyError), hotkernels.swapped(model, example_inputs={"x": x}) as report:
        assert swapped_modules(model) > kept
        raise KeyError
    assert ("STEblocks.0.attn", "swapped already") in report.left
    assert swapped_modules(model) == kept
    hotkernels.unswap(model)
    assert torch.equal(answer(model, x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = ViT().to(dtype).eval()
    x = torch.randn(2, 3, 16, 16, dtype=dtype)
    expected = model(x)
    hotkernels.swap(model, example_inputs=x)
    assert len(swapped_modules(model)) == 2
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        model, x = made("ViT")
        expected, _ = answer(model.eval(), x)
        hotkernels.swap(model, example_inputs=x)
        torch.testing.assert_close(answer(model, x)[0], expected)


@pytest.mark.parametrize("name", ["HoT-MixSTE", "TCFormer"])
@pytest.mark.parametrize("default", [torch.bfloat16, "meta"])
def test_other_defaults(default: Any, name: str) -> None:
    """What new tensors are by default says nothing of a model that exists."""
    model, _ = made(name)
    try:
        torch.set_default_dtype(default) if isinstance(default, torch.dtype) else torch.set_default_device(default)
        report = hotkernels.swap(model)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert report.left == []
    assert swapped_modules(model) >= REPORTS[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", ["Cooler", "Alibi", "WiderInHalf"])
def test_rounding_in_half_precision_hides_nothing(dtype: torch.dtype, change: str) -> None:
    """Of a module: rounding to half precision is larger than what some of these change."""
    model = nn.Sequential(globals()[change](64, 4), AttentionEager(64, 4)).to(dtype)
    report = hotkernels.swap(model)
    assert report.left == [("0", "its output differs from attention")]
    assert report.replaced == [("1", "attention")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_of_16_blocks_is_no_difference(dtype: torch.dtype) -> None:
    model = eager.HoTMixSTEEager(frames=81, token_num=27, layer_index=3, channels=64, depth=8).to(dtype)
    report = hotkernels.swap(model, example_inputs=torch.randn(2, 81, 17, 2, dtype=dtype))
    assert len(report.replaced) == 17


@pytest.mark.parametrize("averaged", [False, True])
def test_token2map_is_that_of_the_module(averaged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of tokens is made by the function that the file has, also where no convolution reduces it."""
    theirs = published_tcformer.token2map
    monkeypatch.setattr(published_tcformer, "token2map", lambda token_dict: theirs(token_dict) * 2)
    module = TCAttention(32, 4, sr_ratio=2, use_sr_layer=not averaged)
    args = tokens(12), tokens(20, score=True)
    expected = module(*args)
    hotkernels.swap(module)
    torch.testing.assert_close(module(*args), expected)


@torch.no_grad()
def test_token2map_of_an_imported_file_compiles() -> None:
    names: dict[str, Any] = {"published_tcformer": published_tcformer}
    exec(
        "class Through(published_tcformer.TCAttention):\n"
        "    def forward(self, q_dict, kv_dict):\n"
        "        return published_tcformer.token2map and published_tcformer.TCAttention.forward(self, q_dict, kv_dict)",
        names,
    )
    module, args = names["Through"](32, 4, sr_ratio=2), (tokens(12), tokens(20, score=True))
    expected = module(*args)
    report = hotkernels.swap(module)
    assert report.replaced == [("", "attention over tokens with scores")]
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), expected)


def test_arguments_beyond_go_to_the_original() -> None:
    module, x = VisionAttention(32, 4), torch.randn(2, 5, 32)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    plain, masked = module(x), module(x, mask)
    hotkernels.swap(module)
    torch.testing.assert_close(module(x), plain)
    torch.testing.assert_close(module(x, None), plain)
    assert torch.equal(module(x, attn_mask=mask), masked)


def test_shared_submodules_are_swapped_once() -> None:
    attn = AttentionEager(32)
    model = nn.ModuleDict({"first": attn, "second": attn})
    assert hotkernels.swap(model).replaced == [("first, second", "attention")]
    hotkernels.unswap(model)
    assert type(attn) is AttentionEager


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def with_norms(module: CrossAttentionEager) -> nn.Module:
    parametrizations.weight_norm(module.linear_k)
    return module


def with_hook(module: CrossAttentionEager) -> nn.Module:
    module.linear_v.register_forward_hook(lambda _, __, out: out * 2)
    return module


def with_identity(module: CrossAttentionEager) -> nn.Module:
    module.attn_drop = nn.Identity()
    return module


class LowRank(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


def with_low_rank(module: CrossAttentionEager) -> nn.Module:
    module.linear_k = LowRank(32, 32)
    return module


@pytest.mark.parametrize("change", [frozen, with_norms, with_hook, with_low_rank, with_identity])
def test_layers_that_are_more_than_a_weight(change: Callable[[Any], nn.Module]) -> None:
    module = change(CrossAttentionEager(32, 4, qkv_bias=True))
    token, x = torch.randn(1, 9, 32).expand(3, -1, -1), torch.randn(3, 5, 32, requires_grad=True)
    expected = module(token, x, x)
    hotkernels.swap(module)
    out = module(token, x, x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in module.parameters())


# What looks like plain attention and is not. All of it would pass a look at a fresh module's output or at its layers.


class RelativeBias(AttentionEager):
    def __init__(self) -> None:
        super().__init__(32, 4)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))


class Rotary(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        angle = torch.arange(N)[:, None] * torch.logspace(0, -1, q.shape[-1] // 2)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2) for t in (q, k))
        return self.proj(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Residual(AttentionEager):
    """Zero at the start, as a projection that is initialised to zero hides."""

    def __init__(self) -> None:
        super().__init__(32, 4)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.proj(x)


class DropKey(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (torch.rand(x.shape[:2]) > 0.1)[..., None]) if self.training else super().forward(x)


class TrainingScale(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.1 if self.training else 1.0)


class ReturnsWeights(AttentionEager):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class StoresMap(AttentionEager):
    """What a model prunes by later: on the module or in a list of its."""

    def __init__(self, where: str) -> None:
        super().__init__(32, 4)
        self.where, self.maps = where, []

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q @ k.mT * self.scale).softmax(-1)
        if self.where == "list":
            self.maps.append(attn.detach())
        elif self.where == "attribute" or self.training:
            self.attn_map = attn.detach()
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))


class Limited(AttentionEager):
    """Plain attention where there are few tokens; what else it does says `limit`."""

    def __init__(self, limit: str) -> None:
        super().__init__(32, 4)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * self.scale
        if self.limit == "window":
            far = (torch.arange(N) - torch.arange(N)[:, None]).abs() > 128
            logits = logits.masked_fill(far, -torch.inf)
        elif self.limit == "top-k":
            least = logits.topk(min(256, N)).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        elif self.limit == "chunks":
            chunk = torch.arange(N) // 49
            logits = logits.masked_fill(chunk != chunk[:, None], -torch.inf)
        elif self.limit == "log N":
            logits = logits * max(1.0, math.log(N, 197))
        elif N > 256:
            raise IndexError
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class ShortFrames(published.FramesAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.shape[1 if self.mode == "temporal" else 2] <= 243 else 0.5)


class ShortSequence(eager.MotionBERTAttention):
    def forward(self, x: Tensor, seqlen: int = 1) -> Tensor:
        return super().forward(x, seqlen) * (1.0 if (seqlen if self.mode == "temporal" else x.shape[1]) <= 243 else 0.5)


class ShortCross(CrossAttentionEager):
    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        return super().forward(x_1, x_2[:, :243], x_3[:, :243])


class ShortGrid(GridAttention):
    def attend(self, x: Tensor, keys: Tensor, score: Tensor | None = None) -> Tensor:
        return super().attend(x, keys[:, :243], score if score is None else score[:, :243])


class ShortTokens(TCAttention):
    def attend(self, x: Tensor, keys: Tensor, score: Tensor | None = None) -> Tensor:
        return super().attend(x, keys[:, :243], score if score is None else score[:, :243])


class Cooler(AttentionEager):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.temperature = 0.9

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT * self.scale * self.temperature).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class Alibi(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        slope = 0.25 * 0.5 ** torch.arange(2, 2 * self.num_heads + 2, 2, dtype=x.dtype)
        bias = -slope[:, None, None] * (torch.arange(N) - torch.arange(N)[:, None]).abs()
        return self.proj(((q @ k.mT * self.scale + bias).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class WiderInHalf(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.dtype == torch.float32 else 1.5)


class NeedsMask(AttentionEager):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * mask


class Window(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (-1, 7))
        return super().forward(windows.flatten(0, 1)).unflatten(0, windows.shape[:2]).flatten(1, 2)


class Unfit(AttentionEager):
    """No class can be derived from it without an argument."""

    def __init_subclass__(cls, *, x: int) -> None:
        super().__init_subclass__()


class SomeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))


def replaced_forward() -> nn.Module:
    module = AttentionEager(32, 4)
    module.forward = lambda x: x
    return module


def hooked_probabilities() -> nn.Module:
    module = AttentionEager(32, 4)
    module.attn_drop.register_forward_hook(lambda *_: None)
    return module


def with_qkv(layer: nn.Module) -> nn.Module:
    module = AttentionEager(32, 4)
    module.qkv = layer
    return module


def with_ratio(ratio: Any, layer: nn.Module | None = None) -> nn.Module:
    module = GridAttention(32, 4, sr_ratio=2)
    module.sr_ratio, module.sr = ratio, layer or module.sr
    return module


def with_reduced_qkv() -> nn.Module:
    module = AttentionEager(32, 4)
    module.sr_ratio, module.sr = 2, nn.Conv2d(32, 32, 2, 2)
    return module


class NoTokenMap(TCAttention):
    def __init__(self) -> None:
        super().__init__(32, 4, sr_ratio=2)

    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        return super().forward(q_dict, kv_dict)


class MapOfKeys(NoTokenMap):
    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        return published_tcformer.TCAttention.forward(self, {**q_dict, "map_size": kv_dict["map_size"]}, kv_dict)


class DetachedScore(NoTokenMap):
    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        score = kv_dict["token_score"].detach() if "token_score" in kv_dict else kv_dict["x"][..., :1] * 0
        return published_tcformer.TCAttention.forward(self, q_dict, {**kv_dict, "token_score": score})


class Decorated(AttentionEager):
    def __init__(self) -> None:
        super().__init__(32, 4)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "q and k norms": (lambda: VisionAttention(32, 4, qk_norm=True), "it has q_norm, a LayerNorm"),
    "relative bias": (RelativeBias, "it has relative_position_bias_table"),
    "rotary": (lambda: Rotary(32, 4), "its output differs from attention"),
    "residual": (Residual, "its output differs from attention"),
    "drop key": (lambda: DropKey(32, 4), "its forward draws random numbers in training"),
    "training scale": (lambda: TrainingScale(32, 4), "its output differs from attention in training"),
    "returns weights": (lambda: ReturnsWeights(32, 4), "its output differs from attention"),
    "stores its map": (lambda: StoresMap("attribute"), "its forward stores attn_map"),
    "stores its map in training": (lambda: StoresMap("training"), "its forward stores attn_map in training"),
    "adds to a list": (lambda: StoresMap("list"), "its forward stores maps"),
    "window of 256": (lambda: Limited("window"), "its output differs from attention on long input"),
    "256 largest": (lambda: Limited("top-k"), "its output differs from attention on long input"),
    "chunks of 49": (lambda: Limited("chunks"), "its output differs from attention on long input"),
    "scaled by log N": (lambda: Limited("log N"), "its output differs from attention on long input"),
    "at most 256": (lambda: Limited("error"), "its forward or its gradient fails (IndexError) on long input"),
    "cross-attention to 243": (
        lambda: ShortCross(32, 4),
        "its output differs from cross-attention on long input",
    ),
    "243 tokens": (
        lambda: ShortTokens(32, 4, sr_ratio=2),
        "its output differs from attention over tokens with scores on long input",
    ),
    **{
        f"243 of {cls.func.__name__}, {mode}": (
            lambda cls=cls, mode=mode: cls(mode=mode),
            "its output differs from attention over frames or joints on long input",
        )
        for cls in (
            functools.partial(ShortFrames, 32, 32, 4),
            functools.partial(ShortSequence, 32, 4),
        )
        for mode in ("spatial", "temporal")
    },
    "reduced to 243": (
        lambda: ShortGrid(32, 4, sr_ratio=2),
        "its output differs from attention over a grid on long input",
    ),
    "needs a mask": (lambda: NeedsMask(32, 4), "its forward takes x, mask"),
    "windows": (lambda: Window(32, 4), "its forward or its gradient fails (RuntimeError)"),
    "no mode": (lambda: eager.MotionBERTAttention(32, 4, "vanilla"), "its mode is vanilla, not spatial or temporal"),
    "ratio per side": (lambda: with_ratio((2, 4)), "sr_ratio is (2, 4)"),
    "ratio on qkv": (lambda: with_reduced_qkv(), "it has sr, a Conv2d"),
    "reduced otherwise": (lambda: with_ratio(2, nn.Conv1d(32, 32, 2)), "it has sr, a Conv1d"),
    "no token2map": (NoTokenMap, "it reduces its keys (sr_ratio = 2) without a token2map of its file"),
    "map of the keys": (MapOfKeys, "its output differs from attention over tokens with scores"),
    "detached score": (DetachedScore, "its gradients differ from attention over tokens with scores"),
    "unfit class": (
        lambda: Unfit(32, 4),
        "its class cannot be derived from (Unfit.__init_subclass__() missing 1 required keyword-only argument: 'x')",
    ),
    "no gradient": (Decorated, "its forward is decorated"),
    "torch's": (lambda: nn.MultiheadAttention(32, 4), "a form of attention that swap does not know"),
    "unknown": (SomeAttention, "a form of attention that swap does not know"),
    "ours": (lambda: hotkernels.nn.Attention(32, 4), "it is fused as it is"),
    "instance forward": (replaced_forward, "its forward was replaced on the instance"),
    "hooked probabilities": (hooked_probabilities, "attn_drop has hooks, which see the probabilities"),
    "quantised": (
        lambda: with_qkv(torch.ao.nn.quantized.dynamic.Linear(32, 96)),
        "qkv is torch.ao.nn.quantized.dynamic.modules.linear.Linear",
    ),
    "no qkv": (lambda: with_qkv(nn.Linear(32, 64)), "qkv makes 64 channels of 32 where proj takes 32"),
    "wide heads": (lambda: AttentionEager(514, 2), "2 heads of 514 channels: a head has at most 256"),
    "meta device": (lambda: AttentionEager(32, 4).to("meta"), "on the meta device nothing can be compared"),
    "scripted": (lambda: torch.jit.trace(AttentionEager(32, 4), torch.ones(1, 2, 32)), "it is scripted"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", LEFT)
def test_left_alone_with_a_reason(what: str) -> None:
    make, reason = LEFT[what]
    odd = make()
    cls = type(odd)
    report = hotkernels.swap(nn.ModuleDict({"odd": odd, "plain": AttentionEager(32)}))
    assert getattr(odd, "maps", []) == []
    assert report.left == [("odd", reason)]
    assert report.replaced == [("plain", "attention")]
    assert type(odd) is cls
    with pytest.raises(ValueError, match=r"swap: model must be one with a module that swap knows, got .+") as error:
        hotkernels.swap(odd)
    assert reason in str(error.value)


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


class Named(nn.Module):
    """No class can be derived from those below it without an argument."""

    def __init_subclass__(cls, *, name: str) -> None:
        super().__init_subclass__()


class NamedClustering(Named, name="clustering"):
    def __init__(self) -> None:
        super().__init__()
        self.attn = AttentionEager(8, 2)

    def forward(self, x: Tensor) -> Any:
        return cluster_dpc_knn(self.attn(x), 3, 4)


def test_a_clustering_class_that_cannot_be_derived_from() -> None:
    model = NamedClustering()
    report = hotkernels.swap(model)
    ((path, reason),) = report.left
    assert path == ""
    assert reason.startswith("forward: cluster_dpc_knn: its class cannot be derived from (Named.__init_subclass__() ")
    assert report.replaced == [("attn", "attention")]
    assert type(model) is NamedClustering


@pytest.mark.parametrize("missing", ["kind", "fits", "examples", "forward"])
def test_a_twin_without_a_part(missing: str) -> None:
    parts = {
        "kind": "mine",
        "fits": classmethod(lambda cls, module: False),
        "examples": classmethod(lambda cls, module: []),
        "forward": lambda self, x: x,
    }
    twin = type("Half", (hotkernels.Twin,), {name: part for name, part in parts.items() if name != missing})
    with pytest.raises(TypeError, match=rf"register_twin: twin must be a subclass of .+, got Half without {missing}"):
        hotkernels.register_twin(twin)


def test_wrong_arguments() -> None:
    model, x = made("HoT-MixSTE")
    with pytest.raises(TypeError, match=r"swap: model must be a torch.nn.Module, got function"):
        hotkernels.swap(lambda x: x)
    with pytest.raises(TypeError, match=r"unswap: model must be a torch.nn.Module, got int"):
        hotkernels.unswap(3)
    with pytest.raises(ValueError, match=r"swap: model must be one with a module that swap knows, got Linear"):
        hotkernels.swap(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"unswap: model must be one with swapped modules, got HoTMixSTEEager without any"
    ):
        hotkernels.unswap(model)
    with pytest.raises(TypeError, match=r"swap: example_inputs must be a tensor, a tuple or a dict, got str"):
        hotkernels.swap(model, example_inputs="x")
    for unfit in (torch.randn(2, 9), x.to("meta"), (x, x, x), {"y": x}):
        with pytest.raises(ValueError, match=r"swap: example_inputs must be what the model takes, got \w+Error: "):
            hotkernels.swap(model, example_inputs=unfit)
    with pytest.raises(TypeError, match=r"register_twin: twin must be a subclass of hotkernels.Twin, got "):
        hotkernels.register_twin(nn.Linear)
    assert not swapped_modules(model)
    hotkernels.swap(model)
    with pytest.raises(ValueError, match=r"got FusedHoTMixSTEEager \(swapped already\)"):
        hotkernels.swap(model)


class LongIsLocal(AttentionEager):
    """Plain up to 400 tokens, more than probes have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[1] <= 400 else super().forward(x.flip(1)) * 0.5


def test_other_outputs_are_an_error_and_change_nothing() -> None:
    model = nn.Sequential(AttentionEager(32, 4), LongIsLocal(32, 4))
    with pytest.raises(ValueError, match=r"swap: model must be one whose swapped outputs are the same, got a differ"):
        hotkernels.swap(model, example_inputs=torch.randn(2, 401, 32))
    assert not swapped_modules(model)
    hotkernels.swap(model, example_inputs=torch.randn(2, 5, 32))


@dataclass
class Answer:
    x: Any
    name: str


@pytest.mark.parametrize(
    "kind",
    [
        lambda y: torch.complex(y, y),
        lambda y: y.sum().item(),
        lambda y: complex(y.sum().item(), 1),
        lambda y: float("nan"),
        lambda y: {"y": [y, None, "y", 3, torch.float32, y.device]},
        lambda y: y.detach().numpy(),
        lambda y: y.sum().numpy()[()],
        lambda y: np.array(["a", "b"]),
        lambda y: Answer(y.sum().item(), "y"),
        lambda y: {1, 2, y.shape},
    ],
)
def test_outputs_of_many_kinds(kind: Callable[[Tensor], Any]) -> None:
    class Model(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.attn, self.scale = AttentionEager(64, 4), scale

        def forward(self, x: Tensor) -> Any:
            fused = isinstance(self.attn, hotkernels.Twin)
            return kind(self.attn(x) * (self.scale if fused else 1.0))

    x = torch.randn(4, 200, 64)
    hotkernels.swap(Model(1 + 1e-6), example_inputs=x)
    one, other = kind(x), kind(2 * x)
    if str(one) != str(other):
        with pytest.raises(ValueError, match=r"swap: model must be .+ the same, got a difference beyond rounding"):
            hotkernels.swap(Model(1.01), example_inputs=x)


def test_outputs_that_cannot_be_compared() -> None:
    model = nn.ModuleList([AttentionEager(32, 4)])
    model.forward = lambda x: {"y": iter([model[0](x)])}
    with pytest.raises(ValueError, match=r"swap: model must be .+ the same, got a list_iterator, which cannot be comp"):
        hotkernels.swap(model, example_inputs=torch.randn(2, 5, 32))
    assert not swapped_modules(model)


@pytest.mark.parametrize("name", sorted(DROPS.keys() - {"PVT", "TCFormer"}))
@pytest.mark.parametrize("empty", ["batch", "tokens"])
def test_empty_inputs(name: str, empty: str) -> None:
    """The published forward's answer, which is empty or an error (an ambiguous shape)."""
    make, args = DROPS[name]
    module = make()
    args = tuple(a[:0] if empty == "batch" else a[:, :0] for a in args if isinstance(a, Tensor))
    try:
        expected = module(*args)
    except RuntimeError:
        expected = None
    hotkernels.swap(module)
    if expected is None:
        with pytest.raises(RuntimeError):
            module(*args)
    else:
        torch.testing.assert_close(module(*args), expected)


@torch.no_grad()
def test_tied_tokens_are_no_difference() -> None:
    """With two neighbours, as published, rounding decides between tied frames: outputs differ, nothing is wrong."""
    differences = []
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = hot_mixste(frames=243, token_num=81).eval(), torch.randn(2, 243, 5, 2).cumsum(1) * 0.01
        plain, _ = answer(model, x)
        hotkernels.swap(model, example_inputs=x)
        differences.append((answer(model, x)[0] - plain).abs().max().item())
    assert max(differences) > 1e-3


# Functions of a file that have a published name and are not the published function.


def file_with(source: str) -> Any:
    """A module class `M` whose file is `source`, after the imports of the published one."""
    names: dict[str, Any] = {**vars(published), "__name__": "published"}
    exec(source, names)
    return names["M"]


MODULE = """
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = AttentionEager(8, 2)
    def forward(self, x):
        return {call}
"""


@pytest.mark.parametrize(
    ("define", "call", "reason"),
    [
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x, cluster_num, k, token_mask)[::-1]",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x + 0 * torch.rand(x.shape), cluster_num, k, token_mask)",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x, cluster_num, min(k, cluster_num), token_mask)",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x, cluster_num, min(k, 5), token_mask)",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(token_dict, cluster_num, k=5, token_mask=None):\n"
            "    return theirs(token_dict['x'], cluster_num, min(k, cluster_num), token_mask)[1], cluster_num",
            "cluster_dpc_knn({'x': x}, 3)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "def cluster_dpc_knn(x, cluster_num, coords): return x",
            "cluster_dpc_knn(x, 3, None)",
            "forward: cluster_dpc_knn: its arguments (x, cluster_num, coords) are of no published form",
        ),
        (
            "",
            "self.cluster_dpc_knn(x) if x is None else cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: cluster_dpc_knn is also the name of an attribute",
        ),
    ],
)
def test_functions_left_alone(define: str, call: str, reason: str) -> None:
    model = file_with(define + MODULE.format(call=call))()
    report = hotkernels.swap(model)
    assert report.left == [("", reason)]
    assert report.functions == []
    assert type(model).__name__ == "M"


@pytest.mark.parametrize(
    ("define", "call", "ours"),
    [
        ("", "(lambda y: cluster_dpc_knn(y, 3, 4))(x)", "hot.cluster_dpc_knn"),
        ("def choose(x): return cluster_dpc_knn(x, 3, 4)", "choose(x)", "hot.cluster_dpc_knn"),
        ("chosen = cluster_dpc_knn", "chosen(x, 3, 4)", "hot.cluster_dpc_knn"),
        ("", "[cluster_dpc_knn_center(y, 3, k=4, center=4) for y in (x,)]", "hot.cluster_dpc_knn_center"),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k=5, token_mask=None):\n"
            "    return theirs(x.float(), cluster_num, k, token_mask)[1], cluster_num",
            "cluster_dpc_knn(x, 3)",
            "prunevid.cluster_dpc_knn",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(token_dict, cluster_num, k=5, token_mask=None):\n"
            "    return theirs(token_dict['x'].float(), cluster_num, k, token_mask)[1], cluster_num",
            "cluster_dpc_knn({'x': x}, 6)",
            "chat_univi.cluster_dpc_knn",
        ),
    ],
)
def test_functions_found(define: str, call: str, ours: str) -> None:
    model, x = file_with(define + MODULE.format(call=call))(), torch.randn(2, 9, 8)
    torch.manual_seed(0)
    expected = model(x)
    report = hotkernels.swap(model, example_inputs=x)
    assert [what.rpartition("hotkernels.compat.")[2] for _, what in report.functions] == [ours]
    torch.manual_seed(0)
    assert str(model(x)) == str(expected)


UTILS = """
import math
def helper(x): return cluster_dpc_knn(x, 3, 4)
"""


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file `pack.utils` with clustering functions, and the package that holds it."""
    package: Any = ModuleType("pack")
    package.utils = ModuleType("pack.utils")
    vars(package.utils).update({**vars(published), "__name__": "pack.utils"})
    exec(UTILS, vars(package.utils))
    monkeypatch.setitem(sys.modules, "pack", package)
    monkeypatch.setitem(sys.modules, "pack.utils", package.utils)
    return package.utils


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("utils.cluster_dpc_knn(x, 3, 4)", "utils.cluster_dpc_knn"),
        ("pack.utils.cluster_dpc_knn(x, 3, 4), pack.utils.math.inf", "pack.utils.cluster_dpc_knn"),
        ("utils.cluster_dpc_knn_center(x, 3, 4, 4), utils.math.inf", "utils.cluster_dpc_knn_center"),
        ("utils.helper(x)", "utils.helper: cluster_dpc_knn"),
    ],
)
def test_functions_of_an_imported_module(utils: Any, call: str, found: str) -> None:
    """Only for the swapped model; what else changes in that file is seen by it."""
    cls = file_with("import pack\nfrom pack import utils\n" + MODULE.format(call=call))
    model, other, x = cls(), cls(), torch.randn(2, 9, 8)
    torch.manual_seed(0)
    expected = str(model(x))
    theirs = utils.cluster_dpc_knn, utils.helper
    report = hotkernels.swap(model, example_inputs=x)
    assert [line.replace("forward, ", "").replace("forward: ", "") for _, line in report.functions] == [
        f"{found} is hotkernels.compat.hot.{found.rpartition('.')[2].rpartition(' ')[2]}"
    ]
    assert (utils.cluster_dpc_knn, utils.helper) == theirs
    for each in (model, other, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        assert str(each(x)) == expected
    utils.cluster_dpc_knn = utils.cluster_dpc_knn_center = None
    model(x)
    with pytest.raises(TypeError):
        other(x)
    if "math" in call:
        utils.math = None
        with pytest.raises(AttributeError):
            model(x)


@pytest.mark.parametrize(
    ("define", "call", "reason"),
    [
        ("", "(self.cluster_dpc_knn(x, 3, 4), 1)", "forward: cluster_dpc_knn: it is an attribute of an object"),
        (
            "def f(): return 1",
            "vars(utils)['cluster_dpc_knn'](x, 3, 4), utils.cluster_dpc_knn(x, 3, 4)",
            "used by itself",
        ),
        (
            "",
            "utils.cluster_dpc_knn(x, 3, 4), x.utils",
            "forward: utils.cluster_dpc_knn: utils is also the name of an a",
        ),
        (
            "from functools import partial\nchoose = partial(cluster_dpc_knn, k=4)",
            "choose(x, 3)",
            "forward: choose: it is a partial",
        ),
        (
            "def closed(f):\n    def choose(x): return f(x, 3, 4)\n    return choose\nchoose = closed(cluster_dpc_knn)",
            "choose(x)",
            "forward: f: a closure holds it",
        ),
        (
            "def closed(f):\n    def choose(x): return f(x)\n    return choose\n"
            "choose = closed(lambda x: cluster_dpc_knn(x, 3, 4))",
            "choose(x)",
            "forward: f: a closure holds it",
        ),
    ],
)
def test_functions_out_of_reach(utils: Any, define: str, call: str, reason: str) -> None:
    model = file_with(f"from pack import utils\n{define}\n" + MODULE.format(call=call))()
    report = hotkernels.swap(model)
    assert [path for path, _ in report.left] == [""]
    assert reason in report.left[0][1]
    assert report.functions == []
    assert type(model).__name__ == "M"


class Held(nn.Module):
    """Holds the function as its methods do not name it."""

    on_the_class = staticmethod(cluster_dpc_knn)

    def __init__(self) -> None:
        super().__init__()
        self.attn = AttentionEager(8, 2)
        self.here = functools.partial(cluster_dpc_knn, k=4)

    def forward(self, x: Tensor) -> Any:
        from hotkernels.models.eager import cluster_dpc_knn_center

        return self.here(x, 3), self.on_the_class(x, 3, 4), cluster_dpc_knn_center(x, 3, 4, 4)


def test_functions_that_objects_hold() -> None:
    assert hotkernels.swap(Held()).left == [
        ("", "on_the_class: it is cluster_dpc_knn, held as an attribute"),
        ("", "forward: cluster_dpc_knn_center: it is imported inside the function"),
        ("", "here: it is cluster_dpc_knn, held as an attribute"),
    ]


def test_called_by_a_method_of_the_instance() -> None:
    model = published.MotionAGFormer()
    model.forward = model.forward  # as libraries do that wrap it
    report = hotkernels.swap(model)
    assert report.left == [("", "forward: it was replaced on the instance")]
    assert "" not in swapped_modules(model)


def test_called_by_a_method_that_is_overridden() -> None:
    class Derived(eager.HoTMixSTEEager):
        def forward(self, x: Tensor, index: Tensor | None = None) -> Any:
            return super().forward(x, index)

    report = hotkernels.swap(Derived(channels=32, depth=2))
    assert report.functions == []
    assert report.left == [("", "forward: _chosen: called in a method that a derived class overrides")]


def test_a_method_keeps_its_defaults_and_closure() -> None:
    class Chosen(nn.Linear):
        def forward(self, x: Tensor, number: int = 3, *, scale: float = 2.0) -> Tensor:
            """Scaled."""
            index, _ = cluster_dpc_knn(x, number, 5)
            return super().forward(x.gather(1, index[..., None].expand(-1, -1, 8))) * scale

    model, x = Chosen(8, 8), torch.randn(2, 9, 8)
    expected, _ = answer(model, x)
    report = hotkernels.swap(model, example_inputs=x)
    assert [path for path, _ in report.functions] == [""]
    torch.testing.assert_close(answer(model, x)[0], expected)
    assert model.forward.__doc__ == "Scaled."
