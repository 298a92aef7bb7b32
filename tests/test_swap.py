"""hotkernels.swap on published models: the same answers, gradients and random numbers; reports; the way back."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from published import VisionAttention, ViT, hot_mixste
from published_tcformer import GridAttention
from swapping import answer, each_model, gradients, made, swapped_modules
from torch import Tensor, nn

import hotkernels
from hotkernels.baselines import AttentionEager, BiLevelRoutingAttentionEager, CrossAttentionEager
from hotkernels.compat import hot
from hotkernels.models import eager
from hotkernels.models.eager import cluster_dpc_knn
from hotkernels.nn.linear import _HAS_ONEDNN


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
    "BiFormer": {"stages.0.attn", "stages.1.attn"},
}


@each_model
def test_report(name: str) -> None:
    model, x = made(name)
    kinds = (AttentionEager, VisionAttention, GridAttention, BiLevelRoutingAttentionEager)
    attentions = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    crossed = {n for n, m in model.named_modules() if isinstance(m, CrossAttentionEager)}
    kinds = (eager.Mlp, *((nn.Sequential,) if name == "BiFormer" else ()))
    mlps = {n for n, m in model.named_modules() if isinstance(m, kinds) and _HAS_ONEDNN}
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
        "  0.attn       attention, where attn_mask is None",
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
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


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


def test_shared_submodules_are_swapped_once() -> None:
    attn = AttentionEager(32)
    model = nn.ModuleDict({"first": attn, "second": attn})
    assert hotkernels.swap(model).replaced == [("first, second", "attention")]
    hotkernels.unswap(model)
    assert type(attn) is AttentionEager


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
