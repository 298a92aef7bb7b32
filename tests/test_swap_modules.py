"""Twins of attention, module by module: dropout, arguments, layers, and what a published forward may also do."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import published
import published_tcformer
import pytest
import torch
from published import LowRank, TimmMlp, ToQkvAttention, VisionAttention
from published_tcformer import GridAttention, KeyValueAttention, TCAttention
from swapping import first
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import hotkernels
from hotkernels.baselines import AttentionEager, BiLevelRoutingAttentionEager, CrossAttentionEager
from hotkernels.models import eager
from hotkernels.swap import classes, twins
from hotkernels.swap.modules import routing_attention


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


DROPS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "ViT": (lambda: VisionAttention(32, 4), (torch.randn(3, 5, 32),)),
    "MixSTE": (lambda: AttentionEager(32, 4), (torch.randn(3, 5, 32),)),
    "ToMe": (lambda: published.ToMeAttention(32, 4), (torch.randn(3, 5, 32), 1 + torch.rand(3, 5, 1))),
    "A-ViT": (lambda: published.HaltingAttention(32, 4), (torch.randn(3, 5, 32), torch.eye(3, 5))),
    "EViT": (lambda: published.EvitAttention(32, 4), (torch.randn(3, 7, 32), 0.8, 4)),
    "TokenReduction": (lambda: published.RankingAttention(32, 4), (torch.randn(3, 9, 32),)),
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


@pytest.mark.parametrize("training", [True, False])
def test_dropout_by_the_mode_of_the_attention(training: bool) -> None:
    """As timm has it, whichever mode the dropout is in."""
    module, x = VisionAttention(32, 4), torch.randn(3, 5, 32)
    module.attn_drop.p = 0.5
    module.train(training).attn_drop.train(not training)
    results = []
    for swaps in (False, True):
        if swaps:
            hotkernels.swap(module)
        torch.manual_seed(3)
        results.append([module(x), torch.get_rng_state()])
    torch.testing.assert_close(*results)


class WithoutLastDrop(AttentionEager):
    """As timm's Hiera has it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        del self.proj_drop

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(((query @ key.mT * self.scale).softmax(-1) @ value).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["PVT", "HoT", "keys and values"])
def test_a_call_with_fewer_arguments_than_the_twin_takes_is_the_originals(name: str) -> None:
    make, args = DROPS[name]
    original = type(make())
    names = [*inspect.signature(original.forward).parameters][1:]
    declared = ", ".join([names[0], *(f"{n}=None" for n in names[1:])])
    scope = {"original": original}
    exec(
        f"def forward(self, {declared}):\n"
        f"    if {names[-1]} is None: return {names[0]} * 2\n"
        f"    return original.forward(self, {', '.join(names)})",
        scope,
    )
    module = make()
    module.__class__ = type("WithDefaults", (original,), {"forward": scope["forward"]})
    assert len(hotkernels.swap(module).replaced) == 1
    assert torch.equal(module(args[0]), args[0] * 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_without_a_dropout_at_the_end(compiled: bool) -> None:
    module, x = WithoutLastDrop(32, 4), torch.randn(3, 5, 32, requires_grad=True)
    expected = [module(x), *torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])]
    assert hotkernels.swap(module).replaced == [("", "attention")]
    call = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
    torch.testing.assert_close(
        [call(x), *torch.autograd.grad(call(x).square().sum(), [x, *module.parameters()])], expected
    )


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(DROPS.keys() - {"MotionBERT"}))  # which is known by the name of an argument
def test_arguments_by_the_names_that_the_original_has_for_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, args = DROPS[name]
    original = type(make())
    names = [f"its_{i}" for i in range(len(args))]
    renamed: dict[str, Any] = {**vars(published_tcformer), "original": original}
    defaults = [p.default for p in inspect.signature(original.forward).parameters.values()][1:]
    declared = ", ".join(
        its if default is inspect.Parameter.empty else f"{its}={default}"
        for its, default in zip(names, defaults, strict=False)
    )
    more = ", mask=None" if name in ("ViT", "MixSTE", "ToMe", "VideoMAE", "MotionAGFormer", "HoT") else ""
    exec(f"def forward(self, {declared}{more}): return original.forward(self, {', '.join(names)})", renamed)
    module = make()
    module.__class__ = type("Renamed", (original,), {"forward": renamed["forward"]})
    expected = module(*args)
    report = hotkernels.swap(module)
    assert len(report.replaced) == 1
    monkeypatch.setattr(original, "forward", None)  # fused, and not called
    torch.testing.assert_close(module(*args[:1], **dict(zip(names[1:], args[1:], strict=True))), expected)
    torch.testing.assert_close(module(**dict(zip(names, args, strict=True))), expected)
    if more:
        torch.testing.assert_close(module(*args, mask=None), expected)
        torch.testing.assert_close(module(*args, None), expected)
    if name == "EViT":  # whose last may come without the one before
        torch.testing.assert_close(module(args[0], **{names[2]: args[2]}), expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", DROPS)
def test_compiles_with_as_few_arguments_as_it_takes(name: str, dynamic: bool) -> None:
    make, args = DROPS[name]
    module = make()
    hotkernels.swap(module)
    needed = [p for p in inspect.signature(type(module).forward).parameters.values() if p.default is p.empty]
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=dynamic)
    for given in (args, args[: len(needed) - 1]):
        torch.testing.assert_close(compiled(*given), module(*given))


