"""Gates on the build: symbols, instructions, resources on each GPU generation, one name per op, no compiler at hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_resources
import pytest
import setuptools
import torch

from hotkernels import backends

ROOT = cuda_resources.ROOT
SETUP = cuda_resources.build_script()
DATA = Path(__file__).parent / "data"
GENERATIONS = {"sm_80", "sm_90a", "sm_100"}
# What torch 2.13's headers define and 2.11's do not: TORCH_TARGET_VERSION hides later functions, but not macros.
LATER_MACROS = (
    "AT_OPAQUE_TYPES", "C10_WARP_SIZE_LOWER_BOUND", "C10_WARP_SIZE_UPPER_BOUND", "STABLE_TORCH_ERROR_CODE_CHECK",
    "TORCH_VERSION_2_12_0", "TORCH_VERSION_2_13_0",
)  # fmt: skip


def tool(name: str, *args: object) -> str:
    """What a command prints; skips where it is not installed."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return subprocess.run([name, *map(str, args)], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def cpu_library() -> Path:
    if backends.LIBRARIES["_C_cpu"] is not None:
        pytest.skip(str(backends.LIBRARIES["_C_cpu"]))
    return Path(str(sys.modules["hotkernels._C_cpu"].__file__))


@pytest.fixture(scope="module")
def cuda_library() -> Path:
    if SETUP.find_nvcc() is None:
        pytest.skip("no nvcc was found (set CUDA_HOME): CUDA sources were not compiled")
    if not SETUP.plan()[0]:
        pytest.skip(SETUP.plan()[1][0])
    return cuda_resources.compile_library()


def kernel_objects(isa: str) -> list[Path]:
    """The object files of the CPU kernels compiled for one instruction set."""
    objects = [ROOT / "build/_C_cpu" / f"{src.stem}.{isa}.o" for src in (ROOT / "csrc/cpu").glob("*.cpp")]
    missing = [path.name for path in objects if not path.exists()]
    if missing:
        pytest.skip(f"not built from this tree on this machine: {', '.join(missing)}")
    return objects


def check_symbols(library: Path) -> None:
    # A weak one may be missing: it is asked for first.
    lines = [line.split() for line in tool("nm", "-D", "--undefined-only", library).splitlines()]
    undefined = {name.split("@")[0] for kind, name in lines if kind != "w"}
    torch_symbols = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert torch_symbols, "a library that uses nothing of torch was not linked right"
    stable = set((DATA / "stable_symbols_2.11.txt").read_text().split())
    assert not torch_symbols - stable, "not exported by torch 2.11"
    mangled = {name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)}
    assert not mangled, "C++ symbols of torch, which no version promises to keep"


def test_cpu_symbols_are_those_of_torch_2_11(cpu_library: Path) -> None:
    check_symbols(cpu_library)


def test_cuda_symbols_are_those_of_torch_2_11(cuda_library: Path) -> None:
    check_symbols(cuda_library)


def test_bindings_use_no_macro_that_torch_2_11_lacks() -> None:
    bindings = [path for path in (ROOT / "python_bindings").iterdir() if path.suffix in (".h", ".cpp")]
    used = {(path.name, word) for path in bindings for word in re.findall(r"\w+", path.read_text())}
    assert not {(name, word) for name, word in used if word in LATER_MACROS}


@pytest.mark.parametrize("isa", SETUP.ISA_FLAGS)
def test_kernels_share_no_weak_symbol(isa: str) -> None:
    # The linker keeps one copy of a weak symbol: an AVX-512 one could be what runs on a machine without it.
    for path in kernel_objects(isa):
        weak = [line for line in tool("nm", path).splitlines() if re.search(r" [VWu] ", line)]
        assert not weak, path.name


@pytest.mark.parametrize(
    ("isa", "has", "lacks"), [("base", "xmm", "ymm|zmm"), ("avx2", "ymm", "zmm"), ("avx512", "zmm", None)]
)
def test_kernels_hold_the_instructions_of_their_set(isa: str, has: str, lacks: str | None) -> None:
    codes = {path.name: tool("objdump", "-d", "--no-show-raw-insn", path) for path in kernel_objects(isa)}
    for name, code in codes.items():
        assert lacks is None or not re.search(lacks, code), f"{name} would stop on an older processor"
    assert any(has in code for code in codes.values()), "nothing was vectorised"


