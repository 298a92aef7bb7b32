"""Compiles every Triton kernel ahead of time, as its launcher would on typical workloads, for each GPU generation.

`python tests/triton_resources.py` writes the running Triton's table into data/triton_resources.json, the limits that
test_triton_kernels.py holds kernels to; versions of Triton allot registers differently. No GPU is needed: the public
functions run on meta tensors, and what they would launch is compiled.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from hotkernels import launcher
from hotkernels.launcher import Launch
from hotkernels.ops.gathered_attention import launches as forward
from hotkernels.ops.gathered_attention import launches_backward as backward

TABLE = Path(__file__).parent / "data/triton_resources.json"
GENERATIONS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}  # of a block
VERSION = ".".join(triton.__version__.split(".")[:2])
HALF, FLOAT = torch.bfloat16, torch.float32

# kernel and workload -> generation -> what it needs. The file has one for each version of Triton.
Resources = dict[str, dict[str, dict[str, int]]]


def attend(
    batch: tuple[int, ...],
    H: int,
    Nq: int,
    Nk: int,
    D: int,
    dtype: torch.dtype,
    kind: str = "dense",
    S: int = 0,
    added: bool = False,
) -> None:
    """gathered_attention's launchers, forward and backward, on tensors without data."""
    make = partial(torch.empty, device="meta")
    query, key, value = (make(*batch, N, H, D, dtype=dtype).transpose(-2, -3) for N in (Nq, Nk, Nk))
    index = start = slots = None
    if kind != "dense":
        index = make(
            {"set": (batch[0], S), "query": (*batch, Nq, S), "head": (*batch, H, Nq, S)}[kind], dtype=torch.int64
        )
        rows = index if kind == "set" else index.flatten(-2)
        start, slots = make(*rows.shape[:-1], Nk + 1, dtype=torch.int64), torch.empty_like(rows)
    bias = make(1, H, Nq, S or Nk) if added else None
    key_bias = make(*batch, Nk) if added else None
    out, lse = forward.gathered_attention_fwd(query, key, value, index, bias, key_bias, 1.0)
    backward.gathered_attention_bwd(
        out, None, query, key, value, out, lse, index, start, slots, bias, key_bias, 1.0, added, added
    )


def attend_to_regions(regions: int, tokens: int, H: int, D: int, dtype: torch.dtype, S: int) -> None:
    """The launchers behind nn.BiLevelRoutingAttention: of keys of all regions, S for each, and gradients of slots."""
    query, key = (
        torch.empty(b, n, H, D, dtype=dtype, device="meta").transpose(1, 2)
        for b, n in ((regions, tokens), (1, regions * tokens))
    )
    index, key = torch.empty(regions, S, dtype=torch.int64, device="meta"), key.expand(regions, -1, -1, -1)
    out, lse = forward.gathered_attention_fwd(query, key, key, index, None, None, 1.0)
    backward.gathered_attention_bwd(
        out, None, query, key, key, out, lse, index, None, None, None, None, 1.0, False, False
    )


