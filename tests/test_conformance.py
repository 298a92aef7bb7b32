"""One loop over every op x backend x dtype x input. Ops and their inputs are in cases.py and attention_cases.py."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attention_cases  # noqa: F401  # registers its ops
import numpy as np
import pytest
import torch
from cases import OPS, Args, Bad, BadRaw, OpCase, layouts, tensors, upcast, wanted_by
from comparing import assert_as_accurate, assert_same
from conftest import BACKENDS, EMULATED, FUSED_BACKENDS, GPU_BACKENDS, PAIRS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

import hotkernels
from hotkernels.backends import LIBRARIES, why_not
from hotkernels.backends import OPS as KERNELS
from hotkernels.bench.workloads import rounding_floor
from hotkernels.ops.gather_tokens.reference import gather_tokens_bwd_reference
from hotkernels.ops.invert_index.reference import invert_index_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def loop(
    *,
    inputs: bool | Callable[[OpCase], Iterable[str]] = True,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    gradients: bool = False,
    backends: tuple[str, ...] = BACKENDS,
) -> Any:
    """Parametrise (op, backend, dtype, case) with all inputs, small ones, or those of a function of the op.

    What a backend does not take is one skip that says so.
    """
    cases = inputs if callable(inputs) else (lambda op: op.inputs) if inputs else (lambda op: ["small"])
    rows = []
    for op in (op for op in OPS if op.differentiable or not gradients):
        takes = KERNELS[op.name]["torch"].dtypes
        for backend in backends:
            for dtype in dtypes if takes[0].is_floating_point else takes:
                label = f"{op.name}-{backend}-{str(dtype).removeprefix('torch.')}"
                kernel = KERNELS[op.name].get(backend.partition("-")[0])
                if kernel is None or (backend == PAIRS and ("attention" not in op.name or dtype != torch.bfloat16)):
                    continue
                if dtype not in kernel.dtypes:
                    device = "cuda" if backend in GPU_BACKENDS and not EMULATED else "cpu"
                    why = why_not(op.name, backend.partition("-")[0], device, dtype)
                    rows.append(pytest.param(op, backend, dtype, "", id=label, marks=pytest.mark.skip(str(why))))
                    continue
                for case in cases(op):
                    rows.append(pytest.param(op, backend, dtype, case, id=f"{label}-{case}"))
    return pytest.mark.parametrize(("op", "backend", "dtype", "case"), rows, indirect=["backend"])


def each_op_on(*backends: str) -> Any:
    """Parametrise (op, backend) with the backends that an op has."""
    rows = [
        pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS for name in backends if name in KERNELS[op.name]
    ]
    return pytest.mark.parametrize(("op", "backend"), rows, indirect=["backend"])


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills everything that is allocated and not written with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def largest(values: Any) -> float:
    return max((t.abs().max().item() for t in tensors(values) if t.numel()), default=0.0)


def assert_near(ours: Tensor, torchs: list[Tensor], truth: Tensor, backend: str, factor: float, scale: float) -> None:
    """As accurate as PyTorch, beside some roundings of `scale`, the largest number in the answer.

    The torch backend itself, and float64, which has no better truth than itself, are allowed more of those instead.
    """
    if ours.numel() == 0:
        assert ours.shape == truth.shape
        return
    assert ours.isfinite().all()
    floor = rounding_floor(ours.dtype, tensor_cores=backend == "triton") * scale
    if backend == "torch":
        torchs, floor = [truth], floor + 8 * factor * torch.finfo(ours.dtype).eps * scale
    assert_as_accurate(ours, torchs, truth, factor, floor)


def gradients(function: Any, args: Args, wanted: tuple[str, ...], grad_out: Any = None) -> tuple[Tensor, ...]:
    """Gradients of a call with respect to the wanted arguments."""
    args = {name: value.detach().requires_grad_() if name in wanted else value for name, value in args.items()}
    out = tensors(function(**args))
    grads = torch.autograd.grad(
        out, [args[name] for name in wanted], [torch.ones_like(o) for o in out] if grad_out is None else grad_out
    )
    return tuple(grads)


def random_like(out: Any) -> list[Tensor]:
    """Gradients of outputs, to a backward pass."""
    return [torch.randn_like(o, dtype=torch.float64).to(o.dtype) for o in tensors(out)]


def answers(op: OpCase, backend: str | None, args: Args, grad_out: list[Tensor]) -> list[Tensor]:
    """All outputs of a call, and all gradients that it has."""

    def call(**args: Any) -> Any:
        return op.function(**args, backend=backend)

    wanted = wanted_by(op, args)
    return [*tensors(call(**args)), *(gradients(call, args, wanted, grad_out) if wanted else ())]


@loop()
def test_forward(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    args = op.inputs[case](dtype)
    before = [t.clone() for t in tensors(args)]
    with poisoned_memory():
        out = op.function(**args, backend=backend)
    assert_same(tensors(args), before)
    sources = {t.untyped_storage().data_ptr() for t in tensors(args) if t.numel()}
    assert all(t.numel() == 0 or t.untyped_storage().data_ptr() not in sources for t in tensors(out)), "an alias"
    assert_same(out, op.function(**args, backend=backend))
    if op.check:
        op.check(args, out)
        return
    assert op.definition is not None
    truth, torchs = op.definition(**upcast(args)), [op.function(**args, backend="torch")]  # half types: in float32
    if backend in GPU_BACKENDS and dtype.itemsize == 2:
        torchs.append(op.definition(**args))  # in half: what tensor cores multiply is rounded
    for ours, exact, *low in zip(tensors(out), tensors(truth), *map(tensors, torchs), strict=True):
        assert ours.dtype == dtype
        assert_near(ours, low, exact, backend, 2, largest(truth))


@loop(gradients=True)
def test_gradients(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    args = op.inputs[case](dtype)
    wanted = wanted_by(op, args)
    assert op.definition is not None
    grad_out = random_like(op.function(**args))
    with poisoned_memory():
        ours = gradients(lambda **a: op.function(**a, backend=backend), args, wanted, grad_out)
    torchs = [
        gradients(lambda **a: op.function(**a, backend="torch"), args, wanted, grad_out),  # half types: in float32
        gradients(op.definition, args, wanted, grad_out),  # half types: in half
    ]
    truth = gradients(op.definition, upcast(args), wanted, upcast(grad_out))
    for name, grad, exact, *low in zip(wanted, ours, truth, *torchs, strict=True):
        assert grad.dtype == dtype
        assert grad.shape == args[name].shape
        assert bool(grad.any()) == bool(exact.any()), f"the gradient of {name} is silently missing"
        assert_near(grad, low, exact, backend, 3, largest(truth))


@loop(gradients=True, inputs=False)
def test_each_gradient_alone(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    """Asking for one gradient gives the bits that asking for all gives; from a grad_out of any strides, too."""
    args = op.inputs[case](dtype)
    wanted = wanted_by(op, args)
    assert wanted == op.differentiable, "the small input is not complete"

    def ours(**a: Any) -> Any:
        return op.function(**a, backend=backend)

    grad_out = random_like(ours(**args))
    for name, grad in zip(wanted, gradients(ours, args, wanted, grad_out), strict=True):
        assert_same(gradients(ours, args, (name,), grad_out), (grad,))
    for views in zip(*(layouts(o).values() for o in grad_out), strict=True):
        plain = gradients(ours, args, wanted, [view.contiguous() for view in views])
        assert_same(gradients(ours, args, wanted, views), plain, exactly=False)  # PyTorch's sum for pos depends on them


@loop(inputs=False)
def test_any_strides(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    """Every tensor argument behind every kind of strides gives the bits that a contiguous copy gives."""
    args = op.inputs[case](dtype)
    for name, value in args.items():
        if not isinstance(value, Tensor):
            continue
        for view in layouts(value).values():
            out = op.function(**{**args, name: view}, backend=backend)
            plain = op.function(**{**args, name: view.contiguous()}, backend=backend)
            assert_same(out, plain, exactly=backend != "torch")  # PyTorch's own sums depend on strides


@loop(
    inputs=lambda op: op.large,
    dtypes=(torch.float32,) if EMULATED else (torch.float32, torch.bfloat16),
    backends=tuple(name for name in BACKENDS if name != "triton"),  # in whose interpreter it would take minutes
)
def test_any_number_of_threads(op: OpCase, backend: str, dtype: torch.dtype, case: str, threads: None) -> None:
    """The same bits, every time, but for PyTorch's own sums. An emulated GPU also takes its own in another order."""
    args = op.large[case](dtype)
    torch.set_num_threads(1)
    out = op.function(**args, backend=backend)
    if op.check:
        op.check(args, out)
    grad_out = random_like(out)
    one = answers(op, backend, args, grad_out)
    for count in (2,) if EMULATED else (2, 3, 4) * 2:
        torch.set_num_threads(count)
        ours = answers(op, backend, args, grad_out)
        if backend == "torch" and op.differentiable:  # several of PyTorch's threads may add to one sum
            for a, b in zip(ours, one, strict=True):
                atol = 64 * torch.finfo(a.dtype).eps * largest(b[b.isfinite()])
                torch.testing.assert_close(a, b, rtol=0, atol=atol)
        else:
            assert_same(ours, one)