def test_only_products_of_pairs_hold_instructions_of_avx512_bf16() -> None:
    # They lie in the library for AVX-512: any other function with such an instruction would stop machines without it.
    functions: dict[str, set[str]] = {}
    for path in kernel_objects("avx512"):
        for name, code in re.findall(r"<(\w+)>:\n(.*?)(?=\n\n|\Z)", tool("objdump", "-d", path), re.DOTALL):
            functions.setdefault(name, set()).update(re.findall(r"vdpbf16ps|vcvtne2?ps2bf16", code))
    using = {name for name, instructions in functions.items() if instructions}
    assert all("4Pair" in name for name in using), using
    if "clang" not in tool("readelf", "-p", ".comment", path):  # which has none of them
        assert set().union(*functions.values()) == {"vdpbf16ps", "vcvtneps2bf16", "vcvtne2ps2bf16"}


@pytest.mark.parametrize("isa", SETUP.ISA_FLAGS)
def test_attention_prefetches(isa: str) -> None:
    # A compiler may drop them without an answer changing: for each dtype, three kinds of rows to read and one to write
    # forward, four and three backward.
    (path,) = (path for path in kernel_objects(isa) if path.name.startswith("gathered_attention"))
    assert len(re.findall(r"\bprefetch", tool("objdump", "-d", "--no-show-raw-insn", path))) >= 4 * (3 + 1 + 4 + 3)


def test_cuda_compiles_for_every_generation_within_its_limits(cuda_library: Path) -> None:
    table, kernels = json.loads(cuda_resources.TABLE.read_text()), cuda_resources.measured()
    assert {name: set(needs) for name, needs in kernels.items()} == dict.fromkeys(kernels, GENERATIONS)
    assert kernels.keys() == table["kernels"].keys(), "after a change: python tests/cuda_resources.py"
    if cuda_resources.nvcc_release() != table["nvcc"]:
        pytest.skip(f"compiled, but the limits are for nvcc {table['nvcc']}, this is {cuda_resources.nvcc_release()}")
    assert not cuda_resources.over(kernels, table["kernels"]), (
        "(needs, limit); where it is meant: python tests/cuda_resources.py"
    )


