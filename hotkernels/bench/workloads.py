"""One call of each op as published and as ours, at shapes of published models; answers are checked before times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ..baselines import (
    BiLevelRoutingAttentionEager,
    TokenRecoveryEager,
    attention_eager,
    cluster_dpc_knn_eager,
    gather_tokens_eager,
    gathered_attention_eager,
    merge_tokens_eager,
)
from ..errors import fail
from ..nn import TokenRecovery
from ..nn.routing import attend_to_regions
from ..ops.dpc_knn import dpc_knn
from ..ops.gather_tokens import gather_tokens
from ..ops.gathered_attention import gathered_attention
from ..ops.gathered_attention.api import packed_attention, unpack
from ..ops.invert_index import invert_index
from ..ops.invert_index.reference import invert_index_reference
from ..ops.merge_tokens import merge_tokens
from ..ops.recovery_attention import recovery_attention
from .timing import Thunk


@dataclass(frozen=True)
class Workload:
    """The same call by the published eager code and by ours, on the same arguments."""

    what: str
    args: tuple[Any, ...]
    eager: Callable[..., Any]
    ours: Callable[..., Any]
    wrong: Callable[[Any, Any], str | None] | None = None
    """What is wrong with (eager's result, ours), None if nothing; by default both are compared to float64."""
    grad_of: tuple[int, ...] = ()
    """Positions in `args` that gradients are taken of; () = the op has none."""
    sdpa: Callable[..., Any] | None = None
    """The call around PyTorch's own fused attention; None if it has no part in the op."""
    flex: Callable[..., Any] | None = None
    """The same around FlexAttention, to be compiled."""

    def contenders(self, names: Collection[str]) -> dict[str, Callable[..., Any]]:
        """The calls of these names, of those that there are: "eager", "compile" (of eager), "sdpa", "ours"."""
        several = {"eager": self.eager, "sdpa": self.sdpa, "ours": self.ours}
        if "compile" in names:
            several["compile"] = torch.compile(self.eager, dynamic=False)
        return {name: call for name in names if (call := several[name]) is not None}

    def thunk(self, function: Callable[..., Any], backward: bool, dtype: torch.dtype | None = None) -> Thunk:
        """The call without arguments: forward alone, or the gradients of one forward and backward pass."""
        args = [a.to(dtype) if dtype and isinstance(a, Tensor) and a.is_floating_point() else a for a in self.args]
        if not backward:

            def forward() -> Any:
                with torch.no_grad():
                    return function(*args)

            return forward
        wrt = [args[i].detach().requires_grad_() for i in self.grad_of]
        given = self.args[self.grad_of[0]].dtype
        for i, leaf in zip(self.grad_of, wrt, strict=True):
            args[i] = leaf
        grad_out = None

        def forward_backward() -> Any:
            nonlocal grad_out
            out = function(*args)
            if grad_out is None:
                g = torch.Generator(out.device).manual_seed(1)
                grad_out = torch.randn(out.shape, generator=g, device=out.device)
                grad_out = grad_out.to(given).to(out.dtype)  # in float64, too, the numbers that the others get
            return torch.autograd.grad(out, wrt, grad_out)

        return forward_backward

    def check(self, backward: bool = False) -> str | None:
        """What is wrong with our result, or None."""
        ours, theirs = self.thunk(self.ours, backward)(), self.thunk(self.eager, backward)()
        if self.wrong is not None:
            return self.wrong(theirs, ours)
        exact = self.thunk(self.eager, backward, torch.float64)()
        if not backward:
            theirs, ours, exact = [theirs], [ours], [exact]
        times = 3 if backward else 2
        floor = rounding_floor(ours[0].dtype, ours[0].is_cuda) * max(float(true.abs().max()) for true in exact)
        for place, (low, own, true) in enumerate(zip(theirs, ours, exact, strict=True)):
            allowed = times * (low - true).abs().max() + floor
            error = (own - true).abs().max()
            if not error <= allowed:
                name = f"gradient {place}" if backward else "the result"
                return f"{name} is {error:.2g} from float64, {allowed:.2g} is allowed"
        return None


def rounding_floor(dtype: torch.dtype, tensor_cores: bool) -> float:
    """The error that is allowed however small PyTorch's own is, relative to the largest number in the answer.

    Some roundings of what sums are kept in. Tensor cores cut off what a sum cannot hold: 32 times in a product of 256
    channels. float64 has no better truth than itself.
    """
    roundings = 16 if tensor_cores else 32 if dtype == torch.float64 else 4
    return roundings * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _tokens(shape: Sequence[int], dtype: torch.dtype, device: str, *, smooth: bool = False, seed: int = 0) -> Tensor:
    """Normal tokens; smooth: a random walk along N, normalised per token as a transformer's features are.

    Each argument of a call has a seed of its own: else one would start with the numbers of the other.
    """
    x = torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    if smooth:
        x = torch.nn.functional.layer_norm(x.mul(0.3).cumsum(1), (shape[-1],))
    return x.to(dtype)


def dpc_knn_workload(
    shape: Sequence[int],
    clusters: int,
    *,
    k: int = 5,
    center: int | None = None,
    smooth: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Workload:
    """Clustering of [B, N, C]. With `center`, the published code chooses one less and its caller appends the centre."""
    B, N, _ = shape
    x = _tokens(shape, dtype, device, smooth=smooth)
    noise = (torch.rand(B, N, generator=torch.Generator().manual_seed(2)) * 1e-6).to(device)

    def eager(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # as Chat-UniVi does: cdist of half types is not usable
        if center is None:
            return cluster_dpc_knn_eager(x, clusters, k, noise)
        index, idx_cluster = cluster_dpc_knn_eager(x, clusters - 1, k, noise, center=center)
        return torch.cat([index, torch.full_like(index[:, :1], center)], 1), idx_cluster

    def ours(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        return dpc_knn(x, clusters, k, noise=noise, keep=center, backend=backend)[:2]

    def wrong(theirs: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> str | None:
        exact = x.double()
        score = dpc_knn(exact, clusters, k, noise=noise, keep=center, assign=False, backend="torch").score
        best = score if center is None else score.index_fill(1, torch.tensor([center], device=device), torch.inf)
        most = score.gather(1, best.topk(clusters).indices).sum()
        published, reached = (float(score.gather(1, index).sum() / most) for index, _ in (theirs, own))
        if most > 0 and not reached >= published - 1e-3:
            return f"the chosen tokens reach {reached:.4f} of the best score, the published code's {published:.4f}"
        for sample, index, assignment in zip(exact, *own, strict=True):
            to_chosen = torch.cdist(sample, sample[index])
            worse = to_chosen.gather(1, assignment[:, None])[:, 0] - to_chosen.amin(1)
            if not worse.max() <= 1e-4 * to_chosen.max():
                return f"a token is assigned {worse.max():.2g} farther away than its nearest kept token"
        return None

    what = f"{_sizes(shape)} -> {clusters}, k {k}" + (f", keep {center}" if center is not None else "")
    return Workload(what, (x, noise), eager, ours, wrong)


def gather_tokens_workload(
    shape: Sequence[int],
    clusters: int,
    *,
    pos: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Workload:
    """Gathering `clusters` different tokens of [B, N, ..., C], sorted as HoT does, with a position embedding."""
    x = _tokens(shape, dtype, device)
    shuffled = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)).argsort(1)
    index = shuffled[:, :clusters].sort(1).values.to(device)
    if not pos:
        args: tuple[Any, ...] = (x, index)
    else:
        args = (x, index, _tokens((1, clusters, shape[-1]), dtype, device, seed=3))

    def ours(*args: Tensor) -> Tensor:
        return gather_tokens(*args, backend=backend)

    what = f"{_sizes(shape)} -> {clusters}" + (" + pos" if pos else "")
    return Workload(what, args, gather_tokens_eager, ours, grad_of=(0, 2) if pos else (0,))


def merge_tokens_workload(
    shape: Sequence[int],
    clusters: int,
    *,
    weighted: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Workload:
    """Merging [B, N, C] into the clusters of dpc_knn; the weight is the exp of a score, as in TCFormer."""
    B, N, _ = shape
    x = _tokens(shape, dtype, device)
    assignment = dpc_knn(x, clusters, min(5, N)).assignment
    args: tuple[Any, ...] = (x, assignment)
    if weighted:
        args = (*args, _tokens((B, N, 1), dtype, device, seed=3).exp())

    def eager(x: Tensor, assignment: Tensor, weight: Tensor | None = None) -> Tensor:
        return merge_tokens_eager(x, assignment, clusters, weight)

    def ours(x: Tensor, assignment: Tensor, weight: Tensor | None = None) -> Tensor:
        return merge_tokens(x, assignment, clusters, weight, backend=backend)

    what = f"{_sizes(shape)} -> {clusters}" + (", weighted" if weighted else "")
    return Workload(what, args, eager, ours, grad_of=(0, 2) if weighted else (0,))


def gathered_attention_workload(
    shape: Sequence[int],
    clusters: int,
    *,
    heads: int = 8,
    k: int | None = None,
    local: bool = False,
    inverted: bool = False,
    regions: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Workload:
    """Self-attention from the output of the qkv projection, [B, N, 3 * C], to [B, N, C].

    Every token attends to all (`clusters` = N), to a set of `clusters` tokens per sample, or to `k` tokens of its own:
    random ones, or `local` ones at most `k` away. `inverted`: with an index whose inverse is at hand. Or they lie in
    `regions`, one after the other, and those of each attend to those of `k` random ones, as in BiFormer.

    SDPA takes no index: a set is gathered for it; in place of `k` tokens it attends to all, which masking would slow.
    """
    B, N, C = shape
    D = _head_dim("gathered_attention", C, heads)
    if regions is not None:
        return _regions_workload(_tokens((B, N, 3 * C), dtype, device), regions, k or 1, heads, backend)
    generator = torch.Generator().manual_seed(1)
    batch = torch.arange(B, device=device)[:, None]
    what = f"{_sizes(shape)} H{heads} D{D}"

    def parts(qkv: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv.unflatten(-1, (3, heads, D))
        if index is None or index.dim() == 3:
            query, key, value = unpack(qkv)
            return query, key, value
        key, value = (t.transpose(1, 2) for t in qkv[:, :, 1:][batch, index].unbind(2))
        return qkv[:, :, 0].transpose(1, 2), key, value

    def merge(out: Tensor) -> Tensor:
        return out.transpose(1, 2).reshape(B, N, C)

    def fused(qkv: Tensor, index: Tensor | None = None) -> Tensor:
        return merge(sdpa(*parts(qkv, index)))

    def flex(qkv: Tensor, index: Tensor | None = None) -> Tensor:
        return merge(flex_attention(*parts(qkv, index)))

    def eager(qkv: Tensor, index: Tensor | None = None) -> Tensor:
        if index is not None and index.dim() == 3:
            query, key, value = parts(qkv)
            # 2**26 numbers at a time: more than that would not fit small machines.
            chunk = max(1, 2**26 // (index.shape[-1] * C))
            pairs = zip(query.split(chunk, 2), index.split(chunk, 1), strict=True)
            return merge(torch.cat([gathered_attention_eager(q, key, value, i) for q, i in pairs], 2))
        return merge(attention_eager(*parts(qkv, index), D**-0.5))

    def ours(qkv: Tensor, index: Tensor | None = None) -> Tensor:
        if index is None:
            return merge(packed_attention(qkv.unflatten(-1, (3, heads, D)), D**-0.5, backend=backend))
        query, key, value = parts(qkv)
        return merge(gathered_attention(query, key, value, index if inverse is None else inverse, backend=backend))

    args: tuple[Any, ...] = (_tokens((B, N, 3 * C), dtype, device),)
    inverse = None
    if k is not None:
        index = torch.randint(-k if local else 0, k + 1 if local else N, (B, N, k), generator=generator)
        index = ((index + torch.arange(N)[:, None]).clamp(0, N - 1) if local else index).to(device)
        inverse = invert_index(index, N, dims=2) if inverted else None
        args = (*args, index)
        what += f", k {k} {'local' if local else 'random'}" + (", inverted" if inverted else "")
    elif clusters < N:
        kept = torch.rand(B, N, generator=generator).argsort(1)[:, :clusters].sort(1).values
        args = (*args, kept.to(device))
        what += f", {clusters} keys"
    return Workload(what, args, eager, ours, grad_of=(0,), sdpa=fused, flex=flex)


def _regions_workload(qkv: Tensor, regions: int, k: int, heads: int, backend: str | None) -> Workload:
    """For the projection qkv [B, N, 3 * C]. SDPA gets copies by plain indexing, whose backward pass is far faster."""
    B, N, C = *qkv.shape[:2], qkv.shape[2] // 3
    if N % regions != 0:
        fail("gathered_attention", "regions", f"a divisor of N = {N}", regions)
    scale = (C // heads) ** -0.5
    routes = torch.rand(B, regions, regions, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :k]
    batch = torch.arange(B, device=qkv.device)[:, None, None]

    def copying(attention: Callable[..., Tensor], gather: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(qkv: Tensor, routes: Tensor) -> Tensor:
            query, both = qkv.unflatten(1, (regions, -1)).split([C, 2 * C], -1)
            chosen = gather(routes, None, both).reshape(B * regions, -1, 2, heads, C // heads)
            query = query.reshape(B * regions, -1, heads, C // heads).transpose(1, 2)
            return attention(query, *chosen.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(B, N, C)

        return call

    def ours(qkv: Tensor, routes: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(1, (regions, -1)).chunk(3, -1)
        return attend_to_regions(query, key, value, routes, heads, scale, backend).flatten(1, 2)

    what = f"{_sizes((B, N, C))} H{heads} D{C // heads}, {k} of {regions} regions"
    eager = copying(functools.partial(attention_eager, scale=scale), BiLevelRoutingAttentionEager.Gather())
    fused = copying(sdpa, lambda routes, _, both: both[batch, routes])
    return Workload(what, (qkv, routes.to(qkv.device)), eager, ours, grad_of=(0,), sdpa=fused)


def recovery_attention_workload(
    shape: Sequence[int],
    clusters: int,
    *,
    heads: int = 8,
    core: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Workload:
    """HoT's recovery of [B, F, J, C] from `clusters` of F frames: the module, or with `core` its attention alone.

    With `backend` too it is the attention alone: the module chooses for itself.
    """
    B, F, J, C = shape
    D = _head_dim("recovery_attention", C, heads)
    what = f"{_sizes((B, clusters, J, C))} -> {F} H{heads}" + (", core" if core else "")
    if core or backend is not None:
        args = (_tokens((heads, F, D), dtype, device), _tokens((B, clusters, J, 2 * C), dtype, device, seed=3))

        def attend(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(query: Tensor, key_value: Tensor) -> Tensor:
                key, value = key_value.unflatten(-1, (2, heads, D)).permute(3, 0, 2, 4, 1, 5).unbind(0)
                return attention(query, key, value)

            return call

        eager = attend(functools.partial(attention_eager, scale=D**-0.5))
        ours = attend(functools.partial(recovery_attention, backend=backend))

        def one_batch_dim(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                out = attention(query.expand(B * J, -1, -1, -1), key.flatten(0, 1), value.flatten(0, 1))
                return out.unflatten(0, (B, J))

            return attend(call)

        fused, flex = one_batch_dim(sdpa), one_batch_dim(flex_attention)
        return Workload(what, args, eager, ours, grad_of=(0, 1), sdpa=fused, flex=flex)

    published, module = TokenRecoveryEager(C, F, heads, qkv_bias=True), TokenRecovery(C, F, heads, qkv_bias=True)
    generator = torch.Generator().manual_seed(1)
    names = [name for name, _ in module.named_parameters()]
    # Linear layers' usual spread; the published initial x_token, zero, would leave every logit alike.
    parameters = [(torch.randn(p.shape, generator=generator) * C**-0.5).to(device, dtype) for p in module.parameters()]

    def functional(recovery: torch.nn.Module) -> Callable[..., Tensor]:
        def call(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(recovery, dict(zip(names, values, strict=True)), (x,))

        return call

    args = (_tokens((B, clusters, J, C), dtype, device), *parameters)
    return Workload(what, args, functional(published), functional(module), grad_of=tuple(range(len(args))))


def _head_dim(op: str, C: int, heads: int) -> int:
    if C % heads != 0:
        fail(op, "heads", f"a divisor of C = {C}", heads)
    return C // heads


def invert_index_workload(
    shape: Sequence[int],
    clusters: int,
    *,
    device: str = "cpu",
    backend: str | None = None,
) -> Workload:
    """Inverting an index [B, Nq, K] into `clusters` tokens, against a stable sort of it."""
    index = torch.randint(clusters, tuple(shape), generator=torch.Generator().manual_seed(1)).to(device)

    def eager(index: Tensor) -> tuple[Tensor, Tensor]:
        return invert_index_reference(index.flatten(1), clusters)

    def ours(index: Tensor) -> tuple[Tensor, Tensor]:
        return invert_index(index, clusters, dims=2, backend=backend)[1:]

    def wrong(eager: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor]) -> str | None:
        same = all(torch.equal(a, b) for a, b in zip(eager, ours, strict=True))
        return None if same else "another inverse than a stable sort gives"

    return Workload(f"{_sizes(shape)} into {clusters}", (index,), eager, ours, wrong)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "dpc_knn": dpc_knn_workload,
    "gather_tokens": gather_tokens_workload,
    "merge_tokens": merge_tokens_workload,
    "gathered_attention": gathered_attention_workload,
    "recovery_attention": recovery_attention_workload,
    "invert_index": invert_index_workload,
}
