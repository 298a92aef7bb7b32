"""Compiles the CUDA library and reads what ptxas says each kernel needs on each GPU generation.

`python tests/cuda_resources.py` writes data/cuda_resources.json, the limits that test_build.py holds kernels to;
`python tests/cuda_resources.py dpc_knn` renews those of dpc_knn.cu and leaves others as they are.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).parent / "data/cuda_resources.json"
BUILD = ROOT / "build/cuda_check"
LIBRARY = BUILD / "_C_cuda.abi3.so"

# kernel -> generation -> what it needs
Resources = dict[str, dict[str, dict[str, int]]]


def build_script() -> ModuleType:
    """setup.py as a module: the one place that knows the flags."""
    spec = importlib.util.spec_from_file_location("hotkernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_library() -> Path:
    """Build _C_cuda beside, not instead of, the package's own, with every .cu for every generation."""
    build_script().build_library("_C_cuda", LIBRARY, BUILD)
    return LIBRARY


def nvcc_release() -> str:
    """The toolkit, as in "13.0": another one allocates registers differently."""
    nvcc = build_script().find_nvcc() / "bin/nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    assert found is not None, said
    return found[1]


def demangle(symbol: str) -> str:
    """`gather_tokens_fwd_kernel<float, 4, true>`, without namespaces and arguments."""
    said = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+(?:<.*>)?)\(", said.replace("(anonymous namespace)", ""))
    return found[1] if found else said.strip()


def measured(sources: str = "*") -> Resources:
    """What ptxas reported when the library was compiled."""
    resources: Resources = {}
    for source in sorted((ROOT / "csrc/cuda").glob(f"{sources}.cu")):
        needs: dict[str, int] = {}
        for line in (BUILD / f"{source.name}.o.ptxas").read_text().splitlines():
            if entry := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
                needs = resources.setdefault(demangle(entry[1]), {}).setdefault(entry[2], {})
            elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                needs["spill_bytes"] = int(spill[1]) + int(spill[2])
            elif used := re.search(r"Used (\d+) registers", line):
                shared = re.search(r"(\d+) bytes smem", line)
                needs["registers"] = int(used[1])
                needs["shared_bytes"] = int(shared[1]) if shared else 0
    return resources


def over(kernels: Resources, limits: Resources) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(kernel, generation, what) -> (what it needs, its limit), where it needs more."""
    return {
        (name, generation, what): (count, limits[name][generation][what])
        for name, generations in kernels.items()
        for generation, needs in generations.items()
        for what, count in needs.items()
        if count > limits[name][generation][what]
    }


if __name__ == "__main__":
    compile_library()
    kernels = measured()
    if sources := sys.argv[1:]:
        limits = json.loads(TABLE.read_text())["kernels"]
        kernels = {name: needs for name, needs in limits.items() if name in kernels}
        for source in sources:
            kernels |= measured(source)
    TABLE.write_text(json.dumps({"nvcc": nvcc_release(), "kernels": kernels}, indent=1, sort_keys=True) + "\n")
    print(f"wrote {TABLE.relative_to(ROOT)}: {len(kernels)} kernels")
