"""What the emulation is compiled to: the machine, what runs on it, and the CUDA kernels once more by way of PTX."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_resources

HERE = Path(__file__).parent
ROOT = cuda_resources.ROOT
BUILD = ROOT / "build/emulated_cuda"
MACHINE = BUILD / "libemulation.so"
LIBRARY = BUILD / "libemulated_cuda.so"  # whoever loads it gets its kernels for the CPU
SELFTEST = BUILD / "libselftest.so"
ARCHITECTURES = ("80", "90a")

# No contraction: sums that a compiler cannot rearrange. -O2, -O1: quick to compile.
COMMON = ["-std=c++20", "-fPIC", "-ffp-contract=off", f"-I{HERE}"]
COMMON += ["-U_FORTIFY_SOURCE"]  # which takes a fiber's longjmp for an attack
FLAGS = [*COMMON, "-O2", "-g1", "-Wall", "-Wno-unknown-pragmas"]
PTX_FLAGS = [*COMMON, "-O1", "-w"]
TRITON_FLAGS = [f"-I{BUILD}", *COMMON, "-O0", "-w"]  # many kernels that run once: g++ finds ptx_machine.h.gch there
INCLUDE = f"-I{ROOT / 'csrc/include'}"
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))


def _setup() -> tuple[Any, Path]:
    """setup.py, and where torch is."""
    setup = cuda_resources.build_script()
    found = setup.find_torch()
    if found is None or setup.find_compiler() is None:
        raise RuntimeError(setup.plan()[1][0])
    return setup, found[0]


class _Steps:
    """A ninja file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        setup = cuda_resources.build_script()
        compiler, link = setup.find_compiler(), os.environ.get("HOTKERNELS_LDFLAGS", "")
        nvcc = f"{setup.find_nvcc()}/bin/nvcc -std=c++20 -O3 {INCLUDE}"
        track = ["  depfile = $out.d", "  deps = gcc"]
        self.lines = [
            "rule cxx", f"  command = {compiler} $flags -MMD -MF $out.d -c $in -o $out", *track,
            "rule link", f"  command = {compiler} -shared $in -o $out -Wl,-rpath,{BUILD} {link} $flags",
            "rule ptx", f"  command = {nvcc} $flags -MD -MF $out.d -ptx $in -o $out", *track,
            "rule translate", f"  command = {sys.executable} {HERE / 'ptx.py'} $in $out",
        ]  # fmt: skip

    def add(self, rule: str, output: str, inputs: list[Any], flags: list[str], needs: str = "") -> str:
        words = " ".join(flag.replace("$", "$$") for flag in flags)
        self.lines += [f"build {output}: {rule} {' '.join(map(str, inputs))} | {needs}", f"  flags = {words}"]
        return output

    def compile(self, paths: list[Path], flags: list[str]) -> list[str]:
        return [self.add("cxx", f"{path.name}.o", [path], flags) for path in paths]

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [cuda_resources.build_script().find_ninja(), "-C", str(self.folder)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"the emulation must compile, got\n{run.stdout[-20000:]}")


def build() -> None:
    """Compile what changed of the machine, the CUDA library's own sources and the selftest."""
    setup, torch_home = _setup()
    steps = _Steps(BUILD)
    common = [*FLAGS, *os.environ.get("HOTKERNELS_CXXFLAGS", "").split(), "-DHK_EMULATION", INCLUDE]
    glue = [*common, *setup.STABLE_ABI, "-DUSE_CUDA", "-isystem", f"{torch_home / 'include'}"]
    kernels = [*common, "-fsanitize=alignment"]  # a GPU refuses wide accesses that a CPU takes anywhere
    bindings = sorted((ROOT / "python_bindings").glob("*_cuda.cpp"))
    objects = steps.compile(SOURCES, ["-x", "c++", *kernels])
    objects += steps.compile(bindings, ["-include", "bindings.h", *glue])
    steps.add("link", MACHINE.name, steps.compile([HERE / "emulation.cpp", HERE / "ptx_machine.cpp"], glue), [])
    steps.add("cxx", "ptx_machine.h.gch", [HERE / "ptx_machine.h"], ["-x", "c++-header", *TRITON_FLAGS])
    libraries = [f"-L{torch_home / 'lib'}", "-Wl,-Bsymbolic", "-ltorch_cpu", "-lc10"]
    steps.add("link", LIBRARY.name, [*objects, MACHINE.name], libraries)
    steps.add("link", SELFTEST.name, [*steps.compile([HERE / "selftest.cpp"], kernels), MACHINE.name], [])
    steps.run()


def build_translations(*flags: str, architectures: Sequence[str] = ARCHITECTURES) -> dict[str, Path]:
    """Compile what changed of the CUDA library's kernels, by way of PTX: architecture -> library."""
    folder = ROOT / "build/emulated_ptx" / "".join(flags)
    steps, built = _Steps(folder), {}
    for arch in architectures:
        objects = []
        for path in SOURCES:
            stem = f"{path.stem}.{arch}"
            steps.add("ptx", f"{stem}.ptx", [path], [f"-arch=sm_{arch}"])
            steps.add("translate", f"{stem}.cpp", [f"{stem}.ptx"], [], needs=str(HERE / "ptx.py"))
            objects.append(steps.add("cxx", f"{stem}.o", [f"{stem}.cpp"], [*PTX_FLAGS, *flags]))
        built[arch] = folder / f"libtranslated_{arch}.so"
        steps.add("link", built[arch].name, [*objects, str(MACHINE)], [])
    steps.run()
    return built