@torch.no_grad()
@pytest.mark.parametrize("name", DROPS)
def test_tokens_of_other_dims_go_to_the_original(name: str) -> None:
    """Which may do with them what no probe has seen: flatten a grid, take joints for samples, fail."""
    make, args = DROPS[name]
    original = type(make())
    parameters = [*inspect.signature(original.forward).parameters.values()][1:]
    names = [p.name for p in parameters]
    declared = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    tokens_of: Callable[[Any], Tensor] = (lambda a: a["x"]) if name == "TCFormer" else (lambda a: a)
    several = {"HoT": 3, "keys and values": 2, "TCFormer": 2}.get(name, 1)
    dims = [tokens_of(arg).dim() for arg in args[:several]]
    scope: dict[str, Any] = {**vars(published_tcformer), "original": original, "tokens_of": tokens_of, "dims": dims}
    exec(
        f"def forward(self, {', '.join(declared)}):\n"
        f"    first = [tokens_of(x) for x in ({', '.join(names[:several])},)]\n"
        "    if [x.dim() for x in first] != dims: return first[0] * 2\n"
        f"    return original.forward(self, {', '.join(names)})",
        scope,
    )
    module = make()
    module.__class__ = type("Other", (original,), {"forward": scope["forward"]})
    assert len(hotkernels.swap(module).replaced) == 1
    args = (*args, *[None] * (len(names) - len(args)))
    for i in range(several):
        for change in (lambda x: x[:, None], lambda x: x[0]):
            changed = {**args[i], "x": change(args[i]["x"])} if name == "TCFormer" else change(args[i])
            others = (*args[:i], changed, *args[i + 1 :])
            assert torch.equal(module(*others), 2 * tokens_of(others[0]))


@torch.no_grad()
def test_queries_and_keys_of_different_batches_go_to_the_original() -> None:
    """Which lets all queries attend to one sample's keys, and refuses the reverse."""
    module, x, kept = CrossAttentionEager(32, 4), torch.randn(3, 5, 32), torch.randn(3, 7, 32)
    calls = [(x, kept[:1], kept[:1]), (x, kept, kept[:1])]
    expected = [module(*args) for args in calls]
    hotkernels.swap(module)
    for args, out in zip(calls, expected, strict=True):
        torch.testing.assert_close(module(*args), out)
    with pytest.raises(RuntimeError, match="shape"):
        module(x[:1], kept, kept)


@torch.no_grad()
@pytest.mark.parametrize("name", ["MixSTE", "ViT", "VideoMAE", "MLP"])
def test_fx_traces_the_original(name: str, small_layers_as_large_ones: None) -> None:
    model, x = nn.Sequential(DROPS[name][0]() if name in DROPS else TimmMlp(nn.GELU())).eval(), torch.randn(2, 5, 32)
    torch.fx.symbolic_trace(model)
    expected = model(x)
    hotkernels.swap(model)
    for traced in (model, model[0]):
        assert torch.equal(torch.fx.symbolic_trace(traced)(x), expected)


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


@pytest.mark.parametrize("name", sorted(DROPS.keys() - {"PVT", "TCFormer"}))
@pytest.mark.parametrize("empty", ["batch", "tokens"])
def test_empty_inputs(name: str, empty: str) -> None:
    """The published forward's answer, which is empty or an error (an ambiguous shape)."""
    make, args = DROPS[name]
    module = make()
    args = tuple(a[:0] if empty == "batch" else a[:, :0] for a in args if isinstance(a, Tensor))
    try:
        expected = module(*args)
    except (RuntimeError, IndexError):
        expected = None
    hotkernels.swap(module)
    if expected is None:
        with pytest.raises((RuntimeError, IndexError)):
            module(*args)
    else:
        torch.testing.assert_close(module(*args), expected)


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


