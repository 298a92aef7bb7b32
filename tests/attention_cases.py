"""The attention ops' entries in the registry of cases.py, and their definition."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cases import OPS, Args, Bad, BadRaw, Make, OpCase, layouts, random_slots
from torch import Tensor

import hotkernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SLOTS = 300 if INTERPRETED else 1000  # of a set: many blocks of them


def queries(kind: str, Nq: int, few: int = 5) -> int:
    """Nq; but a few in Triton's interpreter where each query has slots of its own, so a program of milliseconds.

    More of them repeat it. The name of a case tells Nq, or 1000 SLOTS, all the same.
    """
    return few if INTERPRETED and kind in ("query", "head") else Nq


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) by way of all Nq x Nk logits, in the dtype of the arguments."""
    logits = (query.shape[-1] ** -0.5 if scale is None else scale) * (query @ key.mT)
    logits = logits.expand(torch.broadcast_shapes(logits.shape, (*value.shape[:-2], 1, 1)))
    if key_bias is not None:
        logits = logits + key_bias[..., None, None, :]
    batch = logits.dim() - 3
    slots = torch.arange(key.shape[-2]) if index is None else index.long()
    if slots.dim() == 2:
        slots = slots.reshape(len(slots), *[1] * (batch + 1), slots.shape[-1])
    elif slots.dim() == batch + 2:
        slots = slots.unsqueeze(-3)
    slots = slots.expand(*logits.shape[:-1], -1)
    there = slots >= 0
    slots = slots.clamp(min=0)
    picked = logits.gather(-1, slots)
    if bias is not None:
        picked = picked + bias
    picked = picked.masked_fill(~there, -torch.inf)
    empty = (picked == -torch.inf).all(-1, keepdim=True)
    weights = picked.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    out = torch.zeros_like(logits).scatter_add(-1, slots, weights) @ value
    return out, picked.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)


def index_of(kind: str, batch: tuple[int, ...], H: int, Nq: int, Nk: int, S: int, absent: float = 0.2) -> Tensor | None:
    """An index of S slots: one set per sample, per query, per head and query, or none for "dense"."""
    shapes = {"set": (batch[0], S), "query": (*batch, Nq, S), "head": (*batch, H, Nq, S)}
    return None if kind == "dense" else random_slots(shapes[kind], Nk, absent)


KINDS = ("dense", "set", "query", "head")
each_kind = pytest.mark.parametrize("kind", KINDS)


def heads(*batch: int, H: int = 2, Nq: int = 17, Nk: int = 9, D: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(*batch, H, N, D) for N in (Nq, Nk, Nk))
    return query, key, value


def _attention(
    batch: tuple[int, ...],
    H: int,
    Nq: int,
    Nk: int,
    D: int,
    kind: str = "dense",
    S: int = 0,
    *,
    bias: tuple[int, ...] | None = None,
    key_bias: tuple[int, ...] | None = None,
    masked: float = 0.0,
    absent: float = 0.2,
    int32: bool = False,
    layout: str | None = None,
    **extra: Any,
) -> Make:
    """`bias` is its shape, `key_bias` that of its batch; `masked` of the keys have the key_bias -inf."""

    def make(dtype: torch.dtype) -> Args:
        query, key, value = (torch.randn(*batch, H, N, D).to(dtype) for N in (Nq, Nk, Nk))
        if layout:
            query, key, value = (layouts(t)[layout] for t in (query, key, value))
        args: Args = {"query": query, "key": key, "value": value, **extra}
        index = index_of(kind, batch, H, Nq, Nk, S, absent)
        if index is not None:
            args["index"] = index.int() if int32 else index
        if bias is not None:
            args["bias"] = torch.randn(bias).to(dtype)
        if key_bias is not None:
            shape = (*key_bias, Nk)
            args["key_bias"] = torch.randn(shape).masked_fill(torch.rand(shape) < masked, -torch.inf).to(dtype)
        return args

    return make


def _qkv(dtype: torch.dtype) -> Args:
    query, key, value = torch.randn(3, 63, 3, 2, 16).to(dtype).permute(2, 0, 3, 1, 4)
    return {"query": query, "key": key, "value": value}


def _along_frames(dtype: torch.dtype) -> Args:
    query, key, value = (
        torch.randn(2, 27, 5, 2 * 16).to(dtype).unflatten(-1, (2, 16)).permute(0, 2, 3, 1, 4) for _ in range(3)
    )
    return {"query": query, "key": key, "value": value, "index": random_slots((2, 13), 27)}


def _broadcast(dtype: torch.dtype) -> Args:
    return {
        "query": torch.randn(1, 1, 2, 17, 8).to(dtype),
        "key": torch.randn(3, 1, 2, 9, 8).to(dtype),
        "value": torch.randn(1, 2, 2, 9, 8).to(dtype),
        "index": random_slots((1, 11), 9),
        "key_bias": torch.randn(1, 2, 9).to(dtype),
    }


