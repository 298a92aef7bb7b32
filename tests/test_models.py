"""hotkernels.models against the published models in eager PyTorch: answers, gradients, options, bad input."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hotkernels import gather_tokens
from hotkernels.models import HoTMixSTE, HoTMotionBERT, layers, strategies
from hotkernels.models.eager import HoTMixSTEEager, HoTMotionBERTEager
from hotkernels.models.layers import Mlp

SMALL: dict[str, Any] = {"frames": 27, "token_num": 9, "channels": 64, "depth": 4, "layer_index": 2}
PAIRS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], int]] = {
    "hot_mixste": (HoTMixSTEEager, HoTMixSTE, 2),
    "tpc_mixste": (
        functools.partial(HoTMixSTEEager, center=True, recover=None),
        functools.partial(HoTMixSTE, center=True, recover=None),
        2,
    ),
    "hot_motionbert": (
        functools.partial(HoTMotionBERTEager, drop_path=0.1),
        functools.partial(HoTMotionBERT, drop_path=0.1),
        3,
    ),
}
each_model = pytest.mark.parametrize("name", PAIRS)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch, small_layers_as_large_ones: None) -> None:
    monkeypatch.setattr("hotkernels.models.layers._TILE", 1024 // torch.get_num_threads())


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """The published model and ours with the same parameters, none of them zero, and an input."""
    make_eager, make_ours, in_channels = PAIRS[name]
    eager = make_eager(**SMALL)
    ours = make_ours(**SMALL, select="cluster_random", **options)
    with torch.no_grad():
        for p in eager.parameters():
            p.normal_(0, 0.1)
    ours.load_state_dict(eager.state_dict())
    eager.load_state_dict(ours.state_dict())
    return eager, ours, torch.randn(2, 27, 17, in_channels)


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Output, chosen frames if told, and all gradients, with the same random numbers on every call."""
    torch.manual_seed(3)
    out = model(x)
    out, index = out if isinstance(out, tuple) else (out, None)
    grads = torch.autograd.grad(out, list(model.parameters()), torch.linspace(-1, 1, out.numel()).view_as(out).to(out))
    return out, index, {n: g for (n, _), g in zip(model.named_parameters(), grads, strict=True)}


@each_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_same_answers_and_gradients_in_float64(name: str, training: bool) -> None:
    """Training draws the same random numbers, for the clustering and for stochastic depth."""
    eager, ours, x = pair(name)
    (a, a_index, a_grads), (b, b_index, b_grads) = (run(m.double().train(training), x.double()) for m in (eager, ours))
    if a_index is not None:
        assert torch.equal(a_index, b_index)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert a_grads.keys() == b_grads.keys()
    for key, grad in a_grads.items():
        torch.testing.assert_close(grad, b_grads[key], rtol=1e-10, atol=1e-11 * float(grad.abs().max() + 1), msg=key)
    torch.manual_seed(3)
    with torch.no_grad():  # in tiles, unless stochastic depth has to be drawn as published
        out = ours(x.double())
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, b, rtol=1e-12, atol=1e-12)


@each_model
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_float32_error_is_that_of_eager(name: str, grad: bool) -> None:
    eager, ours, x = pair(name)
    assert isinstance(ours, (HoTMixSTE, HoTMotionBERT))
    index = torch.stack([torch.randperm(27)[:9].sort().values for _ in range(2)])
    for model in (eager, ours):  # the same frames for all, whatever rounding does to the clustering
        model.eval()
    eager_at = functools.partial(eager, index=index) if "mixste" in name else None
    exact = copy.deepcopy(ours).double()(x.double(), index)
    with torch.set_grad_enabled(grad):
        low = eager_at(x) if eager_at else copy.deepcopy(ours).bfloat16()(x.bfloat16(), index)
        own = ours(x, index)
    low, own, exact = (t[0] if isinstance(t, tuple) else t for t in (low, own, exact))
    error, allowed = (own - exact).abs().max(), 4 * (low - exact).abs().max()
    assert error <= allowed
    assert error <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(("make", "millions"), [(HoTMixSTE, 35.00), (HoTMotionBERT, 16.35)])
def test_published_number_of_parameters(make: Callable[[], nn.Module], millions: float) -> None:
    assert sum(p.numel() for p in make().parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("make", "gflops", "in_channels"), [(HoTMixSTE, 167.51, 2), (HoTMotionBERT, 63.21, 3)])
