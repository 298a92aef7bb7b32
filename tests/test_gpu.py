"""What only a GPU can prove: capture in graphs, streams, devices, sizes beyond 32 bits, no waiting, no hidden memory.

Everything goes over the ops and inputs of the conformance loop, on whichever GPU backends they have.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import attention_cases  # noqa: F401  # registers its ops
import pytest
import torch
from as_published import OPTIONS, assert_as_published, assert_as_published_under_autocast, hourglass, pair
from cases import OPS, Args, OpCase, tensors, wanted_by
from comparing import assert_same
from conftest import GPU_BACKENDS
from torch import Tensor
from torch.utils import _pytree as pytree

import hotkernels
from hotkernels.backends import OPS as KERNELS
from hotkernels.baselines import AttentionEager, TokenRecoveryEager
from hotkernels.bench.timing import captured, peak_memory
from hotkernels.nn import Attention, TokenRecovery

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: what only a GPU can prove is not proved")
on_any_gpu = pytest.mark.parametrize("backend", GPU_BACKENDS, indirect=True)


def each_op(
    *, cases: bool = False, dtypes: tuple[torch.dtype, ...] = (torch.float32,), but: tuple[str, ...] = ()
) -> Any:
    """Parametrise (op, backend, dtype, case) with the GPU kernels that there are, on small inputs or on all."""
    rows = [
        pytest.param(op, backend, dtype, case, id=f"{op.name}-{backend}-{str(dtype).removeprefix('torch.')}-{case}")
        for op in OPS
        for backend in GPU_BACKENDS
        for dtype in dtypes
        for case in (op.inputs if cases else ("small",))
        if op.name not in but and backend in KERNELS[op.name]
    ]
    return pytest.mark.parametrize(("op", "backend", "dtype", "case"), rows, indirect=["backend"])


def calling(op: OpCase, backend: str, args: Args) -> Callable[[], list[Tensor]]:
    """A call of the op on these tensors, in place: its outputs, and all its gradients where it has any."""
    wanted = wanted_by(op, args)
    for name in wanted:
        args[name].requires_grad_()

    def call() -> list[Tensor]:
        out = tensors(op.function(**args, backend=backend))
        if not wanted:
            return out
        grads = torch.autograd.grad(out, [args[name] for name in wanted], [torch.ones_like(o) for o in out])
        return [*(o.detach() for o in out), *grads]

    return call


def copies(args: Args) -> Args:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)


@torch.no_grad()
def overwrite(args: Args, values: Args) -> None:
    for name, value in args.items():
        if isinstance(value, Tensor):
            value.copy_(values[name])


@torch.no_grad()
def poison(args: Args) -> None:
    for value in tensors(args):
        value.fill_(torch.nan if value.is_floating_point() else value.dtype != torch.bool and -1)


# ---- graphs, streams, devices ----------------------------------------------------------------------------------------


@each_op(cases=True, dtypes=(torch.float32, torch.bfloat16))
def test_replays_of_a_graph(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    """Forward and backward in one graph: each replay gives the bits of a call, on what its inputs hold by then."""
    first, second = op.inputs[case](dtype), op.inputs[case](dtype)
    args = copies(first)
    out, replay = captured(calling(op, backend, args))
    for values in (second, first, second):
        overwrite(args, values)
        replay()
        assert_same(out, calling(op, backend, copies(values))())


@each_op(cases=True)
def test_never_waits_for_the_gpu(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    call = calling(op, backend, op.inputs[case](dtype))
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_op(dtypes=(torch.float32, torch.bfloat16))
def test_a_side_stream(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    """The inputs arrive late on that stream; a kernel on another stream would read NaN."""
    values = op.inputs[case](dtype)
    expected = calling(op, backend, copies(values))()
    args = copies(values)
    call = calling(op, backend, args)
    poison(args)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        overwrite(args, values)
        out = call()
    stream.synchronize()
    assert_same(out, expected)


@each_op()
def test_two_streams_at_once(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    """Calls that overlap share nothing: no scratch memory, no counter."""
    calls = [calling(op, backend, op.inputs[case](dtype)) for _ in range(2)]
    expected = [call() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        for call, stream, right in zip(calls, streams, expected, strict=True):
            with torch.cuda.stream(stream):
                outs.append((call(), right))
    torch.cuda.synchronize()
    for out, right in outs:
        assert_same(out, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only: the device guard is not proved")
@each_op(dtypes=(torch.float32, torch.bfloat16))
def test_a_device_that_is_not_the_current_one(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    values = op.inputs[case](dtype)
    there = pytree.tree_map_only(Tensor, lambda t: t.to("cuda:1"), values)
    out = calling(op, backend, there)()
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in out)
    assert_same([t.to("cuda:0") for t in out], calling(op, backend, values)())


# ---- sizes -----------------------------------------------------------------------------------------------------------


def assert_like_its_parts(op: OpCase, backend: str, args: Args, count: int) -> None:
    """Some of the samples by themselves give what they give among all, gradients included."""
    some = torch.cat([torch.arange(9), torch.arange(count - 9, count), torch.randint(count, (50,))])

    def part(value: Any) -> Any:
        return value[some] if isinstance(value, Tensor) and len(value) == count else value

    few = {name: part(value.detach()) if isinstance(value, Tensor) else value for name, value in args.items()}
    whole, alone = calling(op, backend, args)(), calling(op, backend, few)()
    pairs = [(part(a), b) for a, b in zip(whole, alone, strict=True) if len(a) == count]
    assert pairs
    for a, b in pairs:
        if op.differentiable:  # how a batch is cut may depend on its size
            assert (a - b).abs().max() <= 4 * torch.finfo(a.dtype).eps * b.abs().max().clamp(min=1)
        else:
            assert_same(a, b)


@pytest.mark.parametrize("count", [65_536, 300_000])
@each_op()
def test_many_samples(op: OpCase, backend: str, dtype: torch.dtype, case: str, count: int) -> None:
    assert_like_its_parts(op, backend, op.tiny(count, 8), count)


@each_op(dtypes=(torch.bfloat16,), but=("invert_index",))  # its int64 tensors would take 100 GB
def test_tensors_of_more_than_two_to_the_31_elements(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    outs = tensors(op.function(**op.tiny(2, 64), backend="torch"))
    least = min(t[0].numel() for t in [*tensors(op.tiny(2, 64)), *outs] if t.is_floating_point() and t.dim() > 2)
    count = 2**31 // least + 9  # samples, for each to have so many
    if torch.cuda.mem_get_info()[0] < 45 << 30:
        pytest.skip("needs 45 GiB of free GPU memory")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        args = op.tiny(count, 64)
    finally:
        torch.set_default_dtype(previous)
    try:
        assert_like_its_parts(op, backend, args, count)
    finally:
        del args
        torch.cuda.empty_cache()


@each_op(dtypes=(torch.bfloat16,), but=("invert_index",))
def test_strides_beyond_32_bits(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    """More than 2**31 elements lie between the samples of an argument."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free GPU memory")
    args = op.inputs[case](dtype)
    expected = calling(op, backend, copies(args))()
    for name, value in args.items():
        if isinstance(value, Tensor) and value.dtype == dtype and value.dim() > 2 and len(value) == 2:
            step = 2**31 + 64
            memory = torch.empty(step + value[0].numel(), dtype=dtype)
            far = memory.as_strided(value.shape, (step, *value[0].contiguous().stride())).copy_(value.detach())
            assert_same(calling(op, backend, {**copies(args), name: far})(), expected)
            del memory, far
            torch.cuda.empty_cache()