def _for_all_samples(name: str) -> Make:
    """Of one head, so that a kernel which keeps what it packed meets the same tensor beside another one at once."""

    def make(dtype: torch.dtype) -> Args:
        batch = {"query": 3, "key": 3, "value": 3, name: 1}
        return {n: torch.randn(batch[n], 1, N, 7).to(dtype) for n, N in (("query", 17), ("key", 9), ("value", 9))}

    return make


def _keys_of_all_samples(
    dtype: torch.dtype, B: int, J: tuple[int, ...], Nq: int, sets: tuple[int, int] | None = None, **options: Any
) -> Args:
    """A set per sample, or `sets`, of keys that are there once for all samples."""
    query, key, value = (torch.randn(b, *j, 2, N, 16) for b, j, N in ((B, J, Nq), (1, J, 40), (1, (1,) * len(J), 40)))
    tokens = {name: t.to(dtype) for name, t in (("query", query), ("key", key), ("value", value))}
    return {**tokens, "index": random_slots(sets or (B, 11), 40), **options}


def _stride_zero(kind: str) -> Make:
    Nq = queries(kind, 63, 6)

    def make(dtype: torch.dtype) -> Args:
        return {
            "query": torch.randn(1, 2, Nq, 16).to(dtype).expand(3, -1, -1, -1),
            "key": torch.randn(1, 1, 9, 16).to(dtype).expand(3, 2, -1, -1),
            "value": torch.randn(1, 1, 9, 16).to(dtype).expand(3, 2, -1, -1),
            **({} if kind == "dense" else {"index": index_of(kind, (3,), 2, Nq, 9, 5)}),
        }

    return make


def _gathered_raw(args: Args) -> list[tuple[str, tuple]]:
    q, k, v, bias = args["query"], args["key"], args["value"], args["bias"]
    B, H, Nq = q.shape[:3]
    Nk = k.shape[2]
    calls: list[tuple[str, tuple]] = []
    for kind in KINDS:
        index = index_of(kind, (B,), H, Nq, Nk, 4)
        rows = None if index is None else index if kind == "set" else index.flatten(-2)
        inverse = (None, None) if rows is None else torch.ops.hotkernels.invert_index(rows, Nk)
        b = torch.randn(1, H, Nq, Nk) if kind == "dense" else bias
        out, lse = torch.ops.hotkernels.gathered_attention_fwd(q, k, v, index, b, args["key_bias"], 0.3)
        calls += [
            ("gathered_attention_fwd", (q, k, v, index, None, None, 0.3)),
            ("gathered_attention_fwd", (q, k, v, index, b, args["key_bias"], 0.3)),
        ]
        for grad_lse, need in ((None, False), (torch.randn_like(lse), True)):
            backward = (q, k, v, out, lse, index, *inverse, b, args["key_bias"], 0.3, need, need)
            calls.append(("gathered_attention_bwd", (torch.randn_like(out), grad_lse, *backward)))
        if kind == "set":  # gradients of slots, those of absent ones unspecified
            backward = (q, k, v, out, lse, index.clamp(min=0), None, None, b, args["key_bias"], 0.3, True, False)
            calls.append(("gathered_attention_bwd", (torch.randn_like(out), None, *backward)))
    q, k, v = torch.randn(3, 2, 2, 5, 8).half().unbind(0)
    b = torch.randn(1, 2, 5, 5)
    out, lse = torch.ops.hotkernels.gathered_attention_fwd(q, k, v, None, b, None, 0.3)
    backward = (q, k, v, out, lse, None, None, None, b, None, 0.3, True, False)
    calls.append(("gathered_attention_bwd", (torch.randn_like(out), None, *backward)))
    for batch in ((2,), (2, 3)):
        q, k, v = torch.randn(3, *batch, 2, 5, 8).unbind(0)
        out, lse = torch.ops.hotkernels.gathered_attention_fwd(q, k, v, None, None, None, 0.3)
        calls.append(("gathered_attention_packed_bwd", (torch.randn_like(out), q, k, v, out, lse, 0.3)))
    for shape in ((1, 1, 2, 5, 5), (1, 3, 2, 5, 5), (2, 1, 2, 5, 5)):  # q, k, v have two batch dims
        backward = (q, k, v, out, lse, None, None, None, torch.randn(shape), None, 0.3, True, False)
        calls.append(("gathered_attention_bwd", (torch.randn_like(out), None, *backward)))
    return calls


def _gathered_good() -> Args:
    query, key, value = (torch.randn(2, 3, 2, N, 16) for N in (17, 9, 9))
    options = {"index": random_slots((2, 3, 2, 17, 5), 9), "bias": torch.zeros(2, 3, 2, 17, 5)}
    return {"query": query, "key": key, "value": value, **options, "key_bias": torch.zeros(2, 3, 9), "scale": 0.3}


def _gathered_good_backward() -> Args:
    args = _gathered_good()
    out, lse = torch.ops.hotkernels.gathered_attention_fwd(*args.values())
    start, slots = torch.ops.hotkernels.invert_index(args["index"].flatten(-2), 9)
    tokens = {name: args[name] for name in ("query", "key", "value")}
    inverted = {"index": args["index"], "start": start, "slots": slots}
    biases = {name: args[name] for name in ("bias", "key_bias", "scale")}
    needs = {"need_bias": True, "need_key_bias": True}
    return {"grad_out": out, "grad_lse": lse, **tokens, "out": out, "lse": lse, **inverted, **biases, **needs}