@loop(inputs=False, dtypes=(torch.float64,), gradients=True, backends=("torch", *FUSED_BACKENDS))
def test_gradcheck(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    args = op.inputs[case](dtype)
    wanted = wanted_by(op, args)

    def function(*values: Tensor) -> Any:
        return op.function(**{**args, **dict(zip(wanted, values, strict=True))}, backend=backend)

    assert gradcheck(function, [args[name].requires_grad_() for name in wanted], nondet_tol=0.0)


@loop(inputs=False, dtypes=(torch.float32,), gradients=True)
def test_second_derivative_is_refused(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    if backend == "torch":
        pytest.skip("plain PyTorch has second derivatives")
    args = op.inputs[case](dtype)
    x = args[op.differentiable[0]].requires_grad_()
    out = tensors(op.function(**args, backend=backend))[0]
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):  # the engine visits only what leads to x
        torch.autograd.grad(grad.sum(), x, allow_unused=True)


@pytest.mark.parametrize("name", ["gathered_attention", "recovery_attention"])
def test_second_derivative_of_a_sum_is_refused(name: str, backend: str) -> None:
    """The gradient that comes in is constant, what the saved tensors contribute is not."""
    if backend == "torch" or backend not in KERNELS[name]:
        pytest.skip(f"{backend}: it has second derivatives, or no kernel")
    x = torch.randn(2, 2, 5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(getattr(hotkernels, name)(x, x, x, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.square().sum(), x, allow_unused=True)


@loop(inputs=False, dtypes=(torch.float32,), gradients=True)
def test_forward_mode_is_refused(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    """A raw operator would drop the tangent, which is then zero."""
    if backend == "torch":
        pytest.skip("plain PyTorch has forward mode")
    args = op.inputs[case](dtype)
    with forward_ad.dual_level():
        args[op.differentiable[0]] = forward_ad.make_dual(*[args[op.differentiable[0]]] * 2)
        with pytest.raises(RuntimeError, match="differentiable once"):
            op.function(**args, backend=backend)


@loop(inputs=False, dtypes=(torch.float32,))
def test_no_gradient_where_none_is_promised(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    args = op.inputs[case](dtype)
    args = {n: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in args.items()}
    out = tensors(op.function(**args, backend=backend))
    assert all(t.requires_grad == bool(op.differentiable) for t in out)
    with torch.no_grad():
        assert not any(t.requires_grad for t in tensors(op.function(**args, backend=backend)))


def _with_an_index(op: OpCase) -> list[str]:
    """All inputs with an int64 index that is not empty; of those, the smaller ones in Triton's slow interpreter."""
    if op.index is None:
        return []
    with torch.random.fork_rng(devices=[]):
        made = {case: make(torch.float32) for case, make in (op.inputs | op.large).items()}
    found = [
        case
        for case, args in made.items()
        if isinstance(index := args.get(op.index[0]), Tensor) and index.numel() and index.dtype == torch.int64
    ]
    most = {"triton": 5500, "cuda": 50_000}.get(EMULATED, math.inf)  # on the host, more takes minutes
    return [case for case in found if sum(t.numel() for t in tensors(made[case])) < most]


@loop(inputs=_with_an_index, dtypes=(torch.float32,), backends=tuple(n for n in BACKENDS if "cpp" not in n))
def test_an_index_out_of_range_is_never_read(
    op: OpCase, backend: str, dtype: torch.dtype, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it counts as absent, also to PyTorch where our library is missing; inside checked() it is an error."""
    assert op.index is not None
    name, tokens = op.index
    args = (op.inputs | op.large)[case](dtype)
    index, N = args[name], tokens(args)
    wrong = torch.tensor([N, N + 1, -2, -1 - N, 1 << 31, 1 << 40, (1 << 62) + 5, (1 << 63) - 1, -(1 << 63)])
    places = torch.rand(index.shape) < 0.3
    places.view(-1)[0] = True
    absent = {**args, name: index.masked_fill(places, -1)}
    args[name] = torch.where(places, wrong[torch.randint(len(wrong), index.shape)], index)
    grad_out = random_like(op.function(**absent, backend=backend))
    with monkeypatch.context() as gpu:
        gpu.setattr("hotkernels.errors.can_look", lambda values: False)
        if EMULATED == "triton":  # whose backward would find the C++ kernels, which look
            gpu.setattr(torch.ops.hotkernels, "invert_index", invert_index_reference)
            gpu.setattr(torch.ops.hotkernels, "gather_tokens_bwd", gather_tokens_bwd_reference)
        # PyTorch's own sums have no order.
        assert_same(answers(op, backend, args, grad_out), answers(op, backend, absent, grad_out), backend != "torch")
    with hotkernels.checked(), pytest.raises(ValueError, match=rf"^{op.name}: {name} must be -1 or in \[0, {N}\)"):
        op.function(**args, backend=backend)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
def test_a_gpu_without_our_library(op: OpCase) -> None:
    """PyTorch serves it there, forward and backward, and waits for no value: tensors on "meta" have none."""
    args = op.inputs["small"](torch.float32)
    expected = answers(op, "torch", args, random_like(op.function(**args)))
    there = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in args.items()}
    ours = answers(op, None, there, random_like(op.function(**there)))
    assert [(t.shape, t.dtype, t.is_contiguous()) for t in ours] == [
        (t.shape, t.dtype, t.is_contiguous()) for t in expected
    ]


def told(op: str, bad: Bad) -> str:
    """The one form of an error."""
    expected, got = re.escape(bad.expected) or ".", re.escape(bad.got) or "."
    return rf"^({op}): {bad.arg} must be {expected}(?s:.*), got {got}"


def _bad_calls() -> list[Any]:
    return [
        pytest.param(op, name, bad, id=f"{op.name}-{name}-{i}-{bad.arg}")
        for op in OPS
        for name in ("torch", *FUSED_BACKENDS)
        for i, bad in enumerate(op.bad)
        if name in KERNELS[op.name]
    ]


@pytest.mark.parametrize(("op", "backend", "bad"), _bad_calls(), indirect=["backend"])
def test_wrong_arguments(op: OpCase, backend: str, bad: Bad) -> None:
    """On a GPU, values of an index are looked at inside checked() only."""
    args = op.inputs["small"](torch.float32)
    with hotkernels.checked(), pytest.raises(bad.error, match=told(op.name, bad)) as raised:
        op.function(**{"backend": backend, **args, **bad.change(args)})
    assert type(raised.value) is bad.error


def _bad_raw_calls() -> list[Any]:
    return [
        pytest.param(op, name, raw, bad, id=f"{raw.operator}-{name}-{i}-{bad.arg}")
        for op in OPS
        for name in ("cpp", "cuda")
        for raw in op.bad_raw
        for i, bad in enumerate(raw.bad)
        if name in KERNELS[op.name] and bad.only in ("", name)
    ]


@pytest.mark.parametrize(("op", "backend", "raw", "bad"), _bad_raw_calls(), indirect=["backend"])
def test_raw_operators_check_for_themselves(op: OpCase, backend: str, raw: BadRaw, bad: Bad) -> None:
    """Someone who calls torch.ops gets an error too, never a read out of bounds. GPUs do not look at an index."""
    operator, good = getattr(torch.ops.hotkernels, raw.operator), raw.good()
    operator(*good.values())
    message = told(f"{op.name}|invert_index", bad)  # by which some backward passes begin
    with pytest.raises((ValueError, RuntimeError), match=message):  # see hotkernels.backends.call
        operator(*{**good, **bad.change(good)}.values())


@each_op_on("torch", *FUSED_BACKENDS)
def test_sparse_and_nested_tensors_are_refused(op: OpCase, backend: str) -> None:
    args = op.inputs["small"](torch.float32)
    for name, value in args.items():
        if isinstance(value, Tensor):
            for other in (value.to_sparse(), torch.nested.nested_tensor(list(value))):
                with pytest.raises(TypeError, match=rf"^{op.name}: {name} must be a dense tensor, got .+$"):
                    op.function(**{**args, name: other}, backend=backend)


@each_op_on(*FUSED_BACKENDS)
def test_raw_operators(op: OpCase, backend: str) -> None:
    # What is traced is the same for all backends, and Triton's interpreter would run it often.
    only = {"test_utils": ("test_schema", "test_faketensor")} if EMULATED == "triton" else {}
    for name, args in op.raw(op.inputs["small"](torch.float32)):
        torch.library.opcheck(getattr(torch.ops.hotkernels, name).default, args, **only)


def _compiled(op: OpCase, backend: str, compiler: str, *inputs: Args, dynamic: bool | None = None) -> list[int]:
    """How many graphs were compiled by the end of each of the calls, the answers of which are compared."""
    torch._dynamo.reset()
    counted, graphs = CompileCounterWithBackend(compiler), []
    compiled = torch.compile(op.function, fullgraph=True, backend=counted, dynamic=dynamic)
    for args in ({**args, "backend": backend} for args in inputs):
        torch.testing.assert_close(tensors(compiled(**args)), tensors(op.function(**args)))
        if wanted := wanted_by(op, args):
            torch.testing.assert_close(*(gradients(call, args, wanted) for call in (compiled, op.function)))
        graphs.append(counted.frame_count)
    return graphs


@each_op_on("torch", *FUSED_BACKENDS)
def test_compiles_without_graph_breaks(op: OpCase, backend: str) -> None:
    _compiled(op, backend, "aot_eager", op.inputs["small"](torch.float32))


@each_op_on(*FUSED_BACKENDS)
def test_compiles_with_changing_sizes(op: OpCase, backend: str) -> None:
    """Those after the second compile nothing: here samples and channels, tokens below."""
    of_other_forms = [op.inputs[case](torch.float32) for case in ("small", "39" if "39" in op.inputs else "117")]
    _compiled(op, backend, "aot_eager", *of_other_forms, dynamic=True)
    # To the compiler a scale is a constant: the default one, of the channels, would be another each time.
    fixed = {"scale": 0.3} if "scale" in inspect.signature(op.function).parameters else {}
    sizes = ((7, 8), (11, 16), (13, 24), (17, 40))  # equal to no other size: what is equal is compiled as one
    graphs = _compiled(op, backend, "aot_eager", *(op.tiny(n, C) | fixed for n, C in sizes), dynamic=True)
    assert graphs[1:] == [graphs[1]] * 3


@pytest.mark.skipif(LIBRARIES["_C_cpu"] is not None, reason=str(LIBRARIES["_C_cpu"]))
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda x, i: hotkernels.gather_tokens(x, i), id="gather_tokens"),
        pytest.param(lambda x, i: hotkernels.merge_tokens(x, i % 5, x.shape[1] // 4), id="merge_tokens"),
        pytest.param(lambda x, i: x + hotkernels.dpc_knn(x, x.shape[1] // 2, 3).score[..., None], id="dpc_knn"),
        pytest.param(lambda x, i: hotkernels.gathered_attention(*[x[:, None]] * 3, i[:, :7]), id="a set of keys"),
        pytest.param(lambda x, i: hotkernels.gathered_attention(*[x[:, None]] * 3, i[..., None]), id="keys per query"),
        pytest.param(lambda x, i: hotkernels.recovery_attention(*[x[:, None]] * 3), id="recovery_attention"),
        pytest.param(lambda x, i: x + hotkernels.invert_index(i, x.shape[1]).start[:, 1:, None], id="invert_index"),
    ],
)
def test_new_sizes_soon_compile_nothing_new(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counted)
    for N in (20, 24, 29, 33, 41):
        x, index = torch.randn(2, N, 8, requires_grad=True), torch.randint(N, (2, N))
        torch.testing.assert_close(*(torch.autograd.grad(f(x, index).square().sum(), x) for f in (compiled, call)))
    assert counted.frame_count <= 2  # the first size may show too much


def test_new_sizes_of_plain_pytorch_compile_nothing_new() -> None:
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: hotkernels.dpc_knn(x, 3, 2)[0], fullgraph=True, dynamic=True, backend=counted)
    for N in (20, 24, 29, 33, 41):
        x = torch.randn(2, N, 8, dtype=torch.float64)
        assert torch.equal(compiled(x), hotkernels.dpc_knn(x, 3, 2)[0])
    assert counted.frame_count <= 2


@each_op_on("torch")
def test_traced_by_make_fx(op: OpCase, backend: str) -> None:
    """As torch.func.linearize does: what is traced has no values to look at."""
    args = op.inputs["small"](torch.float32)
    given = [name for name, value in args.items() if isinstance(value, Tensor)]

    def call(*values: Tensor) -> list[Tensor]:
        return tensors(op.function(**args | dict(zip(given, values, strict=True)), backend=backend))

    values = [args[name] for name in given]
    # On a CPU, plain PyTorch's distances of tokens come in another way where it can look at values.
    assert_same(make_fx(call)(*values)(*values), call(*values), exactly=backend != "torch")


@each_op_on(*FUSED_BACKENDS)
def test_compiles_with_inductor(op: OpCase, backend: str) -> None:
    _compiled(op, backend, "inductor", op.inputs["small"](torch.float32))


@each_op_on("torch", *FUSED_BACKENDS)
def test_exports(op: OpCase, backend: str) -> None:
    args = op.inputs["small"](torch.float32)
    given = {name: value for name, value in args.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in args.items() if name not in given}

    class Module(torch.nn.Module):
        def forward(self, **kwargs: Tensor) -> list[Tensor]:
            return tensors(op.function(**kwargs, **fixed, backend=backend))

    program = torch.export.export(Module(), (), given).module()
    assert_same(program(**given), op.function(**args, backend=backend), exactly=backend != "torch")  # as make_fx does
    if wanted := wanted_by(op, args):
        theirs = gradients(lambda **a: program(**{name: a[name] for name in given}), args, wanted)
        assert_same(theirs, gradients(lambda **a: op.function(**a, backend=backend), args, wanted))


@each_op_on("torch")
def test_what_onnx_export_gets_is_pytorchs(op: OpCase, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = op.inputs["small"](torch.float32)
    given = {name: value for name, value in args.items() if isinstance(value, Tensor)}

    class Module(torch.nn.Module):
        def forward(self, **kwargs: Tensor) -> list[Tensor]:
            return tensors(op.function(**args | kwargs))

    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(Module(), (), given)
    assert not [node for node in program.graph.nodes if "hotkernels" in str(node.target)]
    assert_same(program.module()(**given), op.function(**args, backend="torch"), exactly=False)


@each_op_on("torch", *FUSED_BACKENDS)
def test_vmap(op: OpCase, backend: str) -> None:
    args = op.inputs["small"](torch.float32)
    stacked = {name: torch.stack([v, v.roll(1, -1)]) for name, v in args.items() if isinstance(v, Tensor)}

    def call(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(tensors(op.function(**{**args, **given}, backend=backend)))

    vmapped, exactly = torch.func.vmap(call), backend != "torch"

    def sample(samples: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        return {name: v[i] for name, v in samples.items()}

    for some in [*([name] for name in stacked), list(stacked)]:
        samples = {name: stacked[name].clone() for name in some}
        wanted = [samples[name].requires_grad_() for name in some if name in op.differentiable]
        one_by_one = [torch.stack(same) for same in zip(*(call(sample(samples, i)) for i in range(2)), strict=True)]
        if wanted:
            grad_out = random_like(one_by_one)
            expected = torch.autograd.grad(one_by_one, wanted, grad_out)
        calls = [vmapped]
        if len(some) == len(stacked):
            torch._dynamo.reset()
            calls.append(torch.compile(vmapped, backend="aot_eager", fullgraph=True))
        for at_once in (call_at_once(samples) for call_at_once in calls):
            assert_same(at_once, one_by_one, exactly)
            if wanted:
                assert_same(torch.autograd.grad(at_once, wanted, grad_out), expected, exactly)

    if op.index is not None and backend in ("torch", "cpp"):
        name, tokens = op.index
        bad = stacked[name].clone()
        bad[1].view(-1)[0] = tokens(args)
        with pytest.raises(ValueError, match=rf"{name} must be -1 or in \["):
            vmapped({name: bad})


@each_op_on(*FUSED_BACKENDS)
def test_other_transforms_are_refused(op: OpCase, backend: str) -> None:
    args = op.inputs["small"](torch.float32)
    for name in wanted_by(op, args):

        def total(x: Tensor, name: str = name) -> Tensor:
            return tensors(op.function(**{**args, name: x}, backend=backend))[0].sum()

        for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
            with pytest.raises(RuntimeError, match=r"differentiable once, .+HOTKERNELS_BACKEND=torch"):
                transform(total)(args[name])
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.compile(torch.func.grad(total), backend="aot_eager", fullgraph=True)(args[name])


@each_op_on("torch", *FUSED_BACKENDS)
@pytest.mark.filterwarnings("error")
def test_numbers_of_numpy(op: OpCase, backend: str) -> None:
    args = op.inputs["small"](torch.float32)
    of_numpy = {int: np.int64, float: np.float64}
    given = {name: of_numpy.get(type(value), lambda v: v)(value) for name, value in args.items()}
    assert_same(op.function(**given, backend=backend), op.function(**args, backend=backend))
    for name in {"scale", "eps"} & inspect.signature(op.function).parameters.keys():
        args[name], given[name] = 0.125, np.float32(0.125)
    for name in {"ordered", "return_lse"} & inspect.signature(op.function).parameters.keys():
        args[name], given[name] = True, np.True_
    assert_same(op.function(**given, backend=backend), op.function(**args, backend=backend))


@each_op_on("torch", *FUSED_BACKENDS)
def test_fake_tensors(op: OpCase, backend: str) -> None:
    """Shapes, dtypes and strides are known without running anything."""
    args = op.inputs["small"](torch.float32)
    out = tensors(op.function(**args, backend=backend))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in args.items()}
        for ours, real in zip(tensors(op.function(**fake, backend=backend)), out, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (real.shape, real.dtype, real.stride())


@each_op_on("cuda")
def test_a_gpu_that_refuses_all_is_an_error(op: OpCase, backend: str, gpu: Callable[..., None]) -> None:
    """A driver older than our CUDA runtime, say: not even the number of processors is known then."""
    dtype = KERNELS[op.name][backend].dtypes[0]
    raws = op.raw(op.inputs["small"](dtype))
    refused = pytest.raises(RuntimeError, match=rf"^{op.name}: launch must be accepted by the GPU, got CUDA driver .+$")
    gpu(compute_capability=0)
    for make in op.inputs.values():
        args = make(dtype)
        if all(t.numel() for t in tensors(args)):
            with refused:
                op.function(**args, backend=backend)
    for name, raw in raws:
        with refused:
            getattr(torch.ops.hotkernels, name)(*raw)


def test_every_op_is_registered() -> None:
    assert {op.name for op in OPS} == set(KERNELS)


@pytest.mark.skipif(LIBRARIES["_C_cpu"] is not None, reason=str(LIBRARIES["_C_cpu"]))
def test_every_raw_operator_is_registered() -> None:
    called = {name for op in OPS for name, _ in op.raw(op.inputs["small"](torch.float32))}
    refused = {raw.operator for op in OPS for raw in op.bad_raw}
    defined = torch._C._dispatch_get_all_op_names()
    ours = [name for name in defined if name.startswith("hotkernels::") and not name.startswith("hotkernels::_")]
    raw = [name for name in ours if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    assert called == refused == {name.partition("::")[2] for name in raw}
