"""Gate on Triton kernels without a GPU: they compile for every generation, within the limits that they are held to."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any
from unittest import mock

import cuda_resources
import pytest
import torch
from conftest import EMULATED

triton = pytest.importorskip("triton")
if EMULATED:
    pytest.skip("under the interpreter nothing is compiled", allow_module_level=True)

import triton_issue  # noqa: E402  # imports triton
import triton_resources  # noqa: E402
from emulation.driver import STREAM, StubDriver, meant, on_a_gpu, stub_driver  # noqa: E402

from bench import gpu_tune  # noqa: E402
from hotkernels import launcher  # noqa: E402
from hotkernels.launcher import Launch  # noqa: E402


@pytest.fixture(scope="module")
def resources() -> triton_resources.Resources:
    return triton_resources.measured()


def test_triton_compiles_for_every_generation_within_its_limits(resources: triton_resources.Resources) -> None:
    tables = json.loads(triton_resources.TABLE.read_text())
    for version, table in tables.items():
        assert resources.keys() == table.keys(), f"with triton {version}: python tests/triton_resources.py"
    assert all(needs.keys() == triton_resources.GENERATIONS.keys() for needs in resources.values())
    if triton_resources.VERSION not in tables:
        pytest.skip(f"compiled, but the limits are for triton {', '.join(tables)}, this is {triton.__version__}")
    assert not cuda_resources.over(resources, tables[triton_resources.VERSION]), (
        "(needs, limit); where it is meant: python tests/triton_resources.py"
    )


def test_launches_fit_every_generation(resources: triton_resources.Resources) -> None:
    """Shared memory is a hard limit: a kernel beyond it would not start."""
    limits = {name: triton_resources.SHARED_BYTES[g.arch] for name, g in triton_resources.GENERATIONS.items()}
    over = {
        (name, generation): needs["shared_bytes"]
        for name, generations in resources.items()
        for generation, needs in generations.items()
        if needs["shared_bytes"] > limits[generation]
    }
    assert not over


def test_products_on_hopper_do_not_overlap_with_what_follows(resources: triton_resources.Resources) -> None:
    """Before CUDA 13.3 ptxas may overwrite what an unfinished product reads from registers (triton #11781)."""
    target, waits = triton_resources.GENERATIONS["sm_90"], {}
    for name, launch in triton_resources.jobs_on(target).items():
        source, options = launch.variant.source()
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]  # from Triton's cache
        waits[name] = re.findall(r"wgmma\.wait_group\S* (\d+)", ptx.expandtabs(1))
    assert any(waits.values())
    assert not {name for name, pending in waits.items() if set(pending) - {"0"}}


def test_instructions_count_as_often_as_they_run() -> None:
    """Three runs of 2..9, of which 4 and 5 run once; in each, seven of 7..8, though a branch leads around them."""
    branches = [(3, 6), (6, 9), (8, 7), (9, 2)]
    once, outer, inner = 2 + 2, 2 + 1 + 1, 2
    assert triton_issue.executed(["an instruction"] * 12, branches, [3, 7]) == once + 2 + 3 * outer + 3 * 7 * inner
    assert triton_issue.executed(["an instruction"] * 12, [], [3, 7]) == 12


def test_loops_run_as_often_as_their_blocks_say() -> None:
    """From one block of slots to the next, what a warp executes grows by what it executes in the loop."""

    def instructions(N: int) -> list[float]:
        with triton_resources.recorded(triton_issue.TARGET) as launches:
            triton_resources.self_attend(1, N, 1, 64, torch.float32)
        return [triton_issue.issue(launch)["instructions"] for launch in launches]

    forward, *backward = zip(*map(instructions, (243, 259, 307)), strict=True)  # 8, 9 and 10 blocks of 32
    assert 0 < forward[2] - forward[1] == forward[1] - forward[0]
    assert len(backward) == 2