def _gathered_good_packed() -> Args:
    tokens = {name: torch.randn(2, 3, 2, 9, 16) for name in ("query", "key", "value")}
    out, lse = torch.ops.hotkernels.gathered_attention_fwd(*tokens.values(), None, None, None, 0.3)
    return {"grad_out": out, **tokens, "out": out, "lse": lse, "scale": 0.3}


def _backward_bad() -> list[Bad]:
    """Wrong saved tensors that the backward of both attention ops refuses."""
    return [
        *[
            Bad(name, lambda a, name=name, change=change: {name: change(a[name])})
            for name in ("grad_out", "out")
            for change in (lambda t: t[:1], lambda t: t[..., 1:], lambda t: t[..., 1:, :], lambda t: t[None])
        ],
        *[Bad(name, lambda a, name=name: {name: a[name][0, 0]}) for name in ("grad_out", "out")],
        *[
            Bad("out and grad_out", lambda a, names=names: {name: a[name].half() for name in names})
            for names in (("grad_out",), ("out",), ("grad_out", "out"))
        ],
        Bad("out", lambda a: {"out": a["out"].mT.contiguous().mT}),
        Bad("lse", lambda a: {"lse": a["lse"][:1]}),
        Bad("lse", lambda a: {"lse": torch.cat([a["lse"]] * 2)}),
        Bad("lse", lambda a: {"lse": a["lse"].double()}),
        Bad("lse", lambda a: {"lse": a["lse"].mT.contiguous().mT}),
    ]


def _gathered_bad_raw() -> list[BadRaw]:
    tokens = ("query", "key", "value")
    blamed = {  # where an argument has one dim twice as long
        "query": ["query", "query", "query", "index", "query"],
        "key": ["query", "query", "query", "value", "query"],
        "value": ["value"] * 5,
        "index": ["index"] * 4 + ["bias"],
        "bias": ["bias"] * 5,
        "key_bias": ["key_bias"] * 3,
    }
    forward = [
        *[
            Bad(arg, lambda a, name=name, dim=dim: {name: torch.cat([a[name]] * 2, dim)})
            for name, args in blamed.items()
            for dim, arg in enumerate(args)
        ],
        *[Bad(name, lambda a, name=name: {name: a[name][None]}) for name in blamed],
        Bad("value", lambda a: {"value": a["value"][0, 0]}),
        *[Bad(name, lambda a, name=name: {name: a[name].double()}) for name in ("bias", "key_bias")],
        *[Bad("key and value", lambda a, name=name: {name: a[name].double()}) for name in ("key", "value")],
        Bad("query", lambda a: {"query": a["query"][..., :0, :]}),
        Bad("key", lambda a: {name: a[name][..., :0, :] for name in ("key", "value")}),
        Bad("query", lambda a: {name: a[name].int() for name in tokens}),
        Bad("query", lambda a: {name: a[name][..., :0] for name in tokens}),
        Bad("query", lambda a: {name: torch.nn.functional.pad(a[name], (0, 241)) for name in tokens}),
        Bad("index", lambda a: {"index": a["index"].int()}),
        Bad("index", lambda a: {"index": a["index"].mT.contiguous().mT}),
        Bad("index", lambda a: {"index": a["index"][..., :0]}),
        Bad("index", lambda a: {"index": a["index"][..., :1, :].contiguous()}),
        Bad("index", lambda a: {"index": torch.full_like(a["index"], 9)}, expected="-1 or in [0, 9)", got="9"),
        Bad("index", lambda a: {"index": torch.full_like(a["index"], -2)}, expected="-1 or in [0, 9)", got="-2"),
        Bad("key_bias", lambda a: {"key_bias": a["key_bias"][..., :1]}),
    ]
    backward = [
        *_backward_bad(),
        Bad("grad_lse", lambda a: {"grad_lse": a["grad_lse"][:1]}),
        Bad("grad_lse", lambda a: {"grad_lse": torch.cat([a["grad_lse"]] * 2)}),
        Bad("grad_lse", lambda a: {"grad_lse": a["grad_lse"].double()}),
        Bad("start and slots", lambda a: {"index": a["index"][:, 0, 0, 0].clone(), "start": None, "slots": None}),
        Bad("query", lambda a: {"query": a["query"][0, 0]}),  # shared, where the index is per query
        Bad("index", lambda a: {"index": torch.full_like(a["index"], 9)}, expected="-1 or in [0, 9)", got="9"),
    ]
    packed = [
        *_backward_bad(),
        Bad("query", lambda a: {"query": a["query"][0, 0]}, expected="[B, (J,) H, N, D] of key's shape"),
        *[
            Bad("query", lambda a, t=t: {"query": t, "key": t}, expected="[B, (J,) H, N, D] of key's shape")
            for t in (torch.zeros(()), torch.zeros(8))
        ],
        Bad("query", lambda a: {"query": torch.cat([a["query"]] * 2, -2)}, expected="[B, (J,) H, N, D] of key's shape"),
    ]
    return [
        BadRaw("gathered_attention_fwd", _gathered_good, forward),
        BadRaw("gathered_attention_bwd", _gathered_good_backward, backward),
        BadRaw("gathered_attention_packed_bwd", _gathered_good_packed, packed),
    ]