def test_published_work(make: Callable[..., nn.Module], gflops: float, in_channels: int) -> None:
    """A multiply and an add per weight of each nn.Linear and row, per sequence of 243 frames, as the papers count.

    Rows as in the published code, which projects x_token once per joint of every sequence; ours does it once.
    """
    model = make()
    J, F, M = 17, 243, 81
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        block = re.match(r"(?:STEblocks|TTEblocks|blocks_st|blocks_ts|ts_attn)\.(\d+)", name)
        kept = name.endswith(("linear_k", "linear_v")) or (block and int(block[1]) >= model.layer_index[0])
        count += module.weight.numel() * J * (M if kept else F)
    assert 2 * count / 1e9 == pytest.approx(gflops, abs=0.02)


def test_nothing_is_rearranged() -> None:
    """From the first block to the last, no copy of a whole [B, F, J, C]."""
    model = HoTMixSTE(**SMALL).eval()
    x = torch.randn(2, 27, 17, 2)
    with torch.profiler.profile(record_shapes=True) as profile:
        model(x).sum()
    whole = {2 * frames * 17 * 64 for frames in (27, 9)}

    def of_a_linear_layer(event: Any) -> bool:  # addmm copies its bias to the output
        return event is not None and (event.name == "aten::addmm" or of_a_linear_layer(event.cpu_parent))

    copies = [
        (event.name, event.input_shapes[0])
        for event in profile.events()
        if event.name in ("aten::copy_", "aten::clone", "aten::contiguous")
        and int(np.prod(event.input_shapes[0])) in whole
        and not of_a_linear_layer(event)
    ]
    assert copies == []


# Options.


@pytest.mark.parametrize("make", [HoTMixSTE, HoTMotionBERT])
@pytest.mark.parametrize("select", strategies.SELECT)
@pytest.mark.parametrize("recover", ["attention", "interpolation", None])
def test_several_steps(make: Callable[..., nn.Module], select: str, recover: str | None) -> None:
    """Two prunings, the centre frame kept: shapes, order, and a gradient in every parameter."""
    options = SMALL | {"token_num": (15, 6), "layer_index": (1, 3)}
    model = make(**options, center=True, select=select, recover=recover)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
    out = model(torch.randn(2, 27, 17, 2 if make is HoTMixSTE else 3))
    if recover is None:
        out, index = out
        assert index.shape == (2, 6)
        assert (index.diff(dim=1) > 0).all()
        assert (index == 13).any(1).all()
        assert out.shape == (2, 6, 17, 3)
    else:
        assert out.shape == (2, 27, 17, 3)
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def scene(poses: Tensor, keep: Tensor | None = None) -> strategies.Scene:
    return strategies.Scene(poses, keep, nn.Identity(), HoTMixSTE(**SMALL).TTEblocks[0].attn)


@pytest.mark.parametrize("select", ["cluster", "cluster_random", "uniform", "attention", "motion"])
def test_what_must_stay_stays_beside_nan(select: str) -> None:
    x, poses, keep = torch.randn(2, 9, 17, 64), torch.randn(2, 9, 17, 2), torch.tensor([[1], [5]])
    x[0, 3:7], poses[0, 3:7], x[1], poses[1] = torch.nan, torch.nan, torch.nan, torch.nan
    index = strategies.SELECT[select](x, 3, scene(poses, keep))
    assert (index == keep).any(1).all()
    assert (index.diff() > 0).all()


def test_motion_keeps_the_frames_that_moved() -> None:
    poses = torch.zeros(1, 8, 17, 2)
    poses[0, 3:] += 1.0
    poses[0, 6:] -= 0.5
    assert strategies.motion(torch.zeros(1, 8, 17, 64), 2, scene(poses)).tolist() == [[3, 6]]
    kept = strategies.motion(torch.zeros(1, 8, 17, 64), 2, scene(poses, torch.tensor([[5]])))
    assert kept.tolist() == [[3, 5]]


def test_uniform() -> None:
    x = torch.zeros(2, 9, 17, 64)
    assert strategies.uniform(x, 3, scene(x)).tolist() == [[0, 4, 8]] * 2
    assert strategies.uniform(x, 1, scene(x)).tolist() == [[4]] * 2
    assert strategies.uniform(x[:, :8], 1, scene(x[:, :8])).tolist() == [[3]] * 2  # of two in the middle, the first
    keep = torch.tensor([[1], [5]])
    assert strategies.uniform(x, 3, scene(x, keep)).tolist() == [[1, 4, 8], [0, 5, 8]]