def test_no_compiler_fuses_the_scale_with_the_subtraction_of_the_maximum() -> None:
    """In one FFMA, exp2 would overflow: test_logits_beyond_the_integers_of_float32, which sees what LLVM does only."""
    forward = {name: job for name, job in triton_resources.jobs_on(triton_issue.TARGET).items() if "fwd" in name}
    for name, launch in forward.items():
        made_by: dict[str, str] = {}  # register -> the instruction that wrote it
        exponents = []
        for instruction in triton_issue.machine_code(launch)[0]:
            operation, *registers = re.findall(r"[A-Z][\w.]*", re.sub(r"^@!?\w+ ", "", instruction))
            if operation == "MUFU.EX2":
                exponents.append(made_by[registers[-1]])
            if registers:
                made_by[registers[0]] = operation
        assert exponents
        assert set(exponents) == {"FADD"}, name
    assert len(forward) > 20


def test_blocks_are_planned_for_each_gpu() -> None:
    """Tensors of the same layout, on GPUs that differ in shared memory."""
    blocks = {}
    for name in ("sm_80", "sm_89", "sm_90"):
        with triton_resources.recorded(triton_resources.GENERATIONS[name]) as launches:
            triton_resources.self_attend(4, 243, 8, 64, triton_resources.HALF)
        blocks[name] = launches[-1].job.constants[2:4]
    assert blocks == {"sm_80": (256, 64), "sm_89": (256, 32), "sm_90": (256, 64)}


@pytest.mark.parametrize(
    ("generation", "D", "dtype", "added", "queries", "keys"),
    [
        ("sm_80", 32, torch.float32, False, (64, 16, 4), (16, 64, 4)),
        ("sm_80", 64, torch.float32, False, (32, 64, 8), (64, 32, 8)),
        ("sm_90", 32, torch.float32, False, (64, 32, 4), (32, 64, 4)),  # 32 channels as 64
        ("sm_90", 64, torch.float32, True, (64, 16, 4), (16, 64, 4)),
        ("sm_90", 64, torch.bfloat16, False, (128, 64, 8), (64, 128, 8)),  # as everywhere
        ("sm_90", 128, torch.bfloat16, False, (64, 32, 4), (32, 64, 4)),
        ("sm_90", 128, torch.bfloat16, True, (64, 32, 4), (32, 64, 8)),  # a bias has no room in the one above
    ],
)
def test_blocks_are_the_nearest_in_their_tables(
    generation: str, D: int, dtype: torch.dtype, added: bool, queries: tuple[int, ...], keys: tuple[int, ...]
) -> None:
    with triton_resources.recorded(triton_resources.GENERATIONS[generation]) as launches:
        triton_resources.attend((4,), 2, 300, 300, D, dtype, added=added)
    made = [(*launch.job.constants[2:4], launch.job.num_warps) for launch in launches]
    assert made[1:3] == [queries, keys]


@pytest.mark.parametrize("arg", ["query", "key", "index"])
def test_what_kernels_count_in_32_bits_is_less_than_they_hold(arg: str) -> None:
    most = 2**31 - 4097
    for n in (most, most + 1, 2**32 + 1):
        query, key = (torch.empty(1, 1, n if name == arg else 5, 16, device="meta") for name in ("query", "key"))
        index = torch.empty(1, n if arg == "index" else 5, dtype=torch.int64, device="meta")
        error = rf"^gathered_attention: {arg} must be of fewer than 2\^31 - 4096 [a-z]+ on a GPU, got {n}$"
        refused = contextlib.nullcontext() if n == most else pytest.raises(ValueError, match=error)
        with refused, triton_resources.recorded(triton_resources.GENERATIONS["sm_90"]):
            triton_resources.forward.gathered_attention_fwd(query, key, key, index, None, None, 1.0)