@on_any_gpu
def test_clustering_holds_no_square_matrix(backend: str) -> None:
    if backend not in KERNELS["dpc_knn"]:
        pytest.skip(f"dpc_knn has no {backend} kernel")
    for B, N, C in ((8, 4096, 256), (1, 16384, 1024)):
        x = torch.randn(B, N, C)
        hotkernels.dpc_knn(x, N // 4, backend=backend)
        extra = peak_memory(lambda x=x, N=N: hotkernels.dpc_knn(x, N // 4, backend=backend), "cuda")
        assert extra is not None
        assert extra <= 2 * x.numel() * 4 + B * N * 1024  # [B, N, N] would be 537 and 1074 MB


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_samples_that_fit_the_chip_take_no_scratch(backend: str) -> None:
    """With thread-block clusters. The launches that stand in for them give the same answers, but later."""
    if torch.cuda.get_device_capability() not in ((9, 0), (10, 0), (10, 3)):
        pytest.skip("the kernel with clusters is compiled for sm_90 and sm_100 only")
    for N in (243, 352):
        x = torch.randn(64, N, 64)
        hotkernels.dpc_knn(x, 81, 2, backend=backend)
        extra = peak_memory(lambda x=x: hotkernels.dpc_knn(x, 81, 2, backend=backend), "cuda")
        assert extra is not None
        assert extra <= 64 * N * 32  # the answers; the launches hold 40 MB of partial products


@on_any_gpu
def test_attention_holds_no_matrix_of_logits(backend: str) -> None:
    if backend not in KERNELS["gathered_attention"]:
        pytest.skip(f"gathered_attention has no {backend} kernel")
    args = [torch.randn(1, 8, 8192, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def call() -> None:
        out = hotkernels.gathered_attention(*args, backend=backend)
        torch.autograd.grad(out, args, torch.ones_like(out))

    call()
    extra = peak_memory(call, "cuda")
    assert extra is not None
    assert extra <= 16 * args[0].numel() * 2  # 134 MB; the logits would be 1 GB


# ---- values ----------------------------------------------------------------------------------------------------------


@each_op(cases=True, dtypes=(torch.float32, torch.bfloat16))
def test_the_same_bits_every_time(op: OpCase, backend: str, dtype: torch.dtype, case: str) -> None:
    call = calling(op, backend, op.inputs[case](dtype))
    expected = call()
    for _ in range(10):
        assert_same(call(), expected)


# ---- errors ----------------------------------------------------------------------------------------------------------

# An earlier kernel of somebody else's failed: whatever is launched from then on is refused. Prints the refusal.
REFUSED = """
import contextlib, torch, hotkernels
x, index = torch.randn(2, 9, 4, device="cuda"), torch.zeros(2, 3, dtype=torch.int64, device="cuda")
hotkernels.gather_tokens(x, index, backend="cuda")
with contextlib.suppress(RuntimeError):
    x[torch.full((2,), 1 << 20, device="cuda")]
    torch.cuda.synchronize()
try:
    hotkernels.gather_tokens(x, index, backend="cuda")
except RuntimeError as error:
    print(error)
"""


def test_a_refused_launch_is_an_error_in_the_one_form() -> None:
    run = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True)
    assert "gather_tokens: launch must be accepted by the GPU, got " in run.stdout, run.stdout + run.stderr[-2000:]


# ---- modules ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Any:
    """Tensors that a test makes are on the GPU; each op is served by the backend that it chooses."""
    with torch.device("cuda"):
        yield


def test_modules_give_what_the_published_ones_give(gpu: None) -> None:
    for options in OPTIONS:
        ours, eager = pair(Attention, AttentionEager, 64, **options)
        for shape in ((3, 17, 64), (2, 243, 64)):
            assert_as_published(ours, eager, lambda m, x: m(x), [torch.randn(shape)])
        ours, eager = pair(TokenRecovery, TokenRecoveryEager, 64, 243, **options)
        assert_as_published(ours, eager, lambda m, x: m(x), [torch.randn(2, 81, 17, 64)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_under_autocast(gpu: None, dtype: torch.dtype) -> None:
    assert_as_published_under_autocast(Attention, AttentionEager, (32,), (3, 17, 32), dtype, "cuda")
    assert_as_published_under_autocast(TokenRecovery, TokenRecoveryEager, (32, 27), (2, 9, 5, 32), dtype, "cuda")


def test_the_hourglass_in_a_graph_without_waiting(gpu: None) -> None:
    module, first, second = hourglass(), torch.randn(2, 27, 5, 16), torch.randn(2, 27, 5, 16)
    x = first.clone().requires_grad_()
    inputs = [x, *module.parameters()]

    def call() -> list[Tensor]:
        out = module(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    out, replay = captured(call)
    for values in (second, first):
        overwrite({"x": x}, {"x": values})
        replay()
        for ours, plain in zip(out, call(), strict=True):
            torch.testing.assert_close(ours, plain)
