"""The registry of operators under test. An op that appends one OpCase to OPS gets the whole conformance loop.

Registered inputs are functions of the dtype that draw from torch's generator, which every test seeds for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from dpc_knn_steps import check_dpc_knn
from torch import Tensor
from torch.utils import _pytree as pytree

import hotkernels

Args = dict[str, Any]
Make = Callable[[torch.dtype], Args]


@dataclass(frozen=True)
class Bad:
    """A wrong call: the registered `small` input, or a raw operator's good call, with some arguments changed."""

    arg: str  # the one that the error must name
    change: Callable[[Args], Args]
    error: type[Exception] = ValueError  # of the public function
    expected: str = ""  # how what is expected must begin, and what is told of it
    got: str = ""
    only: str = ""  # the one backend that refuses it, if not all do


@dataclass(frozen=True)
class BadRaw:
    """Wrong calls of a raw operator."""

    operator: str
    good: Callable[[], Args]  # a call that is served: all arguments, in order
    bad: list[Bad]


@dataclass(frozen=True)
class OpCase:
    """All that the conformance loop needs to know about an op. Arguments go by name."""

    name: str
    function: Callable[..., Any]  # the public function
    inputs: dict[str, Make]  # several are floating; "small" is among them, and complete
    bad: list[Bad]
    raw: Callable[[Args], list[tuple[str, tuple]]]  # the raw operators, with positional arguments for opcheck
    bad_raw: list[BadRaw]  # wrong calls of each of them, as C++ and CUDA refuse them
    # Work for several threads, and more than a block of a GPU holds; with an index, where the op has one.
    large: dict[str, Make]
    tiny: Callable[[int, int], Args]  # n samples of a few tokens, C wide: GPUs get them by the hundred thousand
    differentiable: tuple[str, ...] = ()
    index: tuple[str, Callable[[Args], int]] | None = None  # the argument that is one, and how many tokens there are
    # The definition in PyTorch, not that of ops/<op>/reference.py; in float64 it is the truth. None where `check` is.
    definition: Callable[..., Any] | None = None
    # For discrete results: asserts that an output is what the arguments mean.
    check: Callable[[Args, Any], None] | None = None


OPS: list[OpCase] = []


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an output or in arguments."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def upcast(value: Any) -> Any:
    """The same with every floating tensor in float64."""
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