def _heads_bad() -> list[Bad]:
    """Wrong calls that both attention ops refuse; query, key, value are [2, 2, N, 5] (query may lack the batch)."""
    wide = {name: lambda a, name=name: torch.zeros(*a[name].shape[:-1], 257) for name in ("query", "key", "value")}
    return [
        *[Bad(name, lambda a, name=name: {name: a[name].tolist()}, TypeError) for name in ("query", "key", "value")],
        *[Bad(name, lambda a, name=name: {name: a[name].to("meta")}) for name in ("key", "value")],
        *[Bad(name, lambda a, name=name: {name: a[name].double()}, TypeError) for name in ("key", "value")],
        *[Bad(name, lambda a, name=name: {name: a[name][..., :4]}) for name in ("query", "value")],
        *[Bad(name, lambda a, name=name: {name: a[name][..., :1, :, :]}) for name in ("query", "value")],
        Bad("query", lambda a: {"query": a["query"].long()}, TypeError),
        Bad("query", lambda a: {"query": a["query"][0, 0]}),
        Bad("key", lambda a: {"key": a["key"][0]}),
        Bad("key", lambda a: {"key": a["key"][None, None]}),
        Bad("key", lambda a: {"key": a["key"][..., :0, :], "value": a["value"][..., :0, :]}),
        Bad("value", lambda a: {"value": a["value"][..., 1:, :]}),
        Bad("value", lambda a: {"value": a["value"][None]}),
        Bad("query", lambda a: {"query": a["query"][..., :0, :]}),
        Bad("query", lambda a: {name: make(a) for name, make in wide.items()}),
        Bad("query", lambda a: {name: a[name][..., :0] for name in ("query", "key", "value")}),
        Bad("scale", lambda a: {"scale": "1"}, TypeError),
        Bad("scale", lambda a: {"scale": True}, TypeError),
        Bad("scale", lambda a: {"scale": torch.nan}),
        Bad("scale", lambda a: {"scale": torch.inf}),
        Bad("scale", lambda a: {"scale": -torch.inf}),
        Bad("scale", lambda a: {"scale": 10**400}),
        Bad("dropout_p", lambda a: {"dropout_p": 1.0}),
        Bad("dropout_p", lambda a: {"dropout_p": -0.1}),
        Bad("dropout_p", lambda a: {"dropout_p": torch.nan}),
        Bad("dropout_p", lambda a: {"dropout_p": "0"}, TypeError),
        Bad("backend", lambda a: {"dropout_p": 0.5, "backend": "cpp"}),
        Bad("backend", lambda a: {"backend": "fpga"}),
        Bad("backend", lambda a: {"backend": "fpga", "dropout_p": 0.5}),
    ]


