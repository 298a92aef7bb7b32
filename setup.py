"""Builds hotkernels._C_cpu and, where there is nvcc, hotkernels._C_cuda with ninja against the LibTorch stable ABI.

No compiler, no torch headers or another platform: the package installs as pure Python, and build_report.txt, which
`hotkernels doctor` prints, says what was missing. A compile error is an error.

CONTRIBUTING.md names the environment variables that it heeds.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# One binary for every torch from 2.11 and every CPython from 3.10 on.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]
CXX_FLAGS = [
    "-std=c++20", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    # What vectorisation needs, and nothing that changes answers; never -ffast-math, which also flushes denormals
    # to zero in the whole process.
    "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-ffp-contract=fast",
]  # fmt: skip
INCLUDE = ["-I", ROOT / "csrc/include"]
ISA_FLAGS = {
    "base": ["-msse4.2"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}


@functools.cache
def outside() -> list[str]:
    """Where the interpreter finds torch by itself: pip's isolated build hides what is around it by these variables."""
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    ask = "from importlib.util import find_spec as f; print(*f('torch').submodule_search_locations, sep='\\n')"
    answer = subprocess.run([sys.executable, "-c", ask], env=variables, cwd="/", capture_output=True, text=True)
    return answer.stdout.splitlines()


def find_torch() -> tuple[Path, bool] | None:
    """The installed torch package and whether it has CUDA, without importing it; one before 2.11 does not count."""
    spec = importlib.util.find_spec("torch")
    places = [os.environ.get("HOTKERNELS_TORCH_DIR"), *(spec.submodule_search_locations or [] if spec else [])]
    places += outside() if not spec else []
    for place in places:
        if place and (Path(place) / "include/torch/csrc/stable/library.h").exists():
            about = (Path(place) / "version.py").read_text()
            version = re.search(r"^__version__\b[^=]*=\s*['\"](\d+)\.(\d+)", about, re.M)
            if version and (int(version[1]), int(version[2])) >= (2, 11):
                return Path(place), re.search(r"^cuda\b[^=]*=\s*['\"]", about, re.M) is not None
    return None


def find_compiler() -> str | None:
    found = (shutil.which(cxx) for cxx in (os.environ.get("CXX"), "g++", "clang++", "c++") if cxx)
    return next((path for path in found if path), None)


def is_old(compiler: str) -> bool:
    source = "#if defined(__clang__) ? __clang_major__ < 14 : __GNUC__ < 11\n#error\n#endif\n"
    command = [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=source, text=True, capture_output=True).returncode != 0


def find_nvcc() -> Path | None:
    """The CUDA toolkit's folder."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    places += [str(Path(on_path).resolve().parent.parent)] if on_path else []
    homes = (Path(place) for place in places if place)
    return next((h for h in homes if (h / "bin/nvcc").exists() and (h / "include/cuda_runtime_api.h").exists()), None)


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        return "ninja"
    return os.path.join(ninja.BIN_DIR, "ninja")


def plan() -> tuple[list[str], list[str]]:
    """Which libraries to build, and one line per library on what was decided and why."""
    want_cuda = os.environ.get("HOTKERNELS_BUILD_CUDA", "auto")
    if want_cuda not in ("auto", "0", "1"):
        raise SystemExit(f"hotkernels: HOTKERNELS_BUILD_CUDA must be auto, 0 or 1, got {want_cuda!r}")
    torch, compiler, nvcc = find_torch(), find_compiler(), find_nvcc()
    missing = None
    if sys.platform != "linux":
        missing = f"the extensions build on Linux only, this is {sys.platform}"
    elif torch is None:
        missing = "no torch >= 2.11 was found to build against (install torch first, or set HOTKERNELS_TORCH_DIR)"
    elif compiler is None:
        missing = "no C++ compiler was found (tried $CXX, g++, clang++, c++)"
    elif is_old(compiler):
        missing = f"{compiler} is not GCC 11, clang 14 or newer ($CXX names another)"
    if missing:
        if want_cuda == "1":
            raise SystemExit(f"hotkernels: HOTKERNELS_BUILD_CUDA=1, but {missing}")
        return [], [f"{name}: not built: {missing}" for name in ("_C_cpu", "_C_cuda")]
    assert torch is not None
    if want_cuda == "1" and nvcc is None:
        raise SystemExit("hotkernels: HOTKERNELS_BUILD_CUDA=1, but no nvcc was found (set CUDA_HOME)")
    if want_cuda == "1" or (want_cuda == "auto" and torch[1] and nvcc):
        return ["_C_cpu", "_C_cuda"], ["_C_cpu: built", "_C_cuda: built"]
    why = "HOTKERNELS_BUILD_CUDA=0" if want_cuda == "0" else "no nvcc was found" if torch[1] else "torch has no CUDA"
    return ["_C_cpu"], ["_C_cpu: built", f"_C_cuda: not built: {why}"]


Step = tuple[str, Path, str, list]  # the rule, what it compiles, the object's name, the flags


def words(parts: list) -> str:
    return " ".join(str(p).replace("$", "$$").replace(" ", "$ ") for p in parts)


def given(variable: str) -> list[str]:
    return os.environ.get(variable, "").split()


def cpu_kernels() -> list[Step]:
    """Every kernel of csrc/cpu once per instruction set."""
    isas = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"base": []}
    common = [*CXX_FLAGS, *INCLUDE, *given("HOTKERNELS_CXXFLAGS")]
    return [
        ("cxx", src, f"{src.stem}.{isa}", [*common, *flags, f"-DHK_ISA={isa}"])
        for src in sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        for isa, flags in isas.items()
    ]


def cuda_kernels() -> list[Step]:
    """Every kernel of csrc/cuda for each chip."""
    archs = os.environ.get("HOTKERNELS_CUDA_ARCHS", "80;90a;100").split(";")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    if archs[0].isdigit():  # other chips compile the first one's PTX when they load it
        flags.append(f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}")
    flags += ["-std=c++20", "-O3", "-lineinfo", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += [f"--threads={len(archs)}", *INCLUDE]
    return [("nvcc", src, src.name, flags) for src in sorted((ROOT / "csrc/cuda").glob("*.cu"))]


def bindings(name: str, torch: Path, toolkit: Path | None) -> list[Step]:
    """What registers a library's kernels with PyTorch."""
    flags = [*CXX_FLAGS, *STABLE_ABI, f"-DHK_MODULE={name}", *INCLUDE, *given("HOTKERNELS_CXXFLAGS")]
    flags += ["-isystem", torch / "include", "-isystem", sysconfig.get_paths()["include"]]
    stems = ["module"]
    if name == "_C_cuda":
        flags += ["-DUSE_CUDA", "-isystem", f"{toolkit}/include"]
    else:
        stems += ["schemas", "isa"]
    sources = [ROOT / f"python_bindings/{stem}.cpp" for stem in stems]
    sources += sorted((ROOT / "python_bindings").glob(f"*_{name.removeprefix('_C_')}.cpp"))
    return [("cxx", src, src.stem, flags) for src in sources]


