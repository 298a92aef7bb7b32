"""The drop-in modules against the published ones: parameters, answers, gradients, dropout, autocast, compilation."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from as_published import OPTIONS, assert_as_published, assert_as_published_under_autocast, hourglass, pair
from comparing import answers
from torch import Tensor, nn

import hotkernels
from hotkernels import gather_tokens
from hotkernels.baselines import (
    AttentionEager,
    BiLevelRoutingAttentionEager,
    CrossAttentionEager,
    TokenRecoveryEager,
)
from hotkernels.nn import Attention, BiLevelRoutingAttention, CrossAttention, TokenPruning, TokenRecovery

each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@each_option
@pytest.mark.parametrize("shape", [(3, 17, 32), (2, 243, 64), (1, 1, 32)])
def test_attention(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    ours, eager = pair(Attention, AttentionEager, shape[-1], **options)
    assert_as_published(ours, eager, lambda m, x: m(x), [torch.randn(shape)])


@pytest.mark.parametrize(
    ("module", "args"),
    [
        (Attention, (8, 2)),
        (CrossAttention, (8, 2)),
        (TokenPruning, (8, 3)),
        (TokenRecovery, (8, 5)),
        (BiLevelRoutingAttention, (8, 2)),
    ],
)
def test_parameters_are_made_where_and_as_what_they_are_asked_for(module: Any, args: tuple[int, ...]) -> None:
    made = [*module(*args, device="meta", dtype=torch.bfloat16).parameters()]
    assert {(p.device.type, p.dtype) for p in made} == {("meta", torch.bfloat16)}
    assert [p.shape for p in made] == [p.shape for p in module(*args).parameters()]


def test_the_widest_head() -> None:
    assert Attention(256, num_heads=1)(torch.randn(1, 3, 256)).shape == (1, 3, 256)


@each_option
def test_attention_along_joints_and_along_frames(options: dict[str, Any]) -> None:
    ours, eager = pair(Attention, AttentionEager, 32, **options)
    x = torch.randn(2, 27, 5, 32)
    assert_as_published(ours, eager, lambda m, x: m(x), [x], lambda m, x: m(x.flatten(0, 1)).view(x.shape))
    assert_as_published(
        ours,
        eager,
        lambda m, x: m(x, along=-3),
        [x],
        lambda m, x: m(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 5)).transpose(1, 2),
    )
    assert ours(x, along=-3).is_contiguous()
    assert ours(x[:0]).shape == (0, 27, 5, 32)


@pytest.mark.parametrize("along", [-2, -3])
@pytest.mark.parametrize("piece", [1, 300, 10_000])
def test_large_inputs_run_in_pieces(along: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autograd: 7 samples of 135 tokens, one, two or all at a time. A hook sees all of them."""
    attention, x = Attention(32), torch.randn(7, 27, 5, 32)
    whole = attention(x, along)
    monkeypatch.setattr("hotkernels.nn.attention._LARGE", 3 * 4 * x.numel() - 1)
    monkeypatch.setattr("hotkernels.nn.attention._PIECE", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    attended: list[int] = []
    original = hotkernels.nn.attention.packed_attention
    monkeypatch.setattr(
        "hotkernels.nn.attention.packed_attention", lambda qkv, *args: (attended.append(1), original(qkv, *args))[1]
    )
    with torch.no_grad():
        torch.testing.assert_close(attention(x, along), whole)
        assert len(attended) == {1: 7, 300: 4, 10_000: 1}[piece]
    seen: list[torch.Size] = []
    for layer in (attention.qkv, attention.attn_drop):
        handle = layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        with torch.no_grad():
            attention(x, along)
        attention(x, along)
        handle.remove()
    assert seen[:2] == [(7, 27, 5, 96)] * 2
    assert seen[2:] == [(7 * 27, 8, 5, 5) if along == -2 else (7, 5, 8, 27, 27)] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_does_not_learn_the_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotkernels.nn.attention._LARGE", 0)
    monkeypatch.setattr("hotkernels.nn.attention._PIECE", 0)
    attention, x = Attention(32), torch.randn(7, 5, 32)
    torch.testing.assert_close(torch.jit.trace(attention, (x,))(x[:2]), attention(x[:2]))


@each_option
@pytest.mark.parametrize("same", [True, False])
def test_cross_attention(options: dict[str, Any], same: bool) -> None:
    ours, eager = pair(CrossAttention, CrossAttentionEager, 32, **options)
    x_1, x_2, x_3 = torch.randn(3, 27, 32), torch.randn(3, 9, 32), torch.randn(3, 9, 32)
    if same:
        assert_as_published(ours, eager, lambda m, q, x: m(q, x, x), [x_1, x_2])
    else:
        assert_as_published(ours, eager, lambda m, q, x, y: m(q, x, y), [x_1, x_2, x_3])


@each_option
@pytest.mark.parametrize("shared", [True, False])
def test_every_joint_attends_by_itself(options: dict[str, Any], shared: bool) -> None:
    """As [B * J, N, C] does in the published module; x_1 is [L, C] or [B, L, J, C]."""
    ours, eager = pair(CrossAttention, CrossAttentionEager, 32, **options)
    x_1, x = torch.randn(27, 32) if shared else torch.randn(3, 27, 5, 32), torch.randn(3, 9, 5, 32)

    def one_by_one(m: nn.Module, x_1: Tensor, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(0, 1)
        queries = x_1.expand(len(rows), -1, -1) if shared else x_1.transpose(1, 2).flatten(0, 1)
        return m(queries, rows, rows).unflatten(0, (3, 5)).transpose(1, 2)

    assert_as_published(ours, eager, lambda m, x_1, x: m(x_1, x, x), [x_1, x], one_by_one)


@each_option
def test_a_query_that_is_the_same_for_the_whole_batch(options: dict[str, Any]) -> None:
    """Expanded, repeated or of batch 1: the same answer and gradients."""
    ours, eager = pair(CrossAttention, CrossAttentionEager, 32, **options)
    token, x = torch.randn(1, 27, 32), torch.randn(3, 9, 32)

    def repeated(m: nn.Module, token: Tensor, x: Tensor) -> Tensor:
        return m(token.repeat(3, 1, 1), x, x)

    assert_as_published(ours, eager, lambda m, t, x: m(t.expand(3, -1, -1), x, x), [token, x], repeated)
    assert_as_published(ours, eager, lambda m, t, x: m(t, x, x), [token, x], repeated)
    assert_as_published(ours, eager, repeated, [token, x])
    assert ours(token.expand(0, -1, -1), x[:0], x[:0]).shape == (0, 27, 32)


@pytest.mark.parametrize("watch", ["leaf", "hook", "retain_grad"])
def test_the_gradient_of_an_expanded_query_itself(watch: str) -> None:
    """Where something looks at it, it is each sample's own."""
    module, token, x = CrossAttention(16, 2), torch.randn(1, 5, 16, requires_grad=True), torch.randn(3, 4, 16)
    weight, seen = torch.rand(3, 5, 16), []
    expanded = token.expand(3, -1, -1)
    if watch == "leaf":
        expanded = expanded.detach().requires_grad_()
    elif watch == "hook":
        expanded.register_hook(seen.append)
    else:
        expanded.retain_grad()
    (module(expanded, x, x) * weight).sum().backward()
    repeated = token.detach().repeat(3, 1, 1).requires_grad_()
    (module(repeated, x, x) * weight).sum().backward()
    torch.testing.assert_close(seen[0] if seen else expanded.grad, repeated.grad)


@each_option
@pytest.mark.parametrize(("B", "M", "J", "L"), [(2, 9, 5, 27), (1, 81, 3, 243), (1, 1, 1, 1), (3, 13, 17, 39)])
def test_token_recovery(options: dict[str, Any], B: int, M: int, J: int, L: int) -> None:
    ours, eager = pair(TokenRecovery, TokenRecoveryEager, 32, L, **options)
    x = torch.randn(B, M, J, 32)
    assert_as_published(ours, eager, lambda m, x: m(x), [x])
    assert_as_published(ours, eager, lambda m, x: m(x), [torch.randn(B, J, M, 32).transpose(1, 2)])
    out = ours(x)
    assert out.shape == (B, L, J, 32)
    assert out.is_contiguous()
    assert ours(x[:0]).shape == (0, L, J, 32)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 6, 6, 32), {}),  # regions of 4 tokens: an index per query
        ((3, 9, 12, 32), {"topk": 1, "qk_scale": -0.4}),
        ((1, 24, 15, 32), {"topk": 9, "side_dwconv": 5}),  # all regions
        ((2, 10, 8, 32), {"auto_pad": True}),
        ((2, 1, 1, 32), {"auto_pad": True, "topk": 2}),
    ],
    ids=str,
)
def test_attention_between_regions(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    eager = BiLevelRoutingAttentionEager
    ours, eager = pair(BiLevelRoutingAttention, eager, 32, num_heads=2, n_win=3, **options)
    assert_as_published(ours, eager, lambda m, x: m(x), [torch.randn(shape)])


def test_regions_compile_and_export() -> None:
    """For any number of images."""
    ours, x = BiLevelRoutingAttention(32, 2, 3, side_dwconv=0), torch.randn(3, 9, 12, 32)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    exported = torch.export.export(ours, (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    for images in (x[:2], x):
        torch.testing.assert_close(compiled(images), ours(images))
        torch.testing.assert_close(exported(images), ours(images))
    assert ours(x[:0]).shape == (0, 9, 12, 32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("width", [12, 3])
@torch.no_grad()
def test_regions_are_traced(width: int) -> None:
    ours, x = BiLevelRoutingAttention(32, 2, 3), torch.randn(2, 9, width, 32)
    torch.testing.assert_close(torch.jit.trace(ours, (torch.randn_like(x),))(x), ours(x))


# ---- half types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("ours", "eager", "args", "shape"),
    [
        (Attention, AttentionEager, (32,), (3, 17, 32)),
        (TokenRecovery, TokenRecoveryEager, (32, 27), (2, 9, 5, 32)),
    ],
)
def test_autocast(ours: Any, eager: Any, args: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_published_under_autocast(ours, eager, args, shape, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_in_half(dtype: torch.dtype) -> None:
    for ours, eager, args, shape in (
        (Attention, AttentionEager, (32,), (3, 17, 32)),
        (TokenRecovery, TokenRecoveryEager, (32, 27), (2, 9, 5, 32)),
    ):
        a, b = pair(ours, eager, *args, qkv_bias=True)
        a, b, x = a.to(dtype), b.to(dtype), torch.randn(shape).to(dtype)
        out, low, truth = a(x), b(x), copy.deepcopy(b).double()(x.double())
        assert out.dtype == dtype
        assert (out - truth).norm() <= 2 * (low - truth).norm()


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["attn_drop", "proj_drop"])
def test_dropout_in_training_and_not_in_evaluation(which: str) -> None:
    for ours, eager, args, shape in (
        (Attention, AttentionEager, (16,), (2, 5, 16)),
        (TokenRecovery, TokenRecoveryEager, (16, 7), (2, 3, 2, 16)),
    ):
        a, b = pair(ours, eager, *args, **{which: 0.4})
        drops, published = ([m.p for m in each.modules() if isinstance(m, nn.Dropout)] for each in (a, b))
        assert drops == published
        x = torch.randn(shape)
        plain = a.eval()(x)
        torch.testing.assert_close(plain, b.eval()(x))
        a.train()
        assert not torch.equal(a(x), a(x))
        torch.manual_seed(1)
        one = a(x)
        torch.manual_seed(1)
        assert torch.equal(a(x), one)
        with torch.no_grad():
            mean = torch.stack([a(x) for _ in range(1500)]).mean(0)
        assert (mean - plain).abs().mean() < 0.05 * plain.abs().mean()
        a.eval()
        assert torch.equal(a(x), plain)


# ---- pruning ---------------------------------------------------------------------------------------------------------


def test_the_centre_stays_even_if_nothing_is_valid() -> None:
    x = torch.full((2, 11, 2, 8), torch.nan)
    assert TokenPruning(8, 3, center=True)(x)[1].tolist() == [[0, 1, 5]] * 2
    x = torch.randn(2, 11, 2, 8)
    x[1, 5] = torch.nan
    index = TokenPruning(8, 3, center=True)(x)[1]
    assert (index == 5).any(1).all()
    assert (index.diff() > 0).all()


@pytest.mark.parametrize("center", [False, True])
def test_token_pruning(center: bool) -> None:
    """Frames in temporal order, the centre among them when asked; a given index is used as it is."""
    module = TokenPruning(8, 9, center=center)
    nn.init.normal_(module.pos_embed_token)
    assert module.pos_embed_token.shape == (1, 9, 8)
    x = torch.randn(4, 28, 5, 8, requires_grad=True)
    pruned, index = module(x)
    assert index.shape == (4, 9)
    assert (index.diff() > 0).all()
    if center:
        assert (index == 13).any(-1).all()
    expected = gather_tokens(x, index) + module.pos_embed_token[:, :, None]
    torch.testing.assert_close(pruned, expected, rtol=0, atol=0)
    grad_out = torch.randn_like(pruned)
    grads = torch.autograd.grad(pruned, (x, module.pos_embed_token), grad_out)
    for a, b in zip(grads, torch.autograd.grad(expected, (x, module.pos_embed_token), grad_out), strict=True):
        torch.testing.assert_close(a, b)
    assert (grads[0].flatten(2).any(-1).sum(-1) == 9).all()
    flipped, again = module(x.flip(-1), index)
    assert torch.equal(again, index)
    torch.testing.assert_close(flipped, gather_tokens(x.flip(-1), index) + module.pos_embed_token[:, :, None])


@pytest.mark.parametrize("options", [{}, {"k": 5}, {"seed": 3}])
def test_the_choice_is_by_the_mean_of_the_joints(options: dict[str, int]) -> None:
    """Of frames that come twice, which have equal densities for k = 2: the seed orders them."""
    x = torch.randn(4, 14, 3, 4).repeat_interleave(2, 1)
    expected = hotkernels.dpc_knn(x.mean(2), 9, **{"k": 2, **options}, ordered=True).index
    assert torch.equal(TokenPruning(4, 9, **options)(x)[1], expected)


def test_frames_that_are_no_numbers_are_chosen_where_others_are_too_few() -> None:
    """A sample of NaN stays one, rather than become a plausible pose of the others' average."""
    module, x = TokenPruning(8, 9), torch.randn(3, 27, 5, 8)
    x[0, 4, 2, 1] = torch.nan  # enough others
    x[1, 5:, 0, 0] = torch.nan  # five others
    x[2, :, 3] = torch.inf
    pruned, index = module(x)
    assert (index.diff() > 0).all()
    assert 4 not in index[0]
    assert index[1].tolist() == index[2].tolist() == [*range(9)]
    assert [t.isfinite().all().item() for t in pruned] == [True, False, False]


def test_the_choice_is_the_same_every_time() -> None:
    x = torch.randn(2, 27, 5, 8)
    index = TokenPruning(8, 9)(x)[1]
    assert torch.equal(TokenPruning(8, 9)(x)[1], index)
    assert torch.equal(TokenPruning(8, 9)(x[1:])[1], index[1:])


# ---- the whole hourglass ---------------------------------------------------------------------------------------------


def test_copies() -> None:
    module, x = hourglass(), torch.randn(2, 27, 5, 16)
    out = module(x)
    assert torch.equal(copy.deepcopy(module)(x), out)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), out)


def test_compiles_without_graph_breaks() -> None:
    module, x = hourglass(), torch.randn(2, 27, 5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(answers(call, x, parameters=module.parameters()) for call in (compiled, module)))


def test_exports() -> None:
    """What is exported trains, too; its parameters are the module's."""
    module, x = hourglass().eval(), torch.randn(2, 27, 5, 16)
    program = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(*(answers(call, x, parameters=module.parameters()) for call in (program, module)))


def test_pruning_compiles_and_exports_for_any_number_of_samples_and_frames() -> None:
    module, x = hourglass().prune, torch.randn(2, 27, 5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim("F", min=9, max=500)}
    exported = torch.export.export(module, (x,), dynamic_shapes=(dims,))
    for batch, frames in ((2, 27), (3, 31)):
        x = torch.randn(batch, frames, 5, 16)
        for ours in (compiled, exported.module()):
            for a, b in zip(ours(x), module(x), strict=True):
                torch.testing.assert_close(a, b)


def test_training_reduces_a_loss() -> None:
    module, x = hourglass(), torch.randn(2, 27, 5, 16)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = (module(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_patched_onto_inner_layers_runs() -> None:
    """A forward of the instance, as accelerate and LoRA trainers set it; a hook of all modules."""
    module, x = Attention(16, num_heads=2), torch.randn(2, 5, 16)
    qkv, plain, seen = module.qkv.forward, module(x), []
    module.qkv.forward = lambda t: qkv(t) + 1
    assert not torch.allclose(module(x), plain)
    del module.qkv.forward
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    module(x)
    handle.remove()
    assert module.qkv in seen
    assert module.proj in seen


@pytest.mark.parametrize("when", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
def test_hooks_of_inner_layers_run(when: str) -> None:
    module, seen = Attention(16, num_heads=2), []
    for layer in (module.qkv, module.proj):
        getattr(layer, f"register_{when}_hook")(lambda layer, *_: seen.append(layer))
    module(torch.randn(2, 5, 16, requires_grad=True)).sum().backward()
    assert seen in ([module.qkv, module.proj], [module.proj, module.qkv])


def test_a_hook_of_linear_q_where_joints_attend_by_themselves() -> None:
    """Then a query of [1, L, C] is served, too, though what stands in linear_q's place gets it without the batch."""
    module, seen = CrossAttention(16, num_heads=2), []
    query, kept = torch.randn(1, 3, 16), torch.randn(2, 5, 4, 16)
    expected = module(query, kept, kept)
    module.linear_q.register_forward_hook(lambda layer, args, out: seen.append(args[0].shape))
    assert torch.equal(module(query, kept, kept), expected)
    assert seen == [(3, 16)]


@pytest.mark.parametrize("change", ["AlphaDropout", "hook", "forward"])
@pytest.mark.parametrize(
    ("ours", "eager", "args", "shapes"),
    [
        (Attention, AttentionEager, (32,), [(2, 5, 32)]),
        (CrossAttention, CrossAttentionEager, (32,), [(2, 7, 32), (2, 5, 32), (2, 5, 32)]),
        (TokenRecovery, TokenRecoveryEager, (32, 9), [(2, 5, 3, 32)]),
    ],
)
def test_what_stands_in_the_place_of_attn_drop(ours: Any, eager: Any, args: Any, shapes: Any, change: str) -> None:
    """It is called on the probabilities, with the random numbers of the published module."""
    results, inputs = [], [torch.randn(shape) for shape in shapes]
    for module in pair(ours, eager, *args):
        attention = getattr(module, "cross_attention", module)
        if change == "AlphaDropout":
            attention.attn_drop = nn.AlphaDropout(0.5)
        elif change == "hook":
            attention.attn_drop.register_forward_hook(lambda _, __, out: out * 2)
        else:
            attention.attn_drop.forward = torch.sqrt
        torch.manual_seed(1)
        results.append(answers(module.train(), *inputs, parameters=module.parameters()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_attn_drop_in_a_layout_of_frames() -> None:
    attention, x = Attention(16, num_heads=2), torch.randn(2, 7, 3, 16)
    plain, seen = attention(x, along=-3), []
    attention.attn_drop.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    torch.testing.assert_close(attention(x, along=-3), plain)
    assert seen == [(2, 3, 2, 7, 7)]


def test_what_a_hook_sees_is_not_overwritten() -> None:
    module, seen = TokenRecovery(16, 9, num_heads=2), []
    nn.init.normal_(module.x_token)
    module.cross_attention.proj.register_forward_hook(lambda m, args, out: seen.append((out, out.clone())))
    module(torch.randn(2, 5, 3, 16))
    ((out, copy),) = seen
    assert torch.equal(out, copy)