OPS.append(
    OpCase(
        name="gathered_attention",
        function=hotkernels.gathered_attention,
        definition=lambda *args, **kwargs: attend(*args, **kwargs)[0],
        differentiable=("query", "key", "value", "bias", "key_bias"),
        inputs={
            "small": _attention((2,), 2, 3, 6, 5, "set", 4, bias=(1, 2, 3, 4), key_bias=(2,)),
            "17": _attention((3,), 2, 17, 17, 64),
            "39": _attention(
                *((2,), 2, queries("query", 39, 9), 39, 39, "query", 7),
                bias=(2, 1, queries("query", 39, 9), 7),
                key_bias=(2,),
            ),
            "63, int32 index": _attention((2,), 2, queries("head", 63, 9), 17, 8, "head", 5, int32=True),
            "81 of 243": _attention((2,), 2, 81, 243, 32, "set", 81, absent=0.0),
            "40, scale 0": _attention((2,), 2, 40, 40, 16, scale=0.0),
            "81, scale -0.7": _attention((2,), 1, 81, 81, 16, scale=-0.7),
            "81": _attention((1, 2), 2, 81, 81, 64),
            "97 of 117": _attention((2,), 1, 40, 117, 16, "set", 97, absent=0.5),
            "243": _attention((2,), 1, 243, 243, 8),
            "117": _attention((2,), 1, 117, 117, 48, bias=(2, 1, 117, 117), key_bias=(2,), masked=0.3),
            "243 from 81": _attention((2,), 2, 243, 81, 16, key_bias=(1,)),
            "351 per query, K=39": _attention((1,), 2, queries("query", 351, 17), 351, 16, "query", 39),
            "1000": _attention((1,), 1, 63, 1000, 32, bias=(1, 1, 1, 1000), key_bias=(1,), masked=0.1),
            "1000 slots of 17": _attention((2,), 1, 49, 17, 8, "set", SLOTS, bias=(49, SLOTS), key_bias=(2,)),
            "1000 slots of 17 per query": _attention(
                (1,), 2, queries("query", 17), 17, 8, "query", 1000, bias=(2, queries("query", 17), 1000)
            ),
            "1000 frames of two joints": _attention((1, 2), 1, 17, 1000, 5, "set", 600, key_bias=(1, 2)),
            "D=128": _attention((2,), 1, 17, 39, 128, "set", 63),
            "D=256": _attention((1,), 2, 17, 39, 256, bias=(1, 1, 17, 39)),
            "D=80 per query": _attention((2,), 2, 17, 39, 80, "query", 9),
            "D=128 per head": _attention((1,), 2, 9, 17, 128, "head", 17, bias=(2, 9, 17), key_bias=(1,), masked=0.3),
            "D=256 per query": _attention((1,), 2, 9, 17, 256, "query", 3),
            "D=1": _attention((2,), 2, 17, 9, 1, "set", 5),
            "three heads per query": _attention((2,), 3, 9, 17, 8, "query", 5, key_bias=(2,)),
            "D=7": _attention((2,), 2, 17, 9, 7, "query", 5, scale=-0.7),
            "two batch dims": _attention((2, 3), 2, 17, 9, 16, bias=(2, 1, 1, 17, 9), key_bias=(1, 3)),
            "two batch dims, set": _attention((2, 3), 2, 17, 9, 16, "set", 7, bias=(1, 3, 1, 1, 7), key_bias=(2, 3)),
            "two batch dims, per query": _attention((2, 3), 2, 17, 9, 16, "query", 7, bias=(3, 2, 17, 7)),
            "two batch dims, per head": _attention((2, 3), 2, 7, 9, 16, "head", 7, bias=(7,), key_bias=(2, 1)),
            "bias [H, 1, S]": _attention((3,), 2, 63, 17, 8, "set", 9, bias=(2, 1, 9)),
            "index for every batch": lambda dtype: {
                **_attention((3, 2), 2, 9, 17, 8)(dtype),
                "index": random_slots((1, 2, 1, 9, 5), 17),
            },
            "set for every batch, strided": lambda dtype: {
                **_attention((3,), 2, 9, 17, 8)(dtype),
                "index": random_slots((9, 1), 17).T,
            },
            "qkv": _qkv,
            "frames of joints": _along_frames,
            "batch dims of size 1": _broadcast,
            **{f"a {name} for all samples": _for_all_samples(name) for name in ("key", "value")},
            "keys of all samples": lambda dtype: _keys_of_all_samples(
                dtype, 5, (), 17, bias=torch.randn(1, 2, 17, 11).to(dtype)
            ),
            "keys of all samples, two batch dims": lambda dtype: _keys_of_all_samples(dtype, 3, (2,), 9),
            "keys of all samples, of which there are none": lambda dtype: _keys_of_all_samples(dtype, 0, (), 5),
            "keys and a set of all samples": lambda dtype: _keys_of_all_samples(dtype, 3, (), 17, (1, 11)),
            "keys of all samples and many queries": lambda dtype: _keys_of_all_samples(
                dtype, 2, (), 300, key_bias=torch.randn(2, 40).to(dtype)
            ),
            **{f"stride 0, {kind}": _stride_zero(kind) for kind in KINDS},
            "nothing to attend to": _attention((2,), 2, 5, 9, 16, "set", 4, absent=1.0, bias=(5, 4), key_bias=(2,)),
            "nothing, per query": _attention((2,), 2, 5, 9, 16, "query", 4, absent=1.0, bias=(5, 4), key_bias=(2,)),
            "many rows empty": _attention(
                (2,), 2, queries("query", 63, 9), 9, 16, "query", 3, absent=0.5, key_bias=(2,), masked=0.3
            ),
            "all keys masked": _attention((2,), 2, 17, 9, 16, bias=(17, 9), key_bias=(2,), masked=1.0),
            "B=0": _attention((0,), 2, 5, 9, 16),
            "B=0, set": _attention((0,), 2, 5, 9, 16, "set", 3),
            "J=0, per query": _attention((2, 0), 2, 5, 9, 16, "query", 3),
            **{
                f"{layout} layout": _attention((3, 2), 2, queries(kind, 17, 9), 9, 16, kind, 7, layout=layout)
                for layout, kind in zip(layouts(torch.zeros(1)), ("dense", "set", "query", "head") * 2, strict=False)
            },
        },
        raw=_gathered_raw,
        bad_raw=_gathered_bad_raw(),
        large={
            kind: _attention(
                *((5, 3), 2, 63, 39, 16, kind, 9),
                bias=(2, 63, 39 if kind == "dense" else 9),
                key_bias=(5, 3),
                return_lse=True,
            )
            for kind in KINDS
        },
        tiny=lambda n, C: {
            **{name: torch.randn(n, 1, 2, C) for name in ("query", "key", "value")},
            "index": torch.randint(-1, 2, (n, 2, 3)),
        },
        index=("index", lambda a: a["key"].shape[-2]),
        bad=[
            *_heads_bad(),
            Bad("the batch dims of query, key and value", lambda a: {"query": a["query"].expand(3, 2, 2, 3, 5)[:, 0]}),
            Bad("query", lambda a: {name: a[name][0] for name in ("query", "key", "value")}),
            Bad("return_lse", lambda a: {"return_lse": "no"}, TypeError),
            Bad("index", lambda a: {"index": [[0]]}, TypeError),
            Bad("index", lambda a: {"index": a["index"].float()}, TypeError),
            Bad("index", lambda a: {"index": a["index"].bool()}, TypeError),
            Bad("index", lambda a: {"index": a["index"].to("meta")}),
            Bad("index", lambda a: {"index": hotkernels.invert_index(a["index"], 7)}),
            Bad("index", lambda a: {"index": hotkernels.invert_index(a["index"], 6, dims=2)}),
            *[
                Bad("index", lambda a, value=value: {"index": torch.full_like(a["index"], value)})
                for value in (6, -2, 1 << 62, -(1 << 63))
            ],
            Bad("index", lambda a: {"index": torch.full((2, 3, 4), 6, dtype=torch.int32)}),
            Bad("index", lambda a: {"index": a["index"][:, :0], "bias": None}),
            Bad("index", lambda a: {"index": torch.zeros(3, 4, dtype=torch.int64)}),
            Bad("index", lambda a: {"index": torch.zeros(2, 1, 4, dtype=torch.int64)}),
            Bad("index", lambda a: {"index": torch.zeros(2, 3, 3, 4, dtype=torch.int64)}),
            *[Bad("index", lambda a, n=n: {"index": torch.zeros([1] * n, dtype=torch.int64)}) for n in (0, 1, 5)],
            Bad("bias", lambda a: {"bias": 1.0}, TypeError),
            Bad("bias", lambda a: {"bias": a["bias"].long()}, TypeError),
            Bad("bias", lambda a: {"bias": a["bias"].to("meta")}),
            Bad("bias", lambda a: {"bias": a["bias"][..., :3]}),
            Bad("bias", lambda a: {"bias": torch.zeros(2, 2, 3, 6)}),
            Bad("bias", lambda a: {"bias": a["bias"][None]}),
            Bad("key_bias", lambda a: {"key_bias": 1.0}, TypeError),
            Bad("key_bias", lambda a: {"key_bias": a["key_bias"].long()}, TypeError),
            Bad("key_bias", lambda a: {"key_bias": a["key_bias"].to("meta")}),
            Bad("key_bias", lambda a: {"key_bias": a["key_bias"][:, :4]}),
            Bad("key_bias", lambda a: {"key_bias": a["key_bias"][0]}),
            Bad("key_bias", lambda a: {"key_bias": a["key_bias"][:, None]}),
        ],
    )
)