def test_cuda_library_is_refused_cleanly_by_a_torch_without_cuda(cuda_library: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    run = subprocess.run([sys.executable, "-c", "import torch, _C_cuda"], cwd=cuda_library.parent, capture_output=True)
    assert run.returncode == 1
    assert b"ImportError" in run.stderr


def test_csrc_knows_no_torch() -> None:
    found = [p for p in (ROOT / "csrc").rglob("*.*") if re.search(r"torch/|ATen/|c10/|Python\.h", p.read_text())]
    assert not found


def test_native_lines_fit_in_120_columns() -> None:
    # As ruff has it for Python.
    paths = [p for folder in ("csrc", "python_bindings", "tests/emulation") for p in (ROOT / folder).rglob("*.*")]
    native = [p for p in paths if p.suffix in (".h", ".c", ".cpp", ".cu")]
    lines = [(p.name, n, line) for p in native for n, line in enumerate(p.read_text().splitlines(), 1)]
    assert not [(name, n) for name, n, line in lines if len(line) > 120]


@pytest.mark.parametrize("op", backends.OPS)
def test_an_op_has_one_name_in_every_folder(op: str) -> None:
    places = [
        f"hotkernels/ops/{op}/api.py",
        f"hotkernels/ops/{op}/reference.py",
        f"python_bindings/{op}_cpu.cpp",
        f"tests/test_{op}.py",
        f"bench/bench_{op}.py",
    ]
    assert not [place for place in places if not (ROOT / place).exists()]


def test_native_files_are_named_after_ops() -> None:
    # An op may lack some: recovery_attention runs on the kernels of gathered_attention.
    kernels = {path.stem for folder in ("cpu", "cuda") for path in (ROOT / "csrc" / folder).glob("*.c*")}
    contracts = {path.stem for path in (ROOT / "csrc/include/hotkernels").glob("*.h")} - {"common", "cuda"}
    bindings = {path.stem for path in (ROOT / "python_bindings").glob("*_c*.cpp")}
    assert kernels == contracts
    assert contracts <= set(backends.OPS)
    assert bindings <= {f"{op}_{device}" for op in backends.OPS for device in ("cpu", "cuda")}


CPU, BOTH = ["_C_cpu"], ["_C_cpu", "_C_cuda"]


@pytest.mark.parametrize(
    ("wanted", "cuda", "nvcc", "libraries", "said"),
    [
        ("auto", True, True, BOTH, "built"),
        ("auto", True, False, CPU, "not built: no nvcc was found"),
        ("auto", False, True, CPU, "not built: torch has no CUDA"),
        ("0", True, True, CPU, "not built: HOTKERNELS_BUILD_CUDA=0"),
        ("1", False, True, BOTH, "built"),
        ("1", True, False, None, "HOTKERNELS_BUILD_CUDA=1, but no nvcc was found (set CUDA_HOME)"),
    ],
)
def test_what_is_built_and_why_not_the_rest(
    monkeypatch: pytest.MonkeyPatch, wanted: str, cuda: bool, nvcc: bool, libraries: list[str] | None, said: str
) -> None:
    monkeypatch.setenv("HOTKERNELS_BUILD_CUDA", wanted)
    monkeypatch.setattr(SETUP, "find_torch", lambda: (ROOT, cuda))
    monkeypatch.setattr(SETUP, "find_compiler", lambda: "c++")
    monkeypatch.setattr(SETUP, "is_old", lambda compiler: False)
    monkeypatch.setattr(SETUP, "find_nvcc", lambda: ROOT if nvcc else None)
    if libraries is None:
        with pytest.raises(SystemExit, match=re.escape(said)):
            SETUP.plan()
    else:
        assert SETUP.plan() == (libraries, ["_C_cpu: built", f"_C_cuda: {said}"])
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setenv("HOTKERNELS_BUILD_CUDA", "auto")
        why = "not built: the extensions build on Linux only, this is darwin"
        assert SETUP.plan() == ([], [f"{name}: {why}" for name in BOTH])


@pytest.mark.parametrize(
    ("version", "cuda"),
    [
        ("cuda: Optional[str] = '12.6'\nhip: Optional[str] = None\n", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", False),
        ('cuda = "13.0"\n', True),
    ],
)
def test_torch_has_cuda_if_its_version_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, cuda: bool
) -> None:
    monkeypatch.setenv("HOTKERNELS_TORCH_DIR", str(tmp_path))
    about = tmp_path / "version.py"
    about.write_text("__version__ = '2.11.0'\n" + version)
    installed = Path(torch.__file__).parent
    assert SETUP.find_torch()[0] == installed, "that one has no stable ABI"
    header = tmp_path / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    assert SETUP.find_torch() == (tmp_path, cuda)
    about.write_text("__version__: str = '2.9.1+cpu'\n" + version)
    assert SETUP.find_torch()[0] == installed, "that one has an older stable ABI"


@pytest.mark.parametrize(
    ("generations", "codes"),
    [
        ("80;90a;100", {("80", "sm_80"), ("90a", "sm_90a"), ("100", "sm_100"), ("80", "compute_80")}),
        ("90a", {("90a", "sm_90a")}),  # of which no other chip can compile anything
    ],
)
def test_cuda_is_compiled_for_the_generations_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, generations: str, codes: set[tuple[str, str]]
) -> None:
    monkeypatch.setenv("HOTKERNELS_CUDA_ARCHS", generations)
    steps = SETUP.ninja_file("_C_cuda", tmp_path / "a.so", tmp_path)
    assert set(re.findall(r"-gencode=arch=compute_(\w+),code=(\w+)", steps)) == codes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, to be built in."""
    for folder in ("csrc", "python_bindings", "hotkernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build_in(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "out"]
    return subprocess.run(command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True)


def test_without_a_compiler_the_package_is_pure_python_and_says_so(tree: Path) -> None:
    earlier = tree / "out/hotkernels/_C_cpu.abi3.so"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    built = build_in(tree, CXX="/nonexistent", PATH="/nonexistent", HOTKERNELS_BUILD_CUDA="auto")
    assert built.returncode == 0, built.stderr
    assert not list(tree.rglob("*.so"))
    # An editable install would find the library that this build lacks.
    program = """