def test_attention_is_the_attention_received() -> None:
    x = torch.randn(2, 27, 17, 64)
    attention, norm = scene(x).attention, nn.LayerNorm(64)
    nn.init.normal_(norm.weight)
    qkv = attention.qkv(norm(x)).reshape(2, 27, 17, 3, 8, 8)
    logits = torch.einsum("bfjhd,bgjhd->bjhfg", qkv[..., 0, :, :], qkv[..., 1, :, :]) * attention.scale
    expected = logits.softmax(-1).mean((1, 2, 3)).topk(9).indices.sort(1).values
    at = strategies.Scene(x, None, norm, attention)
    assert torch.equal(strategies.attention(x, 9, at), expected)


@pytest.mark.parametrize("kept", [1, 7])
def test_interpolation_of_each_sequence(kept: int) -> None:
    index = torch.stack([torch.randperm(30)[:kept].sort().values for _ in range(3)])
    poses = torch.randn(3, kept, 17, 3, dtype=torch.float64, requires_grad=True)
    out = strategies.interpolate(poses, index, 30)
    for b in range(3):
        column = poses[b].detach().flatten(1).T.numpy()
        expected = np.stack([np.interp(np.arange(30), index[b].numpy(), y) for y in column], 1)
        np.testing.assert_allclose(out[b].detach().flatten(1).numpy(), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda p: strategies.interpolate(p, index, 30)[:, ::7, :2], poses, fast_mode=True)


@pytest.mark.parametrize("make", [HoTMixSTE, HoTMotionBERT])
def test_a_choice_of_your_own(make: Callable[..., Any]) -> None:
    """It is told of the frames that are left: their poses, the place of the centre, the attention that comes next."""
    scenes: list[strategies.Scene] = []

    def last(x: Tensor, token_num: int, at: strategies.Scene) -> Tensor:
        scenes.append(at)
        return torch.arange(x.shape[1] - token_num, x.shape[1]).expand(len(x), -1)

    options = SMALL | {"frames": 28, "token_num": (15, 6), "layer_index": (1, 3)}
    model = make(**options, center=True, select=last, recover=None)
    x = torch.randn(2, 28, 17, model.in_channels)
    _, index = model(x)
    assert index.tolist() == [list(range(22, 28))] * 2
    for at, layer, first, keep in zip(scenes, (1, 3), (0, 13), (13, 0), strict=True):
        block = model.TTEblocks[layer] if make is HoTMixSTE else model.blocks_ts[layer]
        which = "" if make is HoTMixSTE else "_t"
        assert torch.equal(at.poses, x[:, first:, :, :2])
        assert at.keep is not None
        assert (at.keep == keep).all()
        assert (at.norm, at.attention) == (getattr(block, "norm1" + which), getattr(block, "attn" + which))


def test_index_of_an_earlier_pass_is_used() -> None:
    model = HoTMixSTE(**SMALL, recover=None).eval()
    x = torch.randn(2, 27, 17, 2)
    _, index = model(x)
    _, again = model(x.flip(0), index)
    assert torch.equal(index, again)