@pytest.mark.parametrize(("Nq", "Nk", "K"), [(2**30 - 1024, 5, 1), (5, 2**30 - 1024, 1), (2**30 - 1024, 5, 2)])
def test_an_index_per_query_is_counted_in_64_bits_before_a_block_passes_32(Nq: int, Nk: int, K: int) -> None:
    """2**31 - 2048 queries or keys of two samples, or slots of one: their last block may end beyond 2**31."""
    B = 2 // K
    counted = {}
    for less in (0, 1):
        query, key = (torch.empty(B, 1, n - less, 16, device="meta") for n in (Nq, Nk))
        lse = torch.empty(B, 1, Nq - less, device="meta")
        index, slots, start = (
            torch.empty(B, *shape, dtype=torch.int64, device="meta")
            for shape in ((Nq - less, K), ((Nq - less) * K,), (Nk - less + 1,))
        )
        with triton_resources.recorded(triton_resources.GENERATIONS["sm_90"]) as launches:
            triton_resources.backward.gathered_attention_bwd(
                query, None, query, key, key, query, lse, index, start, slots, None, None, 1.0, False, False
            )
        counted[less] = [launch.job.constants[-1] for launch in launches]
    assert counted == {0: [triton.language.int64] * 2, 1: [triton.language.int32] * 2}