@torch.no_grad()
@pytest.mark.parametrize("absent", [("q_bias", "v_bias"), ("q_bias",), ()])
def test_biases_beside_qkv(absent: tuple[str, ...]) -> None:
    """They are heeded as they are when the module is called; qkv has a bias of its own, which is not used."""
    module, x = published.QvBiasAttention(32, 4), torch.randn(3, 5, 32)
    module.qkv.bias = nn.Parameter(torch.randn(96))
    assert hotkernels.swap(module).replaced
    for name in absent:
        setattr(module, name, None)
    module.v_bias = nn.Parameter(torch.randn(32)) if module.v_bias is not None else None
    torch.testing.assert_close(module(x), published.QvBiasAttention.forward(module, x))


class PaddedPolicyAttention(published.PolicyAttention):
    """LV-ViT's, as DynamicViT and SPViT have it."""

    def forward(self, x: Tensor, policy: Tensor | None, padding_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, policy) * (1 if padding_mask is None else padding_mask)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_attention_without_a_policy(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, or with what else it may take, the module's own forward runs."""
    module = (PaddedPolicyAttention if padded else published.PolicyAttention)(32, 4)
    x, policy = torch.randn(3, 5, 32), torch.rand(3, 5, 1).round()
    calls: list[dict[str, Any]] = [{"policy": policy}]
    if padded:
        calls += [{"policy": None, "padding_mask": policy}, {"policy": policy, "padding_mask": policy}]
    plain, others = module(x, None), [module(x, **call) for call in calls]
    where = "policy is None and padding_mask is None" if padded else "policy is None"
    assert hotkernels.swap(module).replaced == [("", f"attention, where {where}")]
    for call, expected in zip(calls, others, strict=True):
        assert torch.equal(module(x, **call), expected)
        assert torch.equal(module(x, *call.values()), expected)
    monkeypatch.setattr(Tensor, "softmax", None)
    torch.testing.assert_close(module(x, policy=None), plain)
    torch.testing.assert_close(module(x, None, **({"padding_mask": None} if padded else {})), plain)


@torch.no_grad()
def test_a_mask_of_other_dims_goes_to_the_original() -> None:
    module, x, mask = published.HaltingAttention(32, 4), torch.randn(3, 5, 32), torch.eye(3, 5)
    expected = module(x, mask)
    hotkernels.swap(module)
    assert torch.equal(module(x, mask[..., None]), expected)
    assert not torch.equal(module(x), expected)


@torch.no_grad()
def test_attention_that_returns_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, policy = published.PairedPolicyAttention(32, 4), torch.randn(3, 5, 32), torch.rand(3, 5, 1).round()
    plain, (asked, weights), (with_policy, _) = module(x, None), module(x, None, True), module(x, policy)
    assert hotkernels.swap(module).replaced == [("", "attention, where policy is None and return_attn is False")]
    assert torch.equal(module(x, None, return_attn=True)[1], weights)
    assert torch.equal(module(x, None, True)[0], asked)
    assert torch.equal(module(x, policy)[0], with_policy)
    monkeypatch.setattr(Tensor, "softmax", None)
    out, nothing = module(x, None)
    torch.testing.assert_close(out, plain[0])
    assert nothing is None


@pytest.mark.parametrize(
    "args",
    [(), (0.4,), (None, 3), (1.0, 2), (0.9,), (1.0,), (1.5,), (None, 6), (0.3, None)],
    ids=lambda args: "-".join(map(str, args)) or "none",
)
@pytest.mark.parametrize("keep_rate", [0.7, 1.0])
def test_attention_that_selects(keep_rate: float, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = published.EvitAttention(32, 4, keep_rate), torch.randn(3, 7, 32, requires_grad=True)
    plain = copy.deepcopy(module)
    assert hotkernels.swap(module).replaced == [("", "attention that selects tokens")]
    results = []
    for each in (plain, module):
        out = each(x, *args)
        scores = [t * torch.linspace(1, 2, t.numel()).view_as(t) for t in (out[0], out[3]) if t is not None]
        results.append((out, *torch.autograd.grad(sum(t.sum() for t in scores), [x, *each.parameters()])))
        monkeypatch.setattr(published.EvitAttention, "attend", None)  # fused, and not called
    torch.testing.assert_close(*results)


@torch.no_grad()
@pytest.mark.parametrize(("keep_rate", "N"), [(0.7, 9), (0.7, 10), (0.7, 7), (1.0, 9)])
@pytest.mark.parametrize("results", [3, 5])
def test_attention_that_ranks(results: int, keep_rate: float, N: int) -> None:
    module, x = published.RankingAttention(32, 4, keep_rate, results), torch.randn(3, N, 32)
    expected = module(x)
    assert hotkernels.swap(module).replaced == [("", "attention that selects tokens")]
    torch.testing.assert_close(module(x), expected)


class KeepsAllAtMost(published.EvitAttention):
    def forward(self, x: Tensor, keep_rate: float | None = None, tokens: int | None = None) -> tuple[Any, ...]:
        return super().forward(x, keep_rate, tokens and min(tokens, x.shape[1] - 1))


@torch.no_grad()
@pytest.mark.parametrize("args", [(0.0,), (None, 0), (None, 9)])
def test_a_selection_of_no_token_or_too_many(args: tuple[Any, ...]) -> None:
    """Is the original's own error, or no error of its own."""
    module, x = published.EvitAttention(32, 4), torch.randn(3, 7, 32)
    hotkernels.swap(module)
    with pytest.raises((AssertionError, RuntimeError)):
        module(x, *args)
    module = KeepsAllAtMost(32, 4)
    hotkernels.swap(module)
    assert module(x, None, 9)[-1] == 6


@pytest.mark.parametrize("dim_head", [None, 6])
def test_attention_by_to_qkv(dim_head: int | None) -> None:
    module = ToQkvAttention(dim_head=dim_head, dropout=0.5 * (dim_head is not None)).eval()
    plain, x = copy.deepcopy(module), torch.randn(3, 7, 32)
    report = hotkernels.swap(module, example_inputs=x)
    said = "attention, where mask is None" + ", in evaluation; training has dropout = 0.5" * (dim_head is not None)
    assert ("", said) in report.replaced
    with pytest.raises(RuntimeError):  # the original's own
        module(torch.randn(2, 3, 7, 32))
    results: list[list[Any]] = [[], []]
    for each, found in zip((module, plain), results, strict=True):
        out = each(x)
        grads = torch.autograd.grad(out.square().sum(), each.parameters())
        mask = torch.arange(7).expand(3, -1) < 5
        torch.manual_seed(0)
        found += [out, *grads, each(x, mask), each.train()(x), torch.get_rng_state()]
        if dim_head is not None:
            each.eval().attend.register_forward_hook(lambda _, __, out: out * 2)
            found.append(each(x))
            each.attend = nn.Sigmoid()
            found.append(each(x))
    torch.testing.assert_close(*results)


# What a published module may also do, and a fused forward must not lose.


class ScaledUnlessNone(AttentionEager):
    def forward(self, x: Tensor, by: float | None = 2.0) -> Tensor:
        return super().forward(x) * (1.0 if by is None else by)


def test_an_output_may_be_written_into() -> None:
    """Also where nothing comes after the heads; autograd forbids it for a view of what a Function returned."""
    module, x = ToQkvAttention(dim_head=8), torch.randn(2, 5, 32, requires_grad=True)
    module.to_out = nn.Identity()
    plain = copy.deepcopy(module)
    assert hotkernels.swap(module).replaced == [("", "attention, where mask is None")]
    results = []
    for each in (module, plain):
        out = each(x)
        out += x
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*results)


class ExtraX(eager.Mlp):
    """Its second argument has the name that the twin gives the first."""

    def forward(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        out = super().forward(h)
        return out if x is None else out * x


class ChannelsFirst(eager.Mlp):
    """Takes [B, C, H, W], too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if x.dim() == 4 else super().forward(x)


class LaterProjection(nn.Module):
    """Of whatever it is derived from beside this."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return self.proj(out) if hasattr(self, "proj") else out


class SelfUnlessContext(KeyValueAttention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.attend(x, x if context is None else context)


def later(mlp: Any) -> None:
    mlp.proj = nn.Linear(32, 32)


CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Any]]] = {
    "both by name": (lambda: ExtraX(32, 64), lambda m, x: m(h=x, x=x + 1)),
    "the second by name": (lambda: ExtraX(32, 64), lambda m, x: m(x, x=x + 1)),
    "None by name": (lambda: ExtraX(32, 64), lambda m, x: m(h=x, x=None)),
    "False for None": (lambda: ExtraX(32, 64), lambda m, x: m(x, False)),
    "False for None by name": (lambda: ExtraX(32, 64), lambda m, x: m(x, x=False)),
    "channels first": (lambda: ChannelsFirst(32, 64), lambda m, x: m(torch.randn(2, 32, 32, 32))),
    "four dims": (lambda: eager.Mlp(32, 64), lambda m, x: m(torch.randn(2, 3, 5, 32))),
    "one dim": (lambda: eager.Mlp(32, 64), lambda m, x: m(x[0, 0])),
    "projection": (
        lambda: type("Later", (LaterProjection, eager.Mlp), {})(32, 64),
        lambda m, x: (torch.manual_seed(1), later(m), m(x))[-1],
    ),
    "no second argument": (lambda: ScaledUnlessNone(32, 4), lambda m, x: m(x)),
    "another second argument": (lambda: ScaledUnlessNone(32, 4), lambda m, x: m(x, by=3.0)),
    "None as second argument": (lambda: ScaledUnlessNone(32, 4), lambda m, x: m(x, None)),
    "no context": (lambda: SelfUnlessContext(32, 4), lambda m, x: m(x)),
    "None as context": (lambda: SelfUnlessContext(32, 4), lambda m, x: m(x, None)),
    "context by name": (lambda: SelfUnlessContext(32, 4), lambda m, x: m(x, context=x + 1)),
    "softmax of queries": (
        lambda: ToQkvAttention(dim_head=6),
        lambda m, x: (setattr(m, "attend", nn.Softmax(dim=-2)), m(x))[-1],
    ),
    "projection of to_qkv": (
        lambda: type("Later", (LaterProjection, ToQkvAttention), {})(),
        lambda m, x: (torch.manual_seed(1), later(m), m(x))[-1],
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_a_twin_must_not_change(name: str, products: list[bool]) -> None:
    make, call = CALLS[name]
    module = make().eval()
    plain = copy.deepcopy(module)
    assert len(hotkernels.swap(module).replaced) >= 1
    products.clear()
    results = []
    for each in (module, plain):
        torch.manual_seed(0)
        results.append(call(each, torch.randn(2, 5, 32)))
    torch.testing.assert_close(*results)
    if name in ("four dims", "one dim"):
        assert products  # fused: no method asks for a shape


def test_twins_lend_no_names_that_a_class_may_have_itself() -> None:
    """A twin comes before the class in the order in which names are found; `subclass` gives back those of _OF_TWINS."""
    for twin in twins.TWINS:
        lent = {name for cls in twin.__mro__[:-1] for name in vars(cls)} - {"forward", *classes._OF_TWINS}
        assert [name for name in lent if not name.startswith(("__", "_hotkernels_"))] == []


# ---- attention between regions ---------------------------------------------------------------------------------------


def gather_twice(module: Any) -> None:
    module.kv_gather.register_forward_hook(lambda _, __, out: out * 2)


def project_more(module: Any) -> None:
    module.qkv.qkv = LowRank(32, 96)


REGIONS: dict[str, tuple[Callable[[Any], object], bool]] = {  # what is done since the swap, and whether it stays fused
    "nothing": (lambda m: None, True),
    "fewer routes": (lambda m: setattr(m.router, "topk", 1), True),
    "a hook on a projection": (lambda m: m.wo.register_forward_hook(lambda _, __, out: out * 2), True),
    "another projection": (project_more, True),
    "another convolution": (lambda m: setattr(m, "lepe", nn.Identity()), True),
    "soft weights": (lambda m: setattr(m.kv_gather, "mul_weight", "soft"), False),
    "a hook on the gather": (gather_twice, False),
    "another softmax": (lambda m: setattr(m, "attn_act", nn.Sigmoid()), False),
    "pooled keys": (lambda m: setattr(m, "kv_down", nn.AvgPool2d(2)), False),
    "other regions": (lambda m: setattr(m, "n_win", 2), False),
}


@pytest.mark.parametrize("change", REGIONS)
def test_attention_between_regions(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    does, fused = REGIONS[change]
    plain = BiLevelRoutingAttentionEager(32, 4, 3, topk=2)
    ours, x = copy.deepcopy(plain), torch.randn(2, 12, 6, 32, requires_grad=True)
    hotkernels.swap(ours)
    calls: list[Any] = []
    routing = routing_attention.bi_level_routing
    monkeypatch.setattr(routing_attention, "bi_level_routing", lambda *args: calls.append(args) or routing(*args))
    results = []
    for each in (ours, plain):
        torch.manual_seed(0)
        does(each)
        out = each(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, *each.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert bool(calls) == fused


@torch.no_grad()
def test_regions_of_images_that_they_do_not_divide() -> None:
    for padded in (False, True):
        plain = BiLevelRoutingAttentionEager(32, 4, 3, auto_pad=padded)
        ours, x = copy.deepcopy(plain), torch.randn(2, 10, 8, 32)
        hotkernels.swap(ours)
        if padded:
            torch.testing.assert_close(ours(x), plain(x))
            continue
        for each in (ours, plain):
            with pytest.raises(RuntimeError, match="shape"):
                each(x)