def self_attend(B: int, N: int, H: int, D: int, dtype: torch.dtype) -> None:
    """The launchers behind nn.Attention."""
    query, key, value = torch.empty(B, N, 3, H, D, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    out, lse = forward.gathered_attention_fwd(query, key, value, None, None, None, 1.0)
    backward.gathered_attention_packed_bwd(out, query, key, value, out, lse, 1.0)


def recover(batch: tuple[int, ...], H: int, L: int, M: int, D: int, dtype: torch.dtype) -> None:
    """recovery_attention's launchers, with a shared query."""
    query = torch.empty(L, H, D, dtype=dtype, device="meta").transpose(0, 1)
    key, value = (torch.empty(*batch, M, H, D, dtype=dtype, device="meta").transpose(-2, -3) for _ in range(2))
    out, lse = forward.recovery_attention_fwd(query, key, value, None, 1.0)
    backward.recovery_attention_bwd(out, query, key, value, out, lse, None, 1.0)


# What HoT-MixSTE and its like ask for (16 samples), and the edges of the launchers' tables.
WORKLOADS: dict[str, Callable[[], None]] = {
    "17 tokens, bf16": partial(self_attend, 3888, 17, 8, 64, HALF),
    "17 tokens, f32": partial(self_attend, 3888, 17, 8, 64, FLOAT),
    "81 tokens, bf16": partial(self_attend, 272, 81, 8, 64, HALF),
    "81 tokens, f32": partial(self_attend, 272, 81, 8, 64, FLOAT),
    "243 tokens, bf16": partial(self_attend, 272, 243, 8, 64, HALF),
    "243 tokens, f32": partial(self_attend, 272, 243, 8, 64, FLOAT),
    "81 of 243, bf16": partial(attend, (16, 17), 8, 243, 243, 64, HALF, "set", 81),
    "81 of 243, f32": partial(attend, (16, 17), 8, 243, 243, 64, FLOAT, "set", 81),
    "32 per query, bf16": partial(attend, (1,), 8, 16384, 16384, 64, HALF, "query", 32),
    "32 per query, f32": partial(attend, (1,), 8, 16384, 16384, 64, FLOAT, "query", 32),
    "recovery 243 from 81, bf16": partial(recover, (16, 17), 8, 243, 81, 64, HALF),
    "recovery 243 from 81, f32": partial(recover, (16, 17), 8, 243, 81, 64, FLOAT),
    "9 tokens, D=16, bf16": partial(attend, (15,), 8, 9, 9, 16, HALF),
    "9 tokens, D=16, f32": partial(attend, (15,), 8, 9, 9, 16, FLOAT),
    "5 of 9 with bias, D=16, f32": partial(attend, (15,), 8, 9, 9, 16, FLOAT, "set", 5, added=True),
    "17 tokens with bias, bf16": partial(attend, (100,), 8, 17, 17, 64, HALF, added=True),
    "243 tokens with bias, bf16": partial(attend, (100,), 8, 243, 243, 64, HALF, added=True),
    "243 tokens with bias, f32": partial(attend, (100,), 8, 243, 243, 64, FLOAT, added=True),
    "81 of 243 with bias, bf16": partial(attend, (100,), 8, 243, 243, 64, HALF, "set", 81, added=True),
    "81 of 243 with bias, f32": partial(attend, (100,), 8, 243, 243, 64, FLOAT, "set", 81, added=True),
    "D=32 with bias, f32": partial(attend, (100,), 8, 243, 243, 32, FLOAT, added=True),
    "243 tokens, D=32, f32": partial(self_attend, 100, 243, 8, 32, FLOAT),
    "81 of 243, D=32 with bias, f32": partial(attend, (100,), 8, 243, 243, 32, FLOAT, "set", 81, added=True),
    "32 per query, D=8 with bias, f32": partial(attend, (1,), 8, 999, 999, 8, FLOAT, "query", 32, added=True),
    "32 per head with bias, bf16": partial(attend, (1,), 8, 999, 999, 64, HALF, "head", 32, added=True),
    "regions of 64 tokens, D=32, bf16": partial(attend_to_regions, 784, 64, 2, 32, HALF, 64),
    "regions of 64 tokens, D=32, f32": partial(attend_to_regions, 784, 64, 2, 32, FLOAT, 64),
    "regions of 400 tokens, D=32, bf16": partial(attend_to_regions, 64, 400, 2, 32, HALF, 1600),
    "243 tokens, D=39, bf16": partial(attend, (100,), 8, 243, 243, 39, HALF),
    "D=39, bf16": partial(attend, (100,), 8, 351, 351, 39, HALF),
    "D=128, bf16": partial(attend, (100,), 4, 243, 243, 128, HALF),
    "D=128, f32": partial(attend, (100,), 4, 243, 243, 128, FLOAT),
    "D=256, bf16": partial(attend, (100,), 2, 243, 243, 256, HALF),
    "D=256, f32": partial(attend, (100,), 2, 243, 243, 256, FLOAT),
}


class Recorded(NamedTuple):
    """A launch and its tensors."""

    job: Launch
    tensors: tuple[torch.Tensor | None, ...]

    @property
    def variant(self) -> launcher.Variant:
        return self.job.variant(self.tensors)


def gpu(arch: int | str) -> launcher.GPU:
    """What blocks depend on, of a GPU of one of the generations."""
    return launcher.GPU(SHARED_BYTES[arch], warp_groups=arch == 90)


@contextmanager
def recorded(target: GPUTarget) -> Iterator[list[Recorded]]:
    """What the launchers would launch on a target, instead of launching it."""
    found: list[Recorded] = []

    def record(job: Launch, *tensors: torch.Tensor | None) -> None:
        found.append(Recorded(job, tensors))

    version = "recorded" if target.backend == "hip" else None
    with (
        mock.patch.object(forward, "launch", record),
        mock.patch.object(backward, "launch", record),
        mock.patch.object(forward, "gpu", return_value=gpu(target.arch)),
        mock.patch.object(backward, "gpu", return_value=gpu(target.arch)),
        mock.patch.object(torch.version, "hip", version),
    ):
        yield found


@functools.cache
def jobs_on(target: GPUTarget) -> dict[str, Recorded]:
    """`kernel: workload` -> the first workload's launch of each distinct machine code."""
    found: dict[launcher.Variant, tuple[str, Recorded]] = {}
    for workload, call in WORKLOADS.items():
        with recorded(target) as launches:
            call()
        for launch in launches:
            found.setdefault(launch.variant, (f"{launch.job.kernel.__name__}: {workload}", launch))
    return dict(found.values())


def needs(name: str, generation: str) -> dict[str, int]:
    """Compile one kernel: its registers, spilled or local bytes and shared memory."""
    target = GENERATIONS[generation]
    source, options = jobs_on(target)[name].variant.source()
    compiled = triton.compile(source, target=target, options=options)
    return {"shared_bytes": compiled.metadata.shared, **_registers(compiled)}


def _registers(compiled: triton.compiler.CompiledKernel) -> dict[str, int]:
    if "cubin" not in compiled.asm:
        asm = compiled.asm["amdgcn"]
        count = {what: int(n) for what, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", asm)}
        return {"registers": count["vgpr_count"], "spill_bytes": 4 * count["vgpr_spill_count"]}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert used is not None, said.stdout
    return {"registers": int(used[1]), "spill_bytes": int(used[2])}


def measured() -> Resources:
    """What each kernel needs on each generation; compiled kernels come from Triton's cache where it has them."""
    wanted = [(name, generation) for generation, target in GENERATIONS.items() for name in jobs_on(target)]
    resources: Resources = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for (name, generation), need in zip(
            wanted, pool.map(needs, *zip(*wanted, strict=True), chunksize=8), strict=True
        ):
            resources.setdefault(name, {})[generation] = need
    return resources


if __name__ == "__main__":
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    tables[VERSION] = measured()
    TABLE.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")
    print(f"wrote {TABLE.name}: {len(tables[VERSION])} kernels of triton {VERSION}")