# ---- recovery_attention ----------------------------------------------------------------------------------------------


def _recovery(batch: tuple[int, ...], H: int, L: int, M: int, D: int, own: bool = False, **options: Any) -> Make:
    """`own`: each sample has its own query. Options: `masked`, the share of masked keys, or with `samples` of masked
    samples; `scale`; `layout`; `once`, the arguments whose first batch dim is 1."""

    def make(dtype: torch.dtype) -> Args:
        masked, layout = options.get("masked"), options.get("layout")
        query = torch.randn(*batch * own, H, L, D).to(dtype)
        key, value = (torch.randn(*batch, H, M, D).to(dtype) for _ in range(2))
        if layout:
            query, key, value = (layouts(t)[layout] for t in (query, key, value))
        args: Args = {"query": query, "key": key, "value": value}
        if masked is not None:
            args["key_mask"] = torch.rand(*batch, 1 if options.get("samples") else M) >= masked
        if "scale" in options:
            args["scale"] = options["scale"]
        return args | {name: args[name][:1] for name in options.get("once", ())}

    return make


def _joints(dtype: torch.dtype) -> Args:
    """Key and value are two halves of one projection of [B, M, J, C]."""
    key, value = torch.randn(2, 27, 3, 2, 2, 16).to(dtype).permute(3, 0, 2, 4, 1, 5)
    return {"query": torch.randn(81, 2, 16).to(dtype).transpose(0, 1), "key": key, "value": value}


def _recovery_definition(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    bias = None if key_mask is None else torch.zeros(key_mask.shape).to(key).masked_fill(~key_mask, -torch.inf)
    batch = torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value)))
    query, key, value = (t.expand(*batch, *t.shape[-3:]) for t in (query, key, value))
    return attend(query, key, value, key_bias=bias, scale=scale)[0]


def _recovery_raw(args: Args) -> list[tuple[str, tuple]]:
    shared, k, v = args["query"], args["key"], args["value"]
    bias = torch.where(args["key_mask"], 0.0, -torch.inf)
    calls: list[tuple[str, tuple]] = []
    for q, b in ((shared, None), (shared, bias), (shared.expand(2, -1, -1, -1), bias)):
        out, lse = torch.ops.hotkernels.recovery_attention_fwd(q, k, v, b, 0.3)
        calls += [
            ("recovery_attention_fwd", (q, k, v, b, 0.3)),
            ("recovery_attention_bwd", (torch.randn_like(out), q, k, v, out, lse, b, 0.3)),
        ]
    half = (torch.randn_like(out).half(), shared.half(), k.half(), v.half(), out.half(), lse, None, 0.3)
    calls.append(("recovery_attention_bwd", half))
    return calls