def link_flags(name: str, torch: Path, toolkit: Path | None) -> list:
    flags = [f"-L{torch / 'lib'}", *given("HOTKERNELS_LDFLAGS"), "-Wl,--exclude-libs,ALL"]
    if name == "_C_cuda":
        # libtorch.so, kept though nothing here names it, brings libtorch_cuda.so in on a CUDA build of torch.
        flags += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        # lib: of a toolkit that pip or conda installed.
        flags += [f"-L{toolkit}/lib64", f"-L{toolkit}/lib", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    return [*flags, "-ltorch_cpu", "-lc10"]


def ninja_file(name: str, out: Path, objects: Path) -> str:
    """The build of one library."""
    found, toolkit = find_torch(), find_nvcc()
    assert found is not None
    torch = found[0]
    steps = cuda_kernels() if name == "_C_cuda" else cpu_kernels()  # what takes longest first
    steps += bindings(name, torch, toolkit)
    lines = [
        "rule cxx", f"  command = {find_compiler()} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d", "  deps = gcc",
        "rule nvcc", f"  command = {toolkit}/bin/nvcc $flags -MD -MF $out.d -c $in -o $out >$out.ptxas 2>&1 "
        "|| (cat $out.ptxas; exit 1)", "  depfile = $out.d", "  deps = gcc",
        "rule link", f"  command = {find_compiler()} -shared $in -o $out $flags",
    ]  # fmt: skip
    for rule, src, stem, flags in steps:
        lines += [f"build {words([objects / (stem + '.o')])}: {rule} {words([src])}", f"  flags = {words(flags)}"]
    objs = words([objects / (stem + ".o") for _, _, stem, _ in steps])
    link = words(link_flags(name, torch, toolkit))
    lines += [f"build {words([out])}: link {objs}", f"  flags = {link}", f"default {words([out])}"]
    return "\n".join(lines) + "\n"


def build_library(name: str, out: Path, objects: Path) -> None:
    """Compile and link one library, whatever of it is not up to date."""
    out.parent.mkdir(parents=True, exist_ok=True)
    objects.mkdir(parents=True, exist_ok=True)
    (objects / "build.ninja").write_text(ninja_file(name, out, objects))
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
    subprocess.run([find_ninja(), "-C", str(objects), *jobs], check=True)


class PackageWithReport(build_py):
    """Says beside the Python files which libraries the package comes with, and why not the others."""

    def run(self) -> None:
        super().run()
        package = ROOT / "hotkernels" if self.editable_mode else Path(self.build_lib) / "hotkernels"
        libraries, report = plan()
        for name in {"_C_cpu", "_C_cuda"} - set(libraries):  # an earlier build's would be packed, or imported, unasked
            (package / f"{name}.abi3.so").unlink(missing_ok=True)
        (package / "build_report.txt").write_text("\n".join(report) + "\n")
        print("hotkernels: " + "; ".join(report))


class NinjaBuild(build_ext):
    """setuptools finds out where the libraries go; ninja compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rsplit(".", 1)[-1]
        # Objects always go to the same place, so that a second build does only what changed.
        build_library(name, Path(self.get_ext_fullpath(ext.name)).resolve(), ROOT / "build" / name)


if __name__ == "__main__":  # the tests import this file to ask for the same flags
    LIBRARIES = plan()[0]
    setup(
        ext_modules=[Extension(f"hotkernels.{name}", [], py_limited_api=True) for name in LIBRARIES],
        cmdclass={"build_py": PackageWithReport, "build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIBRARIES else {},
    )