def test_tiles_change_nothing() -> None:
    """Without a gradient, blocks run in tiles: sizes that divide by nothing."""
    model = HoTMixSTE(frames=121, token_num=70, channels=64, depth=3, layer_index=1).eval()
    x = torch.randn(3, 121, 17, 2)
    with torch.no_grad():
        tiled = model(x)
    torch.testing.assert_close(tiled, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_does_not_learn_the_number_of_tiles() -> None:
    block, x = HoTMixSTE(**SMALL).STEblocks[0].eval(), torch.randn(3, 121, 17, 64)
    torch.testing.assert_close(torch.jit.trace(block, (x,))(x[:1]), block(x[:1]))


@pytest.mark.parametrize("make", [HoTMixSTE, HoTMotionBERT])
def test_compiles_without_graph_breaks(make: Callable[..., nn.Module]) -> None:
    model = make(**SMALL | {"depth": 2, "layer_index": 1}).eval()
    x = torch.randn(2, 27, 17, 2 if make is HoTMixSTE else 3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("select", ["cluster", "cluster_random", "uniform", "motion"])
@torch.no_grad()
def test_exports_for_any_number_of_samples(select: str) -> None:
    model = HoTMixSTE(**SMALL, center=True, select=select).eval()
    dims = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (torch.randn(2, 27, 17, 2),), dynamic_shapes=(dims,)).module()
    x = torch.randn(3, 27, 17, 2)
    results = []
    for each in (exported, model):
        torch.manual_seed(0)
        results.append(each(x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_vmap(grad: bool) -> None:
    """Blocks do not run in tiles there; frames that are given are checked, whichever dim holds the samples."""
    model, x = HoTMixSTE(**SMALL).eval(), torch.randn(3, 2, 27, 17, 2)
    index = torch.stack([torch.randperm(27)[:9].sort().values for _ in range(6)]).view(3, 2, 9).movedim(0, 2)
    with torch.set_grad_enabled(grad):
        for places, given in (((0,), (x,)), ((0, 2), (x, index))):
            expected = [model(*(t.select(p, i) for t, p in zip(given, places, strict=True))) for i in range(3)]
            out = torch.func.vmap(model, places)(*given)
            torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"^HoTMixSTE: index must be ascending in \[0, 27\), got"):
            torch.func.vmap(model, (0, 2))(x, index.flip(1))


class FrameMixer(nn.Module):
    """Looks at other frames than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, -3)


@pytest.mark.parametrize("place", ["mlp", "norm1", "norm2"])
@pytest.mark.parametrize("make", [HoTMixSTE, HoTMotionBERT])
def test_layers_in_place_of_ours_get_whole_inputs_without_autograd(
    make: Callable[..., nn.Module], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotkernels.models.layers._TILE", 40)
    model: Any = make(**SMALL).eval()
    x = torch.randn(2, 27, 17, 2 if make is HoTMixSTE else 3)
    index = torch.arange(0, 27, 3).expand(2, -1)
    for block in model.modules():
        if hasattr(block, place):
            setattr(block, place, FrameMixer())
    expected = model(x, index)
    with torch.no_grad():
        torch.testing.assert_close(model(x, index), expected, rtol=1e-4, atol=1e-5)


def test_hooks_of_layers_fire_once_a_call_without_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotkernels.models.layers._TILE", 40)
    model, x, calls = HoTMixSTE(**SMALL).eval(), torch.randn(2, 27, 17, 2), []
    model.STEblocks[0].attn.qkv.register_forward_hook(lambda layer, args, out: calls.append(out.shape))
    with torch.no_grad():
        model(x)
    assert len(calls) == 1


@each_model
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_autocast(name: str, grad: bool) -> None:
    """As far from float32 as the published model; MotionBERT's takes no index, and is in none of these far off."""
    eager, model, x = pair(name)
    index = torch.stack([torch.randperm(27)[:9].sort().values for _ in range(2)])
    exact = model(x, index)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        out, theirs = model(x, index), eager(x, index=index) if "mixste" in name else None
    exact, out, theirs = (t[0] if isinstance(t, tuple) else t for t in (exact, out, theirs))
    allowed = 0.08 * exact.norm() if theirs is None else 1.5 * (theirs.float() - exact).norm()
    assert (out.float() - exact).norm() < allowed


def test_autocast_training() -> None:
    """The block before pruning runs without gradients and with them: weights that autocast has cast must get theirs."""
    _, model, x = pair("hot_mixste")
    index = torch.stack([torch.randperm(27)[:9].sort().values for _ in range(2)])
    named = {name: p for name, p in model.named_parameters() if name.startswith("TTEblocks.1.")}
    exact = torch.autograd.grad(model(x, index).square().sum(), list(named.values()))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, index)
    grads = torch.autograd.grad(out.float().square().sum(), list(named.values()))
    for name, own, expected in zip(named, grads, exact, strict=True):
        assert (own - expected).norm() <= 0.3 * expected.norm(), name


@pytest.mark.parametrize("make", [HoTMixSTE, HoTMotionBERT])
def test_options_reach_every_layer(make: Callable[..., nn.Module]) -> None:
    model = make(**SMALL, n_joints=5, num_heads=4, mlp_ratio=3.0, in_channels=4, drop=0.2, attn_drop=0.4)
    assert model.select is strategies.cluster
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == (0.4 if name.endswith("attn_drop") else 0.2), name
        assert getattr(module, "num_heads", 4) == 4, name
        assert not name.endswith("fc1") or module.out_features == 192, name
    embedded: list[Tensor] = []
    model.pos_drop.register_forward_hook(lambda module, args, out: embedded.append(out))
    assert model(torch.randn(2, 27, 5, 4)).shape == (2, 27, 5, 3)
    assert len(embedded) == (2 if make is HoTMixSTE else 1)


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_dropout(grad: bool) -> None:
    """On the output of the attention, between the layers of the MLP and after them, with the same random numbers."""
    blocks: Any = HoTMixSTE(**SMALL, drop=0.5, drop_path=0.0).STEblocks
    block, x = blocks[0], torch.randn(2, 27, 17, 64)
    mlp, drop = block.mlp, functools.partial(nn.functional.dropout, p=0.5)
    with torch.set_grad_enabled(grad):
        torch.manual_seed(3)
        out = block(x)
        torch.manual_seed(3)
        expected = x + drop(block.attn.proj(block.attn.attend(block.norm1(x))))
        expected = expected + drop(mlp.fc2(drop(nn.functional.gelu(mlp.fc1(block.norm2(expected))))))
    torch.testing.assert_close(out, expected)


class Halved(nn.Dropout):
    """What a user may put in a Dropout's place."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_what_stands_in_the_place_of_dropout_runs(grad: bool) -> None:
    """A module of the user's, or a hook; before a pruning, too. A hook on the MLP sees its branch alone."""
    blocks: Any = HoTMixSTE(**SMALL).eval().TTEblocks
    block, x, index = blocks[0], torch.randn(2, 27, 17, 64), torch.tensor([[1, 5, 20], [0, 2, 3]])
    attention, mlp = block.attn, block.mlp
    attention.proj_drop = Halved(0.0)
    mlp.drop.register_forward_hook(lambda module, args, out: out / 2)
    with torch.set_grad_enabled(grad):
        expected = x + attention.proj(attention.attend(block.norm1(x), -3)) / 2
        expected = expected + mlp.fc2(nn.functional.gelu(mlp.fc1(block.norm2(expected))) / 2) / 2
        torch.testing.assert_close(block(x), expected)
        out, _ = block(x, lambda whole: index)
        torch.testing.assert_close(out, gather_tokens(expected, index))
        seen: list[Tensor] = []
        mlp.register_forward_hook(lambda module, args, out: seen.append(out))
        torch.testing.assert_close(block(x, lambda whole: index)[0], out)
        attended = x + attention.proj(attention.attend(block.norm1(x), -3)) / 2
        torch.testing.assert_close(seen, [expected - attended])


@pytest.mark.parametrize("change", ["hook", "forward"])
def test_what_mixes_the_streams_is_called_where_it_is_more_than_a_weight(change: str) -> None:
    model, x = HoTMotionBERT(**SMALL, recover=None).eval(), torch.randn(2, 27, 17, 3)
    plain, _ = model(x)
    fuse: Any = model.ts_attn[-1]
    shifted = copy.deepcopy(model)
    shifted.ts_attn[-1].bias.data += torch.tensor([1.0, 0.0])
    if change == "hook":
        fuse.register_forward_hook(lambda _, __, out: out + torch.tensor([1.0, 0.0]))
    else:
        fuse.forward = lambda x: nn.functional.linear(x, fuse.weight, fuse.bias + torch.tensor([1.0, 0.0]))
    expected, _ = shifted(x)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(model(x)[0], expected)


class OwnMlp(Mlp):
    pass


@pytest.mark.parametrize("drops", [None, "attn.proj_drop", "mlp.drop", "mlp"])
def test_frames_that_are_left_out_carry_no_gradient(drops: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before pruning, what follows attention runs for the choice, then with gradients for what is kept.

    With dropout it runs once, as it would drop something else the second time; so does another MLP, whatever it does.
    """
    model = HoTMixSTE(**SMALL)
    blocks: Any = model.TTEblocks
    if drops == "mlp":
        blocks[1].mlp = OwnMlp(64, 128)
    elif drops:
        blocks[1].get_submodule(drops).p = 0.5
    calls: list[tuple[bool, int]] = []
    whole: list[Any] = []
    after = layers.after_attention

    def watched(x: Tensor, attended: Tensor, *, attention: nn.Module, **rest: Any) -> Tensor:
        if attention is blocks[1].attn:
            calls.append((torch.is_grad_enabled(), x.numel()))
        return after(x, attended, attention=attention, **rest)

    monkeypatch.setattr(layers, "after_attention", watched)  # a hook would keep it from running twice
    blocks[1].register_forward_hook(lambda *_: whole.append(None))
    x = torch.randn(2, 27, 17, 2)
    kept, every = 2 * 9 * 17 * 64, 2 * 27 * 17 * 64
    model(x)
    assert calls == ([(True, every)] if drops else [(False, every), (True, kept)])
    with torch.no_grad():
        model(x)
    assert calls[-1] == (False, every)
    assert len(whole) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_num": 28}, "token_num must be in [1, frames = 27], got 28"),
        ({"token_num": (9, 15), "layer_index": (1, 2)}, "token_num must be in [1, tokens before = 9], got 15"),
        ({"token_num": (9, 5)}, "layer_index must be one layer for each of token_num, got (2,) for (9, 5)"),
        ({"token_num": (9, 5), "layer_index": (2, 2)}, "layer_index must be in [3, 3], got 2"),
        ({"token_num": (9, 5), "layer_index": (3, 3)}, "layer_index must be in [1, 2], got 3"),
        ({"layer_index": 0}, "layer_index must be in [1, depth - 1 = 3], got 0"),
        ({"depth": 0}, "depth must be at least 2, got 0"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"mlp_ratio": 0.01}, "mlp_ratio must be at least 1 / channels = 0.01562, got 0.01"),
        ({"drop_path": 1.5}, "drop_path must be in [0, 1), got 1.5"),
        ({"drop": 1.5}, "drop must be in [0, 1), got 1.5"),
        ({"select": 3}, "select must be a function, "),
        ({"layer_index": 4}, "layer_index must be in [1, depth - 1 = 3], got 4"),
        ({"recover": "copy"}, "recover must be 'attention', 'interpolation' or None, got 'copy'"),
        ({"select": "best"}, "select must be a function, "),
        ({"channels": 60}, "channels must be a multiple of num_heads = 8, got 60"),
        ({"channels": 4096}, "num_heads must be at least channels / 256 = 16, got 8"),
        *(
            ({arg: value}, f"{arg} must be an int, got {type(value).__name__}")
            for arg in ("frames", "token_num", "layer_index", "channels", "depth", "n_joints", "num_heads")
            for value in (3.7, True, "9")
        ),
        ({"token_num": (9, 5.0), "layer_index": (1, 2)}, "token_num must be an int, got float"),
        ({"center": 1}, "center must be a bool, got int"),
        ({"attn_drop": None}, "attn_drop must be a float, got NoneType"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^HoTMixSTE: {re.escape(message)}"):
        HoTMixSTE(**SMALL | options)


def test_bad_input() -> None:
    model = HoTMixSTE(**SMALL)
    with pytest.raises(ValueError, match=r"HoTMixSTE: x must be .* = \[any, 27, 17, 2\], got \[2, 26, 17, 2\]"):
        model(torch.zeros(2, 26, 17, 2))
    with pytest.raises(ValueError, match=r"HoTMixSTE: index must be \[B, M\] = \[2, 9\], got \[2, 8\]"):
        model(torch.zeros(2, 27, 17, 2), torch.zeros(2, 8, dtype=torch.int64))
    for wrong, got in (([4, 0, 8], "0 after 4"), ([0, 4, 4], "4 after 4"), ([-1, 4, 8], "-1"), ([0, 4, 27], "27")):
        given = torch.tensor([[0, 1, 2], wrong])
        with pytest.raises(ValueError, match=rf"^HoTMixSTE: index must be ascending in \[0, 27\), got {got}$"):
            HoTMixSTE(**SMALL | {"token_num": 3})(torch.zeros(2, 27, 17, 2), given)
    steps = HoTMixSTE(**SMALL | {"token_num": (9, 5), "layer_index": (1, 2)})
    with pytest.raises(ValueError, match="index must be None where frames are pruned in several steps"):
        steps(torch.zeros(2, 27, 17, 2), torch.zeros(2, 9, dtype=torch.int64))


def test_bad_choices() -> None:
    for chosen, message in (
        (torch.arange(8).expand(2, -1), "[B, M] = [2, 9], got [2, 8]"),
        (torch.arange(9).flip(0).expand(2, -1), "ascending in [0, 27), got 7 after 8"),
    ):
        model = HoTMixSTE(**SMALL, select=lambda x, token_num, scene, chosen=chosen: chosen)
        with pytest.raises(ValueError, match=re.escape(f"HoTMixSTE: what select returns must be {message}")):
            model(torch.zeros(2, 27, 17, 2))


@pytest.mark.parametrize("make", [HoTMixSTE, HoTMotionBERT, HoTMixSTEEager, HoTMotionBERTEager])
def test_models_without_data_and_numpy_options(make: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        model = make(**SMALL | {"frames": np.int64(27), "token_num": np.int64(9)})
    assert all(p.is_meta for p in model.parameters())