def _recovery_good() -> Args:
    query, key, value = (torch.randn(2, 2, N, 16) for N in (17, 9, 9))
    return {"query": query, "key": key, "value": value, "key_bias": torch.zeros(2, 9), "scale": 0.3}


def _recovery_good_backward() -> Args:
    args = _recovery_good()
    out, lse = torch.ops.hotkernels.recovery_attention_fwd(*args.values())
    tokens = {name: args[name] for name in ("query", "key", "value")}
    saved = {"out": out, "lse": lse, "key_bias": args["key_bias"], "scale": 0.3}
    return {"grad_out": out, **tokens, **saved}


def _recovery_bad_raw() -> list[BadRaw]:
    forward = [
        Bad("query", lambda a: {"query": a["query"][:, :1]}),
        Bad("query", lambda a: {"query": a["query"][..., :8]}),
        Bad("query", lambda a: {"query": a["query"][:, :, :0]}),
        Bad("query", lambda a: {"query": a["query"][0, 0]}),
        Bad("query", lambda a: {"query": a["query"].expand(2, 2, 2, 17, 16)}),
        Bad("key and value", lambda a: {"query": a["query"].half()}),
        *[Bad("key_bias", lambda a, shape=shape: {"key_bias": torch.zeros(shape)}) for shape in ((2, 8), (9,), (3, 9))],
        Bad("key_bias", lambda a: {"key_bias": a["key_bias"].double()}),
    ]
    return [
        BadRaw("recovery_attention_fwd", _recovery_good, forward),
        BadRaw("recovery_attention_bwd", _recovery_good_backward, _backward_bad()),
    ]


OPS.append(
    OpCase(
        name="recovery_attention",
        function=hotkernels.recovery_attention,
        definition=_recovery_definition,
        differentiable=("query", "key", "value"),
        inputs={
            "small": _recovery((2,), 2, 4, 3, 5, masked=0.3),
            "17": _recovery((3,), 2, 17, 9, 8),
            "39": _recovery((2,), 2, 39, 13, 39, masked=0.5),
            "243 from 81": _recovery((2,), 2, 243, 81, 64),
            "351 from 117": _recovery((1, 2), 1, 351, 117, 16, masked=0.5),
            "81 from 27, 17 joints": _recovery((2, 17), 2, 81, 27, 16),
            "1000 kept": _recovery((2,), 1, 63, 1000, 16, masked=0.1),
            "its own query": _recovery((3,), 2, 63, 17, 48, own=True, masked=0.3),
            "its own query, two batch dims": _recovery((2, 3), 2, 17, 9, 32, own=True),
            "query [1, H, L, D], mask [1, M]": _recovery(
                (3,), 2, 17, 9, 16, own=True, masked=0.3, once=("query", "key_mask")
            ),
            "mask [B, 1]": _recovery((9,), 2, 5, 3, 8, masked=0.5, samples=True),
            "query of one frame's joints": _recovery((2, 3), 2, 17, 9, 16, own=True, once=("query",)),
            "key and value for all": _recovery((3, 2), 2, 17, 9, 16, own=True, once=("key", "value")),
            "value for all": _recovery((3, 2), 2, 17, 9, 16, once=("value",)),
            "one sequence": _recovery((1,), 2, 63, 17, 16),
            "more sequences than parts": _recovery((9, 4), 1, 5, 3, 8),
            "D=80": _recovery((2,), 1, 17, 9, 80),
            "D=128": _recovery((2,), 1, 17, 9, 128, scale=0.25),
            "D=256": _recovery((2,), 2, 9, 17, 256),
            "D=1": _recovery((2,), 2, 9, 17, 1),
            "halves of a projection": _joints,
            "nothing to attend to": _recovery((2,), 2, 17, 9, 16, masked=1.0),
            "B=0": _recovery((0,), 2, 17, 9, 16, masked=0.5),
            "J=0": _recovery((2, 0), 2, 17, 9, 16),
            **{f"{x} layout": _recovery((3, 2), 2, 17, 9, 16, layout=x) for x in layouts(torch.zeros(1))},
        },
        raw=_recovery_raw,
        bad_raw=_recovery_bad_raw(),
        large={
            "a query for 40 samples": _recovery((40,), 2, 63, 39, 16),
            "its own query, two batch dims": _recovery((9, 5), 2, 63, 39, 16, own=True, masked=0.3),
        },
        tiny=lambda n, C: {
            "query": torch.randn(1, 3, C),
            **{name: torch.randn(n, 1, 2, C) for name in ("key", "value")},
        },
        bad=[
            *_heads_bad(),
            Bad("the batch dims of query, key and value", lambda a: {"value": a["value"].repeat(2, 1, 1, 1)}),
            Bad("the batch dims of query, key and value", lambda a: {"query": a["query"].expand(3, -1, -1, -1)}),
            Bad("key_mask", lambda a: {"key_mask": [True]}, TypeError),
            Bad("key_mask", lambda a: {"key_mask": a["key_mask"].float()}, TypeError),
            Bad("key_mask", lambda a: {"key_mask": a["key_mask"][:, :-1]}),
            Bad("key_mask", lambda a: {"key_mask": a["key_mask"].repeat(2, 1)}),
            Bad("key_mask", lambda a: {"key_mask": a["key_mask"][0]}),
            Bad("key_mask", lambda a: {"key_mask": a["key_mask"].to("meta")}),
        ],
    )
)