def wanted_by(op: OpCase, args: Args) -> tuple[str, ...]:
    """The arguments of this call that have gradients."""
    return tuple(name for name in op.differentiable if name in args)


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The values of t behind other strides. Whatever lies between them is poison."""
    poison: Any = torch.nan if t.is_floating_point() else True if t.dtype == torch.bool else 1 << 30
    backwards = tuple(reversed(range(t.dim())))
    sliced = t.new_full([2 * size + 1 for size in t.shape], poison)[tuple(slice(1, None, 2) for _ in t.shape)]
    shifted = t.new_full((t.numel() + 1,), poison)[1:].view(t.shape)
    tail = t.new_full([*t.shape[:-1], t.shape[-1] + 3], poison)[..., : t.shape[-1]]

    def apart(dims: int) -> Tensor:
        """With one element after each part of so many dims: wide loads find no second part where they want it."""
        parts, numel = t.shape[: t.dim() - dims], math.prod(t.shape[t.dim() - dims :])
        return t.new_full([*parts, numel + 1], poison)[..., :numel].view(t.shape).copy_(t)

    swapped = t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t
    return {
        "backwards": t.permute(backwards).contiguous().permute(backwards),
        "swapped": swapped,
        "sliced": sliced.copy_(t),
        "shifted": shifted.copy_(t),
        "part of longer rows": tail.copy_(t),
        "tokens apart": apart(max(t.dim() - 2, 0)),
        "samples apart": apart(max(t.dim() - 1, 0)),
        "repeated": t[:1].expand_as(t),
    }


def random_slots(shape: tuple[int, ...], N: int, absent: float = 0.2) -> Tensor:
    """Random positions among N, some of them repeated, some absent."""
    return torch.where(torch.rand(shape) < absent, -1, torch.randint(N, shape))


# ---- gather_tokens ---------------------------------------------------------------------------------------------------


def _gather(
    B: int, N: int, M: int, *trail: int, pos: bool = False, absent: float = 0.2, layout: str | None = None
) -> Make:
    def make(dtype: torch.dtype) -> Args:
        x = torch.randn(B, N, *trail).to(dtype)
        args: Args = {"x": layouts(x)[layout] if layout else x, "index": random_slots((B, M), N, absent)}
        if pos:
            args["pos"] = torch.randn(M, trail[-1]).to(dtype)
        return args

    return make


def _gather_definition(x: Tensor, index: Tensor, pos: Tensor | None = None) -> Tensor:
    out = x[torch.arange(len(x))[:, None], index]
    out = torch.where((index < 0).reshape(*index.shape, *[1] * (x.dim() - 2)), 0.0, out)
    return out if pos is None else out + pos.reshape(index.shape[1], *[1] * (x.dim() - 3), x.shape[-1])


def _gather_raw(args: Args) -> list[tuple[str, tuple]]:
    x, index, pos = args["x"], args["index"], args["pos"]
    grad = torch.randn(*index.shape, *x.shape[2:], dtype=x.dtype)
    return [
        ("gather_tokens_fwd", (x, index, None)),
        ("gather_tokens_fwd", (x, index, pos)),
        ("gather_tokens_bwd", (grad, index, x.shape[1])),
    ]


_FLOATS = "float32, float16, bfloat16 or float64"


def _gather_bad_raw() -> list[BadRaw]:
    def tokens() -> Args:
        return {"x": torch.zeros(2, 9, 4), "index": torch.zeros(2, 5, dtype=torch.int64), "pos": None}

    def grads() -> Args:
        return {"grad_out": torch.zeros(2, 5, 4), "index": torch.zeros(2, 5, dtype=torch.int64), "num_tokens": 9}

    index, pos = "a contiguous int64 tensor [2, any]", "a contiguous float32 tensor [5, 4]"
    out_of_range = Bad("index", lambda a: {"index": a["index"] + 9}, expected="-1 or in [0, 9)", got="9", only="cpp")
    forward = [
        Bad("x", lambda a: {"x": a["x"][0]}, expected="[B, tokens, ..., C]"),
        Bad("x", lambda a: {"x": a["x"].to(torch.complex64)}, expected="floating, integer or bool"),
        Bad("x", lambda a: {"x": a["x"].long(), "pos": torch.zeros(5, 4).long()}, expected=_FLOATS),
        Bad("index", lambda a: {"index": a["index"].int()}, expected=index),
        Bad("index", lambda a: {"index": a["index"][:1]}, expected=index),
        Bad("index", lambda a: {"index": a["index"].repeat(1, 2)[:, ::2]}, expected=index),
        Bad("index", lambda a: {"index": a["index"][..., None]}, expected=index),
        *[
            Bad("pos", lambda a, shape=shape: {"pos": torch.zeros(shape)}, expected=pos)
            for shape in ((4, 4), (5, 3), (5, 4, 1))
        ],
        Bad("pos", lambda a: {"pos": torch.zeros(5, 4).half()}, expected=pos),
        Bad("pos", lambda a: {"pos": torch.zeros(4, 5).T}, expected=pos),
        out_of_range,
    ]
    backward = [
        Bad("grad_out", lambda a: {"grad_out": a["grad_out"][0]}, expected="[B, tokens, ..., C]"),
        Bad("grad_out", lambda a: {"grad_out": a["grad_out"].long()}, expected=_FLOATS),
        Bad("index", lambda a: {"index": a["index"][:1]}, expected="a contiguous int64 tensor [2, 5]"),
        Bad("index", lambda a: {"grad_out": a["grad_out"][:, :4]}, expected="a contiguous int64 tensor [2, 4]"),
        Bad("num_tokens", lambda a: {"num_tokens": -1}, expected="at least 0"),
        out_of_range,
    ]
    return [BadRaw("gather_tokens_fwd", tokens, forward), BadRaw("gather_tokens_bwd", grads, backward)]


OPS.append(
    OpCase(
        name="gather_tokens",
        function=hotkernels.gather_tokens,
        definition=_gather_definition,
        differentiable=("x", "pos"),
        inputs={
            "small": _gather(2, 7, 5, 2, 8, pos=True),
            "17": _gather(3, 17, 11, 5),
            "39": _gather(2, 39, 39, 17, pos=True),
            "243 frames of 17 joints": _gather(2, 243, 81, 17, 13, pos=True),
            "351 frames": _gather(1, 351, 117, 3, 5, pos=True),
            "1000, more places than tokens": _gather(2, 63, 1000, 19),
            "long rows": _gather(1, 17, 39, 1000, pos=True),
            "five dims": _gather(2, 9, 5, 2, 3, 7, pos=True),
            "M=1": _gather(2, 17, 1, 9, pos=True),
            "N=1": _gather(3, 1, 4, 9, pos=True),
            "C=1": _gather(2, 17, 5, 1, pos=True),
            "B=0": _gather(0, 17, 5, 8, pos=True),
            "M=0": _gather(2, 17, 0, 8, pos=True),
            "C=0": _gather(2, 17, 3, 0),
            "all absent": _gather(2, 17, 5, 8, pos=True, absent=1.0),
            "one token everywhere": lambda dtype: {
                "x": torch.randn(2, 17, 3, 8).to(dtype),
                "index": torch.full((2, 300), 16),
            },
            "int32 index, strided": lambda dtype: {
                "x": torch.randn(4, 17, 8).to(dtype),
                "index": random_slots((9, 4), 17).int().T,
            },
            "pos [1, M, C]": lambda dtype: {
                "x": torch.randn(2, 17, 3, 8).to(dtype),
                "index": random_slots((2, 9), 17),
                "pos": torch.randn(1, 9, 8).to(dtype),
            },
            **{f"x {layout}": _gather(3, 16, 9, 5, 8, pos=True, layout=layout) for layout in layouts(torch.zeros(1))},
        },
        raw=_gather_raw,
        bad_raw=_gather_bad_raw(),
        large={
            "117 frames of 17 joints": _gather(3, 117, 243, 17, 5),
            "9000 places": _gather(2, 9, 9000, 5, pos=True),
        },
        tiny=lambda n, C: {"x": torch.randn(n, 3, C), "index": torch.randint(-1, 3, (n, 2))},
        index=("index", lambda a: a["x"].shape[1]),
        bad=[
            Bad("x", lambda a: {"x": a["x"][0, 0]}),
            Bad("x", lambda a: {"x": "tokens"}, TypeError),
            Bad("index", lambda a: {"index": [[0]]}, TypeError),
            Bad("index", lambda a: {"index": a["index"].float()}, TypeError),
            Bad("index", lambda a: {"index": a["index"][0]}),
            Bad("index", lambda a: {"index": a["index"][:1]}),
            Bad("index", lambda a: {"index": torch.full_like(a["index"], 7)}),
            Bad("index", lambda a: {"index": torch.full_like(a["index"], -2)}),
            Bad("index", lambda a: {"index": torch.full_like(a["index"], 1 << 62)}),
            Bad("index", lambda a: {"index": a["index"].to("meta")}),
            Bad("pos", lambda a: {"pos": a["pos"].long()}, TypeError),
            Bad("pos", lambda a: {"pos": a["pos"][:-1]}),
            Bad("pos", lambda a: {"pos": a["pos"][:, :1]}),
            Bad("pos", lambda a: {"pos": a["pos"][None, :1]}),
            Bad("pos", lambda a: {"pos": a["pos"][None, :, :1]}),
            Bad("pos", lambda a: {"pos": a["pos"][None].expand(2, -1, -1)}),
            Bad("pos", lambda a: {"pos": a["pos"].to("meta")}),
            Bad("pos", lambda a: {"x": a["x"].long()}),
            Bad("backend", lambda a: {"backend": "fpga"}),
        ],
    )
)


# ---- merge_tokens ----------------------------------------------------------------------------------------------------


def _merge(
    B: int,
    N: int,
    M: int,
    C: int,
    weight: bool = False,
    absent: float = 0.1,
    eps: float = 1e-6,
    layout: str | None = None,
) -> Make:
    def make(dtype: torch.dtype) -> Args:
        x = torch.randn(B, N, C).to(dtype)
        args: Args = {
            "x": layouts(x)[layout] if layout else x,
            "assignment": random_slots((B, N), M, absent),
            "num_clusters": M,
            "eps": eps,
        }
        if weight:
            args["weight"] = (0.1 + torch.rand(B, N)).to(dtype)
        return args

    return make


def _merge_definition(
    x: Tensor, assignment: Tensor, num_clusters: int, weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    member = (assignment[..., None] == torch.arange(num_clusters)).to(x)
    if weight is not None:
        member = member * weight.reshape(*assignment.shape, 1)
    total = member.sum(1)[..., None] + eps
    return member.mT @ x / torch.where(total == 0, 1.0, total)


def _merge_raw(args: Args) -> list[tuple[str, tuple]]:
    x, assignment, M, weight = args["x"], args["assignment"], args["num_clusters"], args["weight"]
    out, total, _ = torch.ops.hotkernels.merge_tokens_fwd(x, assignment, M, weight, 1e-6, False)
    return [
        ("merge_tokens_fwd", (x, assignment, M, None, 1e-6, False)),
        ("merge_tokens_fwd", (x, assignment, M, weight, 1e-6, True)),
        ("merge_tokens_fwd", (x.half(), assignment, M, weight.half(), 1e-6, True)),
        ("merge_tokens_bwd", (torch.randn_like(out), None, total, x, assignment, None, False)),
        ("merge_tokens_bwd", (torch.randn_like(out), out, total, x, assignment, weight, True)),
    ]


def _merge_bad_raw() -> list[BadRaw]:
    def tokens() -> Args:
        given = {"x": torch.zeros(2, 9, 4), "assignment": torch.zeros(2, 9, dtype=torch.int64), "num_clusters": 3}
        return {**given, "weight": None, "eps": 0.0, "need_mean": False}

    def grads() -> Args:
        means = {"grad_out": torch.zeros(2, 3, 4), "mean": torch.zeros(2, 3, 4), "total": torch.ones(2, 3)}
        given = {"x": torch.zeros(2, 9, 4), "assignment": torch.zeros(2, 9, dtype=torch.int64)}
        return {**means, **given, "weight": None, "need_weight": True}

    assignment, weight = "a contiguous int64 tensor [2, 9]", "a contiguous float32 tensor [2, 9]"
    mean, total = "a contiguous float32 tensor [2, 3, 4]", "a contiguous float32 tensor [2, 3]"
    out_of_range = [
        Bad(
            "assignment",
            lambda a, n=n: {"assignment": a["assignment"] + n},
            expected="-1 or in [0, 3)",
            got=str(n),
            only="cpp",
        )
        for n in (3, -2)
    ]
    forward = [
        Bad("x", lambda a: {"x": a["x"][0]}, expected="[B, N, C]"),
        Bad("x", lambda a: {"x": a["x"].long()}, expected=_FLOATS),
        Bad("num_clusters", lambda a: {"num_clusters": 0}, expected="at least 1"),
        Bad("assignment", lambda a: {"assignment": a["assignment"][:1]}, expected=assignment),
        Bad("assignment", lambda a: {"assignment": a["assignment"].int()}, expected=assignment),
        Bad("assignment", lambda a: {"assignment": a["assignment"].repeat(1, 2)[:, ::2]}, expected=assignment),
        Bad("assignment", lambda a: {"assignment": a["assignment"][..., None]}, expected=assignment),
        Bad("weight", lambda a: {"weight": torch.ones(2, 8)}, expected=weight),
        Bad("weight", lambda a: {"weight": torch.ones(2, 9).double()}, expected=weight),
        *out_of_range,
    ]
    backward = [
        Bad("grad_out", lambda a: {"grad_out": a["grad_out"][:, :2]}, expected=mean),
        Bad("mean", lambda a: {"mean": a["mean"][..., :3].contiguous()}, expected=mean),
        Bad("mean", lambda a: {"mean": a["mean"][0]}, expected=mean),
        Bad("mean", lambda a: {"mean": None}, expected="given, for the gradient of weight", got="None"),
        Bad("mean", lambda a: {"mean": a["mean"].double()}, expected=mean),
        Bad("total", lambda a: {"total": a["total"][:1]}, expected=total),
        Bad("total", lambda a: {"total": a["total"][..., None]}, expected="[B, M]"),
        Bad("total", lambda a: {"total": a["total"].repeat(1, 2)[:, ::2]}, expected=total),
        Bad("total", lambda a: {"total": a["total"].double()}, expected=total),
        *out_of_range,
    ]
    return [BadRaw("merge_tokens_fwd", tokens, forward), BadRaw("merge_tokens_bwd", grads, backward)]


OPS.append(
    OpCase(
        name="merge_tokens",
        function=hotkernels.merge_tokens,
        definition=_merge_definition,
        differentiable=("x", "weight"),
        inputs={
            "small": _merge(2, 9, 4, 8, weight=True),
            "17": _merge(3, 17, 5, 7),
            "39": _merge(2, 39, 13, 17, weight=True),
            "81": _merge(2, 81, 63, 63, weight=True, eps=0.0),
            "243": _merge(2, 243, 81, 39, weight=True),
            "351, more clusters than tokens": _merge(1, 351, 1000, 9, weight=True),
            "1000, several channel blocks": _merge(2, 1000, 117, 300, weight=True),
            "M=1": _merge(2, 17, 1, 9, weight=True),
            "M=N, a cluster each": lambda dtype: {
                "x": torch.randn(2, 17, 9).to(dtype),
                "assignment": torch.stack([torch.randperm(17), torch.randperm(17)]),
                "num_clusters": 17,
            },
            # Without a large eps, the gradient of a lone token's weight is nothing but rounding.
            "N=1": _merge(3, 1, 4, 9, weight=True, eps=0.75),
            "C=1": _merge(2, 17, 5, 1, weight=True),
            "B=0": _merge(0, 17, 5, 8, weight=True),
            "N=0": _merge(2, 0, 5, 8, weight=True),
            "C=0": _merge(2, 17, 5, 0),
            "nothing assigned": _merge(2, 17, 5, 8, weight=True, absent=1.0),
            "nothing assigned, eps=0": _merge(2, 17, 5, 8, weight=True, absent=1.0, eps=0.0),
            "large eps": _merge(2, 17, 5, 8, weight=True, eps=0.75),
            "one cluster takes all": lambda dtype: {
                "x": torch.randn(2, 243, 9).to(dtype),
                "assignment": torch.full((2, 243), 3, dtype=torch.int32),
                "num_clusters": 5,
            },
            "weight [B, N, 1], strided int32 assignment": lambda dtype: {
                "x": torch.randn(4, 17, 8).to(dtype),
                "assignment": random_slots((17, 4), 2).int().T,
                "num_clusters": 2,
                "weight": (0.1 + torch.rand(17, 4, 1)).to(dtype).transpose(0, 1),
            },
            **{f"x {layout}": _merge(3, 16, 5, 8, weight=True, layout=layout) for layout in layouts(torch.zeros(1))},
        },
        raw=_merge_raw,
        bad_raw=_merge_bad_raw(),
        large={
            "351, several channel blocks": _merge(2, 351, 81, 300, weight=True),
            "9000 tokens": _merge(2, 9000, 9, 5, weight=True),
        },
        tiny=lambda n, C: {
            "x": torch.randn(n, 5, C),
            "assignment": torch.randint(-1, 3, (n, 5)),
            "num_clusters": 3,
        },
        index=("assignment", lambda a: a["num_clusters"]),
        bad=[
            Bad("x", lambda a: {"x": a["x"][0]}),
            Bad("x", lambda a: {"x": a["x"].long()}, TypeError),
            Bad("x", lambda a: {"x": None}, TypeError),
            Bad("assignment", lambda a: {"assignment": a["assignment"].float()}, TypeError),
            Bad("assignment", lambda a: {"assignment": a["assignment"][:, :-1]}),
            Bad("assignment", lambda a: {"assignment": a["assignment"][:1]}),
            Bad("assignment", lambda a: {"assignment": torch.full_like(a["assignment"], 4)}),
            Bad("assignment", lambda a: {"assignment": torch.full_like(a["assignment"], -2)}),
            Bad("assignment", lambda a: {"assignment": a["assignment"].to("meta")}),
            Bad("num_clusters", lambda a: {"num_clusters": 0}),
            Bad("num_clusters", lambda a: {"num_clusters": 2.0}, TypeError),
            Bad("num_clusters", lambda a: {"num_clusters": 2**63}),
            Bad("weight", lambda a: {"weight": a["weight"].long()}, TypeError),
            Bad("weight", lambda a: {"weight": a["weight"][:, :-1]}),
            Bad("weight", lambda a: {"weight": a["weight"][:1]}),
            Bad("weight", lambda a: {"weight": a["weight"][:1, :, None]}),
            Bad("weight", lambda a: {"weight": a["weight"][:, :1, None]}),
            Bad("weight", lambda a: {"weight": a["weight"][..., None].expand(-1, -1, 2)}),
            Bad("weight", lambda a: {"weight": a["weight"].mT}),
            Bad("weight", lambda a: {"weight": a["weight"].to("meta")}),
            Bad("eps", lambda a: {"eps": None}, TypeError),
            Bad("eps", lambda a: {"eps": torch.tensor(1e-6)}, TypeError),
            Bad("eps", lambda a: {"eps": torch.nan}),
            Bad("eps", lambda a: {"eps": 10**400}),
            Bad("backend", lambda a: {"backend": "fpga"}),
        ],
    )
)


# ---- dpc_knn ---------------------------------------------------------------------------------------------------------


def cloud(B: int, N: int, C: int) -> Tensor:
    """Independent tokens around a common offset: everyone is about as far from everyone."""
    return 3 + torch.randn(B, N, C)


def motion(B: int, N: int, C: int) -> Tensor:
    """A smooth random walk: the tokens of one body over time, where neighbours in time are neighbours in space."""
    return torch.nn.functional.layer_norm(torch.randn(B, N, C).cumsum(1), (C,))


def hard_sample(N: int, C: int) -> Args:
    """Copies, NaN, a mask, noise and `keep`, as far as N tokens have room for them."""
    x, mask = motion(3, N, C), torch.rand(3, N) < 0.9
    x[0, N // 2 :] = x[0, : N - N // 2].clone()
    x[1, N // 3] = torch.nan
    mask[2] = True
    M = (N + 2) // 3
    keep = [N - 1, -1, 0, N - 1][:M]
    return {"x": x, "num_clusters": M, "k": min(5, N), "mask": mask, "noise": torch.rand(3, N) * 1e-6, "keep": keep}


def _peaks(
    B: int, N: int, C: int, M: int, k: int = 5, data: Callable[..., Tensor] = cloud, **extra: Callable[[], Any]
) -> Make:
    return lambda dtype: {
        "x": data(B, N, C).to(dtype),
        "num_clusters": M,
        "k": k,
        **{name: value() for name, value in extra.items()},
    }


def _peaks_with_gaps(dtype: torch.dtype) -> Args:
    x = cloud(2, 63, 9)
    x[0, 3, 4], x[0, 17, 0], x[1, 0, 8] = torch.nan, torch.inf, -torch.inf
    x[0, 20:24] = x[0, 24:28]
    return {"x": x.to(dtype), "num_clusters": 21, "k": 3, "mask": torch.rand(2, 63) < 0.8}


def _peaks_with_ties(B: int, N: int, M: int, data: Callable[..., Tensor]) -> Make:
    """Copies of tokens, and positions to keep. For few clusters, most tokens search twice."""

    def make(dtype: torch.dtype) -> Args:
        x = data(B, N, 19).to(dtype)
        x[:, N // 2 :: 3] = x[:, : len(range(N // 2, N, 3))]  # ties, which an order of arrival would decide
        return {"x": x, "num_clusters": M, "k": 2, "keep": torch.randint(-1, N, (B, 4))}

    return make


def _peaks_bad_raw() -> list[BadRaw]:
    def good() -> Args:
        options = {"mask": None, "keep": None, "noise": None, "seed": 0, "assign": True, "ordered": False}
        return {"x": torch.randn(2, 9, 4), "num_clusters": 4, "k": 3, **options}

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bool)

    def places(*shape: int, at: int = 0) -> Tensor:
        return torch.full(shape, at)

    wrong: dict[str, list[Callable[[], Any]]] = {
        "x": [
            lambda: torch.randn(9, 4),
            lambda: torch.randn(1, 2, 9, 4),
            lambda: torch.randn(2, 9, 4).double(),
            lambda: torch.randn(2, 9, 4).long(),
            lambda: torch.randn(2, 0, 4),
            lambda: torch.randn(2, 9, 0),
            lambda: torch.randn(1, 1, 1).expand(1, 1 << 31, 1),
        ],
        "num_clusters": [lambda: -1, lambda: 0, lambda: 10],
        "k": [lambda: -1, lambda: 0, lambda: 10],
        "mask": [
            lambda: ones(2, 9).float(),
            lambda: ones(1, 9),
            lambda: ones(2, 8),
            lambda: ones(9),
            lambda: ones(2, 9, 1),
            lambda: ones(9, 2).T,
        ],
        "noise": [
            lambda: torch.ones(2, 9).double(),
            lambda: torch.ones(2, 8),
            lambda: torch.ones(1, 9),
            lambda: torch.ones(9, 2).T,
        ],
        "keep": [
            lambda: places(2),
            lambda: places(2, 2).int(),
            lambda: places(3, 1),
            lambda: places(1, 5),
            lambda: places(2, 4)[:, ::2],
        ],
    }
    bad = [Bad(name, lambda a, n=name, make=make: {n: make()}) for name, makers in wrong.items() for make in makers]
    out_of_range: list[tuple[Callable[[], Tensor], str]] = [
        (lambda: places(2, 2, at=9), "9"),
        (lambda: places(2, 2, at=-2), "-2"),
        (lambda: torch.tensor([[0], [9]]), "9"),
    ]
    bad += [
        Bad("keep", lambda a, make=make: {"keep": make()}, expected="-1 or in [0, 9)", got=got, only="cpp")
        for make, got in out_of_range
    ]
    return [BadRaw("dpc_knn_fwd", good, bad)]


OPS.append(
    OpCase(
        name="dpc_knn",
        function=hotkernels.dpc_knn,
        check=check_dpc_knn,
        inputs={
            "small": _peaks(
                *(2, 9, 5, 4, 3),
                mask=lambda: torch.rand(2, 9) < 0.8,
                noise=lambda: torch.rand(2, 9) * 1e-6,
                keep=lambda: torch.tensor([[5, -1], [0, 8]]),
            ),
            "9": _peaks(2, 9, 5, 4, 3),
            "17": _peaks(3, 17, 7, 5),
            "39, one token each": _peaks(2, 39, 3, 39),
            "63 with gaps": _peaks_with_gaps,
            "81 smooth": _peaks(2, 81, 17, 27, 2, motion),
            "117": _peaks(2, 117, 39, 39, 9),
            "243 smooth": _peaks(2, 243, 130, 81, 2, motion),
            "243 noise": _peaks(2, 243, 64, 81, 2, motion, noise=lambda: torch.rand(2, 243) * 1e-6),
            "243 large noise": _peaks(2, 243, 64, 81, noise=lambda: torch.randn(2, 243)),
            "351 keep": _peaks(2, 351, 33, 117, 5, motion, keep=lambda: [175, 0, 175]),
            "385": _peaks(1, 385, 9, 77),
            "817, the first with lists": _peaks(1, 817, 9, 163),
            "1000": _peaks(1, 1000, 16, 333),
            "1000 smooth": _peaks(2, 1000, 17, 250, 2, motion, noise=lambda: torch.rand(2, 1000) * 1e-6),
            "1000 masked": _peaks(2, 1000, 8, 63, mask=lambda: torch.rand(2, 1000) < 0.7, ordered=lambda: True),
            "1000 keep": _peaks(2, 1000, 8, 63, keep=lambda: torch.tensor([[-1, 999, 5], [5, 5, 0]])),
            "M=1": _peaks(2, 63, 5, 1),
            "M=1 of many, with lists": _peaks(1, 500, 5, 1, 17),
            "N=1": _peaks(2, 1, 5, 1, 1),
            "C=1": _peaks(2, 39, 1, 13),
            "k=1": _peaks(2, 39, 5, 13, 1),
            "k=N": _peaks(2, 39, 5, 13, 39),
            "k=20, few valid": _peaks(3, 39, 5, 13, 20, mask=lambda: torch.arange(39) < torch.tensor([[0], [1], [5]])),
            "k=N with lists, some masked": _peaks(1, 450, 5, 13, 450, mask=lambda: torch.rand(1, 450) < 0.95),
            "B=0": _peaks(0, 17, 5, 4),
            "39 around 0, masked": _peaks(2, 39, 5, 13, data=torch.randn, mask=lambda: torch.rand(2, 39) < 0.7),
            "no place left": _peaks(2, 39, 5, 1, keep=lambda: [-1]),
            "nothing valid": _peaks(2, 39, 5, 13, mask=lambda: torch.zeros(2, 39, dtype=torch.bool)),
            "only keep": _peaks(2, 39, 5, 3, keep=lambda: [38, 1, 7]),
            "no assignment": _peaks(2, 39, 5, 13, assign=lambda: False, seed=lambda: -(2**63)),
        },
        raw=lambda a: [
            ("dpc_knn_fwd", (a["x"], 4, 3, None, None, None, 0, True, False)),
            (
                "dpc_knn_fwd",
                (a["x"], 4, 3, a["x"][..., 0] < 9, torch.tensor([[1]]), a["x"][..., 0] * 0, 1, False, True),
            ),
        ],
        bad_raw=_peaks_bad_raw(),
        large={
            f"{B} x {N} to {M}, {data.__name__}": _peaks_with_ties(B, N, M, data)
            for B, N, M in ((2, 63, 9), (1, 243, 81), (1, 700, 233), (2, 840, 7), (3, 1153, 384))
            for data in (motion, cloud)
        },
        tiny=lambda n, C: {"x": torch.randn(n, 9, C), "num_clusters": 3, "k": 2},
        index=("keep", lambda a: a["x"].shape[1]),
        bad=[
            Bad("x", lambda a: {"x": a["x"][0]}),
            Bad("x", lambda a: {"x": a["x"][None]}),
            Bad("x", lambda a: {"x": a["x"].long()}, TypeError),
            Bad("x", lambda a: {"x": a["x"].tolist()}, TypeError),
            Bad("x", lambda a: {"x": a["x"][:, :0]}),
            Bad("x", lambda a: {"x": a["x"][:, :, :0]}),
            Bad("num_clusters", lambda a: {"num_clusters": 0}),
            Bad("num_clusters", lambda a: {"num_clusters": 10}),
            Bad("num_clusters", lambda a: {"num_clusters": 4.0}, TypeError),
            Bad("num_clusters", lambda a: {"num_clusters": True}, TypeError),
            Bad("k", lambda a: {"k": 0}),
            Bad("k", lambda a: {"k": 10}),
            Bad("k", lambda a: {"k": None}, TypeError),
            Bad("assign", lambda a: {"assign": "no"}, TypeError),
            Bad("ordered", lambda a: {"ordered": 1}, TypeError),
            Bad("seed", lambda a: {"seed": 2**63}),
            Bad("seed", lambda a: {"seed": -(2**63) - 1}),
            Bad("seed", lambda a: {"seed": 0.5}, TypeError),
            Bad("mask", lambda a: {"mask": torch.ones(2, 8, dtype=torch.bool)}),
            Bad("mask", lambda a: {"mask": torch.ones(1, 9, dtype=torch.bool)}),
            Bad("mask", lambda a: {"mask": torch.ones(2, 9)}, TypeError),
            Bad("mask", lambda a: {"mask": torch.ones(2, 9, dtype=torch.bool, device="meta")}),
            Bad("noise", lambda a: {"noise": torch.rand(2, 9, 1)}),
            Bad("noise", lambda a: {"noise": torch.rand(1, 9)}),
            Bad("noise", lambda a: {"noise": torch.ones(2, 9, dtype=torch.int64)}, TypeError),
            Bad("noise", lambda a: {"noise": torch.rand(2, 9, device="meta")}),
            Bad("keep", lambda a: {"keep": 9}),
            Bad("keep", lambda a: {"keep": [0, -2]}),
            Bad("keep", lambda a: {"keep": [0, 9]}),
            Bad("keep", lambda a: {"keep": [0.5]}, TypeError),
            Bad("keep", lambda a: {"keep": 0.5}, TypeError),
            Bad("keep", lambda a: {"keep": b"\x01"}, TypeError),
            Bad("keep", lambda a: {"keep": [0, 1, 2, 3, 4]}),
            Bad("keep", lambda a: {"keep": torch.tensor([0, 9])}),
            Bad("keep", lambda a: {"keep": torch.tensor([[0], [1], [2]])}),
            Bad("keep", lambda a: {"keep": torch.tensor(3)}),
            Bad("keep", lambda a: {"keep": torch.zeros(1, 1, 1, dtype=torch.int64)}),
            Bad("keep", lambda a: {"keep": torch.tensor([0.0])}, TypeError),
            Bad("keep", lambda a: {"keep": torch.tensor([0], device="meta")}),
            Bad("backend", lambda a: {"backend": "fpga"}),
        ],
    )
)