def test_kernels_use_what_they_take() -> None:
    """Strides that a kernel does not use would decide how it reads rows, too."""
    jobs = triton_resources.jobs_on(triton_resources.GENERATIONS["sm_90"]).values()
    kernels = {recorded.job.kernel for recorded in jobs}
    assert len(kernels) == 9
    for kernel in kernels:
        (function,) = ast.parse(kernel.src).body
        assert isinstance(function, ast.FunctionDef)
        used = {node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
        assert set(kernel.arg_names) <= used, kernel.__name__


def test_only_strides_that_a_kernel_takes_decide_how_it_reads_rows() -> None:
    """Of the two kernels of a long float32 backward pass, the one for keys does not read out."""
    query, key, value, grad_out = torch.empty(4, 2, 2, 243, 64, device="meta")
    out, lse = torch.empty(2, 2, 243, 65, device="meta")[..., :64], torch.empty(2, 2, 243, device="meta")
    with triton_resources.recorded(triton_resources.GENERATIONS["sm_90"]) as launches:
        triton_resources.backward.gathered_attention_bwd(
            grad_out, None, query, key, value, out, lse, None, None, None, None, None, 1.0, False, False
        )
    assert [launch.job.aligned for launch in launches] == [False, True]


def test_one_tf32_product_takes_rounded_operands() -> None:
    """What is multiplied is rounded to TF32 by an instruction: tensor cores cut it off."""
    target = triton_resources.GENERATIONS["sm_90"]
    with triton_resources.recorded(target) as launches:  # what was planned for "highest" must not serve "high"
        triton_resources.attend((4,), 2, 243, 243, 64, torch.float32, added=True)
    assert all("tf32x3" in launch.job.constants for launch in launches)
    torch.set_float32_matmul_precision("high")
    try:
        with triton_resources.recorded(target) as launches:
            triton_resources.attend((4,), 2, 243, 243, 64, torch.float32, added=True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(launches) == 4
    for launch in launches:
        assert "tf32" in launch.job.constants
        source, options = launch.variant.source()
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]
        assert "cvt.rna.tf32.f32" in ptx, launch.job.kernel.__name__


def test_lengths_and_batches_compile_nothing_new() -> None:
    """Machine code depends on classes of sizes, not on sizes: one kernel serves 12 to 24 tokens... of any number."""
    target = triton_resources.GENERATIONS["sm_90"]
    for sizes in (((7, 17), (64, 18), (3888, 31)), ((2, 241), (3, 242), (7, 243), (16, 244))):
        variants = set()
        for B, N in sizes:
            with triton_resources.recorded(target) as launches:
                triton_resources.self_attend(B, N, 8, 64, triton_resources.HALF)
            variants.add(tuple(launch.variant for launch in launches))
        assert len(variants) == 1


@pytest.mark.parametrize("workload", ["9 tokens, D=16, bf16", "9 tokens, D=16, f32", "243 tokens, bf16"])
def test_tuning_tries_nothing_twice(workload: str) -> None:
    """What is offered under another name is another launch: times of the same one differ by noise only."""
    call, target = triton_resources.WORKLOADS[workload], triton_resources.GENERATIONS["sm_90"]

    def launched(name: str, blocks: Any) -> tuple[launcher.Variant, ...]:
        with triton_resources.recorded(target) as launches, gpu_tune.replaced(name, lambda problem: blocks):
            call()
        return tuple(launch.variant for launch in launches)

    with triton_resources.recorded(target):
        choices = gpu_tune.chosen(call)
    assert "fused_blocks" in choices
    for name, choice in choices.items():
        offered = [launched(name, blocks) for blocks in gpu_tune.neighbours(name, choice)]
        assert len(set(offered)) == len(offered) > 1, name


@pytest.fixture(scope="module")
def driver(resources: triton_resources.Resources) -> Iterator[StubDriver]:
    """Depends on the resources: compiled kernels then come from Triton's cache."""
    if torch.cuda.is_available():
        pytest.skip("here is a GPU, and a driver that runs what it is given")
    with stub_driver() as driver:
        yield driver


def launches_on_sm_90() -> Iterator[tuple[str, Launch, Sequence[torch.Tensor | None]]]:
    """Names, launches that remember nothing compiled for another driver, and their tensors."""
    for name, (job, tensors) in triton_resources.jobs_on(triton_resources.GENERATIONS["sm_90"]).items():
        yield name, replace(job, compiled={}), tensors


def test_a_gpu_is_what_the_driver_says(driver: StubDriver) -> None:
    assert launcher.gpu(0) == triton_resources.gpu(90) == (triton_resources.SHARED_BYTES[90], True)
    assert launcher.gpu(torch.empty(0).get_device()) == (math.inf, True)
    for capability, version in (((10, 0), None), ((8, 0), None), ((9, 4), "a release of ROCm")):  # gfx942 says 9.4
        launcher.gpu.cache_clear()
        with (
            mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
            mock.patch.object(torch.version, "hip", version),
        ):
            assert not launcher.gpu(0).warp_groups
    launcher.gpu.cache_clear()


def test_what_is_launched_reaches_the_driver(driver: StubDriver, resources: triton_resources.Resources) -> None:
    """Through Triton's own launcher: every parameter in its place, programs, threads and the stream; each time anew."""
    for name, job, tensors in launches_on_sm_90():
        addresses = on_a_gpu(tensors)
        (seen,) = driver.seen(job, addresses)
        assert seen.parameters == meant(job, addresses), name
        assert (seen.grid, seen.threads) == ((job.programs, 1, 1), (32 * job.num_warps, 1, 1)), name
        assert (seen.stream, seen.shared_bytes) == (STREAM, resources[name]["sm_90"]["shared_bytes"]), name
        again = replace(job, programs=7, numbers=tuple(n + 1 for n in job.numbers))
        (seen,) = driver.seen(again, addresses)
        assert (seen.parameters, seen.grid) == (meant(again, addresses), (7, 1, 1)), name


def test_a_refused_launch_is_an_error(driver: StubDriver) -> None:
    _, job, tensors = next(launches_on_sm_90())
    with driver.refusing("launch"), pytest.raises(RuntimeError, match="too many resources requested for launch"):
        driver.seen(job, on_a_gpu(tensors))


def test_what_did_not_load_is_loaded_by_the_next_call(driver: StubDriver) -> None:
    """A driver loads nothing while a stream is captured, for one."""
    _, job, tensors = next(launches_on_sm_90())
    addresses = on_a_gpu(tensors)
    launcher._compiled.cache_clear()
    for _ in range(2):
        with driver.refusing("load"), pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            driver.seen(job, addresses)
    (seen,) = driver.seen(job, addresses)
    assert seen.parameters == meant(job, addresses)


def test_threads_wait_for_what_one_of_them_loads(driver: StubDriver) -> None:
    """A driver lets other threads run while it loads: none may launch what is not there yet, or load it again."""
    _, job, tensors = next(launches_on_sm_90())
    addresses, utils = on_a_gpu(tensors), triton.runtime.driver.active.utils
    load = utils.load_binary
    launcher._compiled.cache_clear()
    with ThreadPoolExecutor(1) as other:
        others: list[Future[None]] = []

        def slow(*args: Any) -> Any:
            others.append(other.submit(launcher.launch, replace(job, compiled={}), *addresses))
            wait(others, 0.2)
            return load(*args)

        with mock.patch.object(utils, "load_binary", slow):
            launcher.launch(job, *addresses)
            for one in others:
                one.result(10)
    assert len(others) == 1


def test_each_device_and_alignment_has_machine_code_of_its_own(driver: StubDriver) -> None:
    """Compiled once, loaded and launched where the tensors are, on that device's stream."""
    _, job, tensors = next(launches_on_sm_90())
    with (
        mock.patch.object(launcher, "_compiled", wraps=launcher._compiled) as compiled,
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()) as entered,
    ):
        for device, offset in ((0, 0), (0, 0), (0, 8), (1, 0), (0, 8), (1, 0), (0, 0)):
            addresses = on_a_gpu(tensors, device, offset)
            entered.reset_mock()
            (seen,) = driver.seen(job, addresses)
            assert (seen.parameters, seen.stream) == (meant(job, addresses), STREAM + device)
            assert entered.called or device == 0  # the current one
    made = [(bool(variant.aligned), device) for (variant, device), _ in compiled.call_args_list]
    assert made == [(True, 0), (False, 0), (True, 1)]


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_profilers_are_called(driver: StubDriver, which: str) -> None:
    _, job, tensors = next(launches_on_sm_90())
    addresses, names = on_a_gpu(tensors), []
    chain = getattr(triton.knobs.runtime, which)

    def hook(metadata: Any) -> None:
        names.append(None if metadata is None else metadata.get()["name"])

    driver.seen(job, addresses)
    chain.add(hook)
    try:
        (seen,) = driver.seen(job, addresses)
    finally:
        chain.remove(hook)
    driver.seen(job, addresses)
    assert names == [job.kernel.__name__]
    assert seen.parameters == meant(job, addresses)


