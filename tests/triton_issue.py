"""How long an H200 takes to issue what Triton's kernels execute: counted in their machine code, without a GPU.

`python tests/triton_issue.py` prints the column "issue" of bench/results/expected.md: programs x warps x instructions,
those of loops as often as they run, over 132 x 4 schedulers that issue one per cycle at 1.755 GHz.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton_resources
from triton_resources import GENERATIONS, WORKLOADS, Recorded, recorded

from hotkernels.launcher import cdiv

ISSUED_PER_US = 132 * 4 * 1755  # by all schedulers
TARGET = GENERATIONS["sm_90"]


def machine_code(launch: Recorded) -> tuple[list[str], list[tuple[int, int]]]:
    """A kernel's instructions, and its branches as (from, to): places in the list."""
    source, options = launch.variant.source()
    cubin = triton.compile(source, target=TARGET, options=options).asm["cubin"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(instruction[1])
        elif label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
    jumps = {i: re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction) for i, instruction in enumerate(code)}
    branches = [(i, labels[jump[1]]) for i, jump in jumps.items() if jump is not None]
    end = next(i for i, to in branches if i == to)  # a kernel's code ends in a branch to itself and padding
    return code[:end], [branch for branch in branches if branch[0] < end]


def trips(job: triton_resources.launcher.Launch) -> list[int]:
    """How often a kernel's loops run, in the order in which they begin; a loop of one trip is none."""
    names = [name for name in job.kernel.arg_names if not name.endswith("_ptr")]
    of = dict(zip(names, (*job.numbers, *job.constants), strict=True))
    if "per_query_keys" in job.kernel.__name__:
        return [cdiv(of["Nq"] * of["S"], of["Nk"] * of["BLOCK_M"])]  # where tokens are named equally often
    if "keys" in job.kernel.__name__:
        return [cdiv(of["Nq"], of["BLOCK_M"])]
    block = of.get("BLOCK_N") or of["BLOCK_S"]
    blocks = cdiv(of["S"], block)
    if of.get("SHARED_QUERY"):
        return [of["sequences_per_program"], blocks]
    return [blocks, cdiv(of["Nk"], block)]  # the second: gradients of tokens that no slot names


def executed(code: list[str], branches: list[tuple[int, int]], runs: list[int]) -> int:
    """Instructions that a warp executes; what a branch within a loop leaves out, only the last time.

    That is how kernels treat slots beyond the last one. A branch around a loop, which may have no trip, is never taken.
    """
    times = [1] * len(code)
    loops = sorted((to, i + 1) for i, to in branches if to <= i)
    trips_of = dict(zip(loops, runs, strict=False))
    for (begin, end), n in trips_of.items():
        times[begin:end] = [t * n for t in times[begin:end]]
    for i, to in branches:
        around = [(begin, end) for begin, end in loops if begin <= i < to < end]
        if around and not any(i < begin < to for begin, _ in loops):
            times[i + 1 : to] = [t // trips_of[around[-1]] for t in times[i + 1 : to]]
    return sum(times)


def issue(launch: Recorded) -> dict[str, float]:
    """Microseconds, and what they come from."""
    warp = executed(*machine_code(launch), trips(launch.job))
    programs, warps = launch.job.programs, launch.job.num_warps
    return {"us": programs * warps * warp / ISSUED_PER_US, "programs": programs, "warps": warps, "instructions": warp}


def main() -> None:
    """The first workloads: those of 16 samples."""
    for name, call in itertools.islice(WORKLOADS.items(), 12):
        with recorded(TARGET) as launches:
            call()
        for launch in launches:
            found = issue(launch)
            print(
                f"{name}, {launch.job.kernel.__name__}: {found['us']:.0f} us, {found['programs']} programs of "
                f"{found['warps']} warps of {found['instructions']} instructions"
            )


if __name__ == "__main__":
    main()
