"""Gate on Triton kernels without a GPU: they compile for every generation, within the limits that they are held to."""

from __future__ import annotations

import json
from collections.abc import Iterator

import cuda_resources
import pytest
import torch
from conftest import EMULATED

triton = pytest.importorskip("triton")
if EMULATED:
    pytest.skip("under the interpreter nothing is compiled", allow_module_level=True)

import triton_resources  # noqa: E402  # imports triton
from emulation.driver import STREAM, StubDriver, meant, on_a_gpu, stub_driver  # noqa: E402


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
    limits = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
    over = {
        (name, generation): needs["shared_bytes"]
        for name, generations in resources.items()
        for generation, needs in generations.items()
        if needs["shared_bytes"] > limits[generation]
    }
    assert not over


def test_one_tf32_product_takes_rounded_operands() -> None:
    """What is multiplied is rounded to TF32 by an instruction: tensor cores cut it off."""
    target = triton_resources.GENERATIONS["sm_90"]
    with triton_resources.recorded(target) as jobs:  # what was planned for "highest" must not serve "high"
        triton_resources.attend((4,), 2, 243, 243, 64, torch.float32, added=True)
    assert all("tf32x3" in job.constants for job in jobs)
    torch.set_float32_matmul_precision("high")
    try:
        with triton_resources.recorded(target) as jobs:
            triton_resources.attend((4,), 2, 243, 243, 64, torch.float32, added=True)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(jobs) == 4
    for job in jobs:
        assert "tf32" in job.constants
        source, options = job.variant.source()
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]
        assert "cvt.rna.tf32.f32" in ptx, job.kernel.__name__


def test_lengths_and_batches_compile_nothing_new() -> None:
    """Machine code depends on classes of sizes, not on sizes: one kernel serves 12 to 24 tokens... of any number."""
    target = triton_resources.GENERATIONS["sm_90"]
    for sizes in (((7, 17), (64, 18), (3888, 31)), ((2, 241), (3, 242), (7, 243), (16, 244))):
        variants = set()
        for B, N in sizes:
            with triton_resources.recorded(target) as jobs:
                triton_resources.self_attend(B, N, 8, 64, triton_resources.HALF)
            variants.add(tuple(job.variant for job in jobs))
        assert len(variants) == 1


@pytest.fixture(scope="module")
def driver(resources: triton_resources.Resources) -> Iterator[StubDriver]:
    """Depends on the resources: compiled kernels then come from Triton's cache."""
    if torch.cuda.is_available():
        pytest.skip("here is a GPU, and a driver that runs what it is given")
    with stub_driver() as driver:
        yield driver


def test_what_is_launched_reaches_the_driver(driver: StubDriver, resources: triton_resources.Resources) -> None:
    """Through Triton's own launcher: every parameter in its place, programs, threads and the stream; each time anew."""
    for name, job in triton_resources.jobs_on(triton_resources.GENERATIONS["sm_90"]).items():
        job = on_a_gpu(job)
        (seen,) = driver.seen(job)
        assert seen.parameters == meant(job), name
        assert (seen.grid, seen.threads) == ((job.programs, 1, 1), (32 * job.num_warps, 1, 1)), name
        assert (seen.stream, seen.shared_bytes) == (STREAM, resources[name]["sm_90"]["shared_bytes"]), name
        again = job._replace(programs=7, numbers=tuple(n + 1 for n in job.numbers))
        (seen,) = driver.seen(again)
        assert (seen.parameters, seen.grid) == (meant(again), (7, 1, 1)), name


def test_a_refused_launch_is_an_error(driver: StubDriver) -> None:
    job = next(iter(triton_resources.jobs_on(triton_resources.GENERATIONS["sm_90"]).values()))
    with driver.refusing(), pytest.raises(RuntimeError, match="too many resources requested for launch"):
        driver.seen(on_a_gpu(job))


def test_alignment_is_looked_at_in_every_call() -> None:
    """What runs is worked out once for tensors of the same layout, which may start anywhere."""
    memory = torch.empty(2 * 17 * 3 * 2 * 64 + 8, dtype=torch.bfloat16)
    with triton_resources.recorded(triton_resources.GENERATIONS["sm_90"]) as jobs:
        for start in (0, 1, 8, 2):
            query, key, value = memory[start:][: 2 * 17 * 3 * 2 * 64].view(2, 17, 3, 2, 64).permute(2, 0, 3, 1, 4)
            triton_resources.forward.gathered_attention_fwd(query, key, value, None, None, None, 1.0)
    assert [job.aligned for job in jobs] == [True, False, True, False]