def test_alignment_is_looked_at_in_every_call() -> None:
    """What runs is worked out once for tensors of the same layout, which may start anywhere."""
    memory = torch.empty(2 * 17 * 3 * 2 * 64 + 8, dtype=torch.bfloat16)
    with triton_resources.recorded(triton_resources.GENERATIONS["sm_90"]) as launches:
        for start in (0, 1, 8, 2):
            query, key, value = memory[start:][: 2 * 17 * 3 * 2 * 64].view(2, 17, 3, 2, 64).permute(2, 0, 3, 1, 4)
            triton_resources.forward.gathered_attention_fwd(query, key, value, None, None, None, 1.0)
    assert [bool(launch.variant.aligned) for launch in launches] == [True, False, True, False]


def test_where_an_index_or_a_bias_starts_changes_nothing_in_how_rows_are_read() -> None:
    """It would change the order of sums, and a batch would not give what its samples give one by one."""
    B, H, N, S = 2, 2, 20, 8
    query, key, value, grad_out = torch.empty(4, B, N, H, 64).transpose(2, 3)

    def starting(first: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(first + math.prod(shape), dtype=dtype)[first:].view(shape)

    variants = []
    for first in (0, 1):
        index, start, slots = (starting(first, B, n, dtype=torch.int64) for n in (S, N + 1, S))
        bias, key_bias, lse = (starting(first, *shape) for shape in ((B, H, N, S), (B, N), (B, H, N)))
        with triton_resources.recorded(triton_resources.GENERATIONS["sm_90"]) as launches:
            out, _ = triton_resources.forward.gathered_attention_fwd(query, key, value, index, bias, key_bias, 1.0)
            triton_resources.backward.gathered_attention_bwd(
                grad_out, lse, query, key, value, out, lse, index, start, slots, bias, key_bias, 1.0, True, True
            )
        variants.append([launch.variant for launch in launches])
    assert variants[0] == variants[1]
    assert len(variants[0]) > 2
    assert all(variant.aligned for variant in variants[0])
