"""hotkernels.swap on published models: the same answers, gradients and random numbers; what happens to them since."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import published_tcformer
import pytest
import torch
from published import VisionAttention, ViT, hot_mixste, hot_motionbert
from published_tcformer import GridAttention, KeyValueAttention, TCAttention, TCFormer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import hotkernels
from hotkernels.baselines import AttentionEager, CrossAttentionEager
from hotkernels.compat import hot
from hotkernels.models import eager
from hotkernels.models.eager import cluster_dpc_knn
from hotkernels.nn.linear import _HAS_ONEDNN
from hotkernels.swap import modules

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
    return first(model(x)), torch.get_rng_state()


def first(out: Any) -> Tensor:
    """The output, or the first of several."""
    return out[0] if isinstance(out, tuple) else out


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
    mlps = {n for n, m in model.named_modules() if isinstance(m, eager.Mlp) and _HAS_ONEDNN}
    report = hotkernels.swap(model, example_inputs=x)
    assert swapped_modules(model) >= REPORTS[name]
    assert {path for path, _ in report.replaced if not path.startswith("ctm")} == attentions | crossed | mlps
    assert {path for path, _ in report.replaced + report.functions} == swapped_modules(model)
    assert report.left == []
    assert str(report).startswith("replaced\n")


def test_a_report_does_not_name_two_modules_alike() -> None:
    """A number stays where modules that differ in it fare differently."""
    blocks = [{"attn": VisionAttention(32, 4, qk_norm=normed), "other": AttentionEager(32)} for normed in (False, True)]
    assert str(hotkernels.swap(nn.ModuleList(map(nn.ModuleDict, blocks)))).splitlines() == [
        "replaced",
        "  0.attn       attention",
        "  *.other (2)  attention",
        "left",
        "  1.attn  it has q_norm, a LayerNorm",
    ]


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
    "ToMe": (lambda: published.ToMeAttention(32, 4), (torch.randn(3, 5, 32), 1 + torch.rand(3, 5, 1))),
    "VideoMAE": (lambda: published.QvBiasAttention(32, 4), (torch.randn(3, 5, 32),)),
    "MotionBERT": (lambda: eager.MotionBERTAttention(32, 4, "temporal"), (torch.randn(6, 5, 32), 3)),
    "MotionAGFormer": (lambda: published.FramesAttention(32, 32, 4, "temporal"), (torch.randn(2, 3, 5, 32),)),
    "HoT": (lambda: CrossAttentionEager(32, 4), (torch.randn(1, 9, 32).expand(3, -1, -1), *torch.randn(2, 3, 5, 32))),
    "keys and values": (lambda: KeyValueAttention(32, 4), (torch.randn(3, 5, 32), torch.randn(3, 7, 32))),
    "PVT": (lambda: GridAttention(32, 4, sr_ratio=2), (torch.randn(3, 24, 32), 4, 6)),
    "TCFormer": (lambda: TCAttention(32, 4, sr_ratio=2), (tokens(12), tokens(20, score=True))),
}


@pytest.mark.parametrize("name", DROPS)
def test_dropout_on_the_probabilities(name: str) -> None:
    """In training it draws what the original draws; in evaluation the forward is fused."""
    make, args = DROPS[name]
    module = make()
    module.attn_drop.p = 0.5
    if name != "ViT":  # whose operator has its own scale
        module.scale = 0.3
    for training in (True, False):
        plain, ours = copy.deepcopy(module).train(training), copy.deepcopy(module).train(training)
        report = hotkernels.swap(ours)
        assert report.replaced[0][1].endswith(", in evaluation; training has attn_drop = 0.5")
        results = []
        for each in (plain, ours):
            torch.manual_seed(3)
            out = each(*args)
            first(out).square().sum().backward()
            results.append([out, torch.get_rng_state(), *(p.grad for p in each.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not torch.equal(first(plain(*args)), first(module.train()(*args)))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(DROPS.keys() - {"MotionBERT"}))  # which is known by the name of an argument
def test_arguments_by_the_names_that_the_original_has_for_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, args = DROPS[name]
    original = type(make())
    names = [f"its_{i}" for i in range(len(args))]
    renamed: dict[str, Any] = {**vars(published_tcformer), "original": original}
    declared = ", ".join(names) + "=None" * (name == "ToMe")
    more = ", mask=None" if name in ("ViT", "MixSTE", "VideoMAE", "MotionAGFormer", "HoT") else ""
    exec(f"def forward(self, {declared}{more}): return original.forward(self, {', '.join(names)})", renamed)
    module = make()
    module.__class__ = type("Renamed", (original,), {"forward": renamed["forward"]})
    expected = module(*args)
    report = hotkernels.swap(module)
    assert len(report.replaced) == 1
    monkeypatch.setattr(original, "forward", None)  # fused, and not called
    torch.testing.assert_close(module(*args[:1], **dict(zip(names[1:], args[1:], strict=True))), expected)
    torch.testing.assert_close(module(**dict(zip(names, args, strict=True))), expected)


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
    out = first(module(*args))
    out.sum().backward()
    torch.manual_seed(1)
    expected = first(plain(*args))
    expected.sum().backward()
    assert torch.equal(out, expected)
    assert len(seen) == (2 if "hook" in change and name != "ViT" else 0)  # which gives its probability to the operator
    assert seen[:1] == seen[1:]


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
        return self.proj(x)


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
        attend = modules.self_attention
        patch.setattr(modules, "self_attention", lambda *args: calls.append(1) or attend(*args))
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


def test_swap_leaves_no_trace() -> None:
    """Random state, train and eval flags, buffers, gradients. Both runs are in evaluation."""
    model, x = made("TPC-MHFormer")
    model.SHR_blocks.eval()
    flags = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    state, given, ran = torch.get_rng_state(), x.clone(), []
    model.SHR_blocks[0].register_forward_hook(lambda module, args, out: ran.append((module.training, model.training)))
    hotkernels.swap(model, example_inputs=(x,))
    assert ran == [(False, False)] * 2
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


class OwnNames(AttentionEager):
    """Has attributes and methods by the names that a Twin has."""

    kind = "causal"

    def describe(self) -> str:
        return f"{self.kind} attention"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None or self.describe() != "causal attention":
            return super().forward(x)
        return super().forward(x * mask)


def test_a_class_with_the_names_of_a_twin() -> None:
    model, x, mask = OwnNames(32, 4), torch.randn(2, 5, 32), torch.rand(5, 1)
    expected, fused = model(x, mask), model(x)
    hotkernels.swap(model)
    assert torch.equal(model(x, mask), expected)
    torch.testing.assert_close(model(x), fused)
    assert (model.kind, model.describe()) == ("causal", "causal attention")


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
    with pytest.raises(ValueError, match=r"must be one that is not swapped yet, got HoTMixSTEEager, which is \(unswap"):
        hotkernels.swap(model)
    with pytest.raises(ValueError, match=r"that swap knows, got Linear$"), hotkernels.swapped(nn.Linear(2, 2)):
        pass


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