# ---- invert_index ----------------------------------------------------------------------------------------------------


def inverse(index: Tensor, num_tokens: int, dims: int = 1, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """start and slots of invert_index, with -1 in the places that it leaves unspecified."""
    _, start, slots = hotkernels.invert_index(index, num_tokens, dims=dims, backend=backend)
    place = torch.arange(slots.shape[-1], device=slots.device)
    return start, slots.where(place < start[..., -1:], -1)


def check_inverse(args: Args, out: tuple[Tensor, Tensor]) -> None:
    """Token by token, by a loop over lists."""
    index, N, dims = args["index"], args["num_tokens"], args.get("dims", 1)
    rows = index.flatten(-dims)
    start, slots = out
    assert start.shape == (*rows.shape[:-1], N + 1)
    assert slots.shape == rows.shape
    assert start.dtype == slots.dtype == torch.int64
    for row, begin, of in zip(
        *(t.flatten(0, -2).tolist() for t in (rows[None], start[None], slots[None])), strict=True
    ):
        assert begin[0] == 0
        assert begin[N] == sum(n >= 0 for n in row)
        for n in range(N):
            assert of[begin[n] : begin[n + 1]] == [slot for slot, token in enumerate(row) if token == n]


def _entries(*shape: int, N: int, absent: float = 0.2, **extra: Any) -> Make:
    return lambda dtype: {
        "index": random_slots(shape, N, absent).to(torch.int64 if dtype.is_floating_point else dtype),
        "num_tokens": N,
        **extra,
    }


def _entries_bad_raw() -> list[BadRaw]:
    def good() -> Args:
        return {"index": torch.zeros(2, 5, dtype=torch.int64), "num_tokens": 3}

    bad = [
        Bad("index", lambda a: {"index": a["index"].int()}),
        Bad("index", lambda a: {"index": a["index"].mT}),
        Bad("index", lambda a: {"index": a["index"][0, 0]}),
        Bad("index", lambda a: {"num_tokens": 0}, expected="-1 or in [0, 0)", got="0", only="cpp"),
        *[
            Bad("index", lambda a, n=n: {"index": a["index"] + n}, expected="-1 or in [0, 3)", got=str(n), only="cpp")
            for n in (3, -2, 1 << 62)
        ],
        Bad("num_tokens", lambda a: {"num_tokens": -1}, expected="at least 0"),
        Bad("num_tokens", lambda a: {"num_tokens": 1 << 30}, only="cuda"),
    ]
    return [BadRaw("invert_index", good, bad)]


OPS.append(
    OpCase(
        name="invert_index",
        function=inverse,
        check=check_inverse,
        inputs={
            "small": _entries(2, 7, N=5),
            "39": _entries(3, 39, N=17),
            "one row": _entries(117, N=81),
            "per query": _entries(2, 3, 17, 9, N=39, dims=2),
            "1000": _entries(2, 1000, N=351),
            "one token": _entries(3, 63, N=1),
            "more tokens than entries": _entries(2, 5, N=1000),
            "all absent": _entries(2, 17, N=9, absent=1.0),
            "no rows": _entries(0, 17, N=9),
            "no entries": _entries(2, 0, N=9),
            "no tokens": _entries(2, 3, N=1, absent=1.0),
        },
        raw=lambda a: [("invert_index", (a["index"].clamp(min=0), N)) for N in (5, 9)],
        bad_raw=_entries_bad_raw(),
        large={
            "many rows": _entries(2001, 5, N=17),
            "500 entries": _entries(2, 500, N=300),
            "9000 entries": _entries(2, 9000, N=300),
        },
        tiny=lambda n, C: {"index": torch.randint(-1, 4, (n, 5)), "num_tokens": 4},
        index=("index", lambda a: a["num_tokens"]),
        bad=[
            Bad("index", lambda a: {"index": [[0]]}, TypeError),
            Bad("index", lambda a: {"index": a["index"].float()}, TypeError),
            Bad("index", lambda a: {"index": torch.tensor(0)}),
            Bad("index", lambda a: {"dims": 3}),
            Bad("index", lambda a: {"index": torch.full((2, 7), 5)}),
            Bad("index", lambda a: {"index": torch.full((2, 7), -2)}),
            Bad("index", lambda a: {"num_tokens": 0}),
            Bad("num_tokens", lambda a: {"num_tokens": -1}),
            Bad("num_tokens", lambda a: {"num_tokens": 2**63 - 1}),
            Bad("num_tokens", lambda a: {"num_tokens": 5.0}, TypeError),
            Bad("dims", lambda a: {"dims": 0}),
            Bad("dims", lambda a: {"dims": "1"}, TypeError),
            Bad("backend", lambda a: {"backend": "fpga"}),
        ],
    )
)