import sys, torch
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import hotkernels
print(hotkernels.backends.LIBRARIES["_C_cpu"])
print(hotkernels.explain("dpc_knn", torch.zeros(1, 9, 4)).chosen)
print(list(hotkernels.dpc_knn(torch.randn(1, 9, 4), 3).index.shape))
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tree / "out", capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "_C_cpu: not built: no C++ compiler was found (tried $CXX, g++, clang++, c++)",
        "torch",
        "[1, 3]",
    ], run.stderr


def test_an_old_compiler_is_as_good_as_none(tree: Path, tmp_path: Path) -> None:
    """It is asked by its macros: GCC 10's are put in the place of those of the compiler here."""
    found = SETUP.find_compiler()
    if found is None:
        pytest.skip("no C++ compiler")
    assert not SETUP.is_old(found)
    old = tmp_path / "old"
    old.write_text(f'#!/bin/sh\nexec {found} "$@" -U__clang__ -U__GNUC__ -D__GNUC__=10\n')
    old.chmod(0o755)
    built = build_in(tree, CXX=str(old), HOTKERNELS_BUILD_CUDA="auto")
    assert built.returncode == 0, built.stderr
    assert f"_C_cpu: not built: {old} is not GCC 11, clang 14 or newer" in built.stdout + built.stderr
    assert not list(tree.rglob("*.so"))


def test_cuda_asked_for_but_impossible_is_an_error(tree: Path) -> None:
    built = build_in(tree, CXX="/nonexistent", PATH="/nonexistent", HOTKERNELS_BUILD_CUDA="1")
    assert built.returncode != 0
    assert "hotkernels: HOTKERNELS_BUILD_CUDA=1, but no C++ compiler was found" in built.stderr


def test_a_wrong_build_setting_is_named(tree: Path) -> None:
    built = build_in(tree, HOTKERNELS_BUILD_CUDA="yes")
    assert built.returncode != 0
    assert "hotkernels: HOTKERNELS_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in built.stderr


# What pip's isolated build does to the process that builds.
ISOLATED = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p and 'elsewhere' not in p]"


@pytest.mark.parametrize("place", ["its own packages", "the user's packages", "a path file"])
def test_torch_is_found_from_an_isolated_build(place: str, tmp_path: Path) -> None:
    users = place == "the user's packages"
    options = ["--without-pip", *(["--system-site-packages"] if users else [])]
    subprocess.run([sys.executable, "-m", "venv", *options, tmp_path / "env"], check=True)
    packages = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    site = (tmp_path if users else tmp_path / "env") / packages
    torch_dir = (tmp_path / "elsewhere" if place == "a path file" else site) / "torch"
    header = torch_dir / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (torch_dir / "__init__.py").write_text("raise RuntimeError('a build need not import it')")
    (torch_dir / "version.py").write_text("__version__ = '3.0a0'\ncuda: Optional[str] = '12.6'\n")
    if place == "a path file":
        (site / "there.pth").write_text(f"{torch_dir.parent}\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sitecustomize.py").write_text(ISOLATED)
    for name in ("setuptools", "_distutils_hack"):
        (tools / name).symlink_to(Path(setuptools.__file__).parents[1] / name)
    isolated = {"PYTHONPATH": str(tools), "PYTHONNOUSERSITE": "1", "PYTHONUSERBASE": str(tmp_path)}
    environment = {k: v for k, v in os.environ.items() if k != "HOTKERNELS_TORCH_DIR"} | isolated
    command = [tmp_path / "env/bin/python", "-B", "-c", "import setup; print(*setup.find_torch() or ())"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.stdout == f"{torch_dir} True\n", run.stderr
