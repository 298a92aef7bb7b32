"""Which backend serves a call: named, from the environment, explained, and missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hotkernels
from hotkernels import backends

needs_cpp = pytest.mark.skipif(backends.LIBRARIES["_C_cpu"] is not None, reason=str(backends.LIBRARIES["_C_cpu"]))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HOTKERNELS_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env={**clean, **environment}
    )


def test_the_fastest_that_can_serve() -> None:
    x = torch.zeros(1, 4, 2)
    fastest = "cpp" if backends.LIBRARIES["_C_cpu"] is None else "torch"
    assert hotkernels.explain("dpc_knn", x).chosen == fastest
    assert hotkernels.explain(hotkernels.dpc_knn, x.double()).chosen == "torch"
    assert hotkernels.explain("gather_tokens", x.double()).chosen == fastest
    assert hotkernels.explain("dpc_knn", x, 2, k=1, backend="torch").chosen == "torch"
    index = torch.zeros(1, 2, dtype=torch.int64)
    assert hotkernels.explain("gathered_attention", index=index, query=x.double()[None]).chosen == fastest
    for op in ("gathered_attention", "recovery_attention"):
        assert hotkernels.explain(op, x[None], dropout_p=0.0).chosen == fastest
        table = hotkernels.explain(op, x[None], dropout_p=0.1)
        assert table.chosen == "torch"
        if fastest == "cpp":
            assert table.reasons["cpp"] == "it has no dropout"


@pytest.mark.skipif(backends.TRITON_DEVICE == "cpu", reason="Triton's interpreter serves the CPU")
@pytest.mark.parametrize(
    ("op", "device", "dtype", "chosen"),
    [
        ("dpc_knn", "cuda", torch.bfloat16, "cuda"),
        ("dpc_knn", "cuda", torch.float64, "torch"),
        ("merge_tokens", "cuda", torch.float64, "cuda"),
        ("gathered_attention", "cuda", torch.float16, "triton"),
        ("gathered_attention", "cuda", torch.float64, "torch"),
        ("gathered_attention", "cpu", torch.float32, "cpp"),
        ("recovery_attention", "cpu", torch.float64, "cpp"),
        ("dpc_knn", "mps", torch.float32, "torch"),
    ],
)
def test_who_serves_where_every_library_is_loaded(
    monkeypatch: pytest.MonkeyPatch, op: str, device: str, dtype: torch.dtype, chosen: str
) -> None:
    monkeypatch.setattr(backends, "LIBRARIES", dict.fromkeys(backends.LIBRARIES))
    assert backends.choose(op, SimpleNamespace(device=torch.device(device), dtype=dtype), None) == chosen


def test_the_fastest_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {"cuda": "_C_cuda", "triton": "triton", "cpp": "_C_cpu", "torch": None}
    kernels = {name: backends.Kernel((torch.float32,), library=library) for name, library in libraries.items()}
    monkeypatch.setitem(backends.OPS, "dpc_knn", dict(reversed(kernels.items())))
    monkeypatch.setattr(backends, "LIBRARIES", dict.fromkeys(backends.LIBRARIES))
    gone: list[str] = []
    for name, library in libraries.items():
        slower = [f"  {other:<7}could serve this call" for other in list(libraries)[len(gone) + 1 :]]
        lines = [f"  {other:<7}{libraries[other]}: gone" for other in gone] + [f"  {name:<7}serves this call", *slower]
        assert str(hotkernels.explain("dpc_knn", torch.zeros(1, 4, 2))).splitlines()[1:] == lines
        backends.LIBRARIES[str(library)] = f"{library}: gone"
        gone.append(name)


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (None, "_C_none: No module named"),
        ("_C_cpu: not built: another\n_C_none: not built: no nvcc was found", "_C_none: not built: no nvcc was found"),
        ("_C_cpu: not built: another\n_C_none: built", "_C_none: No module named"),
    ],
)
def test_why_a_library_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: str | None, told: str
) -> None:
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    if report is not None:
        (tmp_path / "build_report.txt").write_text(report + "\n")
    assert str(backends._load("_C_none")).startswith(told)


@needs_cpp
def test_another_installations_library_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second checkout beside an editable installation would run its own Python with the first one's kernels."""
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "hotkernels/backends.py"))
    told = str(backends._load("_C_cpu"))
    assert told.startswith("_C_cpu: what Python finds belongs to another hotkernels: /")
    (tmp_path / "setup.py").touch()
    assert backends._load("_C_cpu") == (
        f"_C_cpu: not built in the source tree {tmp_path}, from which Python imports hotkernels"
    )


@needs_cpp
def test_a_torch_with_cuda_has_the_libraries_tried() -> None:
    code = """
import importlib, importlib.util, torch
load, find, tried = importlib.import_module, importlib.util.find_spec, set()
torch.version.cuda = "12.6"
importlib.import_module = lambda name, *more: tried.add(name) if name == "hotkernels._C_cuda" else load(name, *more)
importlib.util.find_spec = lambda name, *more: tried.add(name) if name == "triton" else find(name, *more)
from hotkernels import backends
print(sorted(tried), backends.LIBRARIES["_C_cuda"], backends.LIBRARIES["triton"])
"""
    assert python(code).stdout == "['hotkernels._C_cuda', 'triton'] None triton: not installed\n"


def test_explain_says_why_not() -> None:
    table = hotkernels.explain("dpc_knn", torch.zeros(1, 4, 2, dtype=torch.float64))
    assert set(table.reasons) == set(backends.BACKENDS)
    assert table.reasons["torch"] is None
    assert table.reasons["cpp"] == "it takes float32, float16 or bfloat16, got float64"
    lines = str(table).splitlines()
    assert lines[0] == "dpc_knn: served by torch"
    assert len(lines) == 1 + len(backends.BACKENDS)
    reason = hotkernels.explain("dpc_knn", torch.zeros(1, 4, 2, device="meta")).reasons["cpp"]
    assert reason == "it runs on cpu tensors, got meta"


def test_explain_refuses_what_it_does_not_know() -> None:
    x = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match=r"^explain: op must be one of .*dpc_knn.*, got 'kmeans'$"):
        hotkernels.explain("kmeans", x)
    with pytest.raises(ValueError, match=r"^explain: op must be one of .*, got 'relu'$"):
        hotkernels.explain(torch.relu, x)
    with pytest.raises(TypeError, match=r"^explain: x must be dpc_knn's first argument, a torch.Tensor, got list$"):
        hotkernels.explain("dpc_knn", [])
    with pytest.raises(TypeError, match=r"^explain: query must be gathered_attention's first .+, got NoneType$"):
        hotkernels.explain("gathered_attention", key=x)
    with pytest.raises(ValueError, match=r"^gathered_attention: dropout_p must be in \[0, 1\), got 1$"):
        hotkernels.explain("gathered_attention", x, dropout_p=1)
    with pytest.raises(ValueError, match=r"^dpc_knn: backend must be one that can serve this call, got 'triton' \("):
        hotkernels.explain("dpc_knn", x, backend="triton")


def test_a_named_backend_that_cannot_serve() -> None:
    x = torch.zeros(1, 9, 2)
    with pytest.raises(ValueError, match=r"^dpc_knn: backend must be .+, got 'cpp' \(it takes .+, got float64\)$"):
        hotkernels.dpc_knn(x.double(), 2, backend="cpp")
    with pytest.raises(ValueError, match=r"^merge_tokens: backend must be None, 'cuda', .+, got 'numpy'$"):
        hotkernels.merge_tokens(x, torch.zeros(1, 9, dtype=torch.int64), 2, backend="numpy")
    for dropout_p in (0.0, 0.5):
        with pytest.raises(ValueError, match=r"^gathered_attention: backend must be None, .+, got array\(\[1, 2\]\)$"):
            hotkernels.gathered_attention(*[x[None]] * 3, dropout_p=dropout_p, backend=np.array([1, 2]))
    with pytest.raises(TypeError, match=r"^gather_tokens: x must be of a dtype .+, got complex64$"):
        hotkernels.gather_tokens(x.to(torch.complex64), torch.zeros(1, 2, dtype=torch.int64))


def test_environment_is_read_at_import_and_import_prints_nothing() -> None:
    code = """
import hotkernels
from hotkernels import backends, nn
print(backends.FROM_ENVIRONMENT, backends.instruction_set(), nn.linear._HAS_ONEDNN)"""
    done = python(code, HOTKERNELS_BACKEND="torch", HOTKERNELS_ISA="base")
    isa = "base" if backends.LIBRARIES["_C_cpu"] is None else None
    assert (done.returncode, done.stdout, done.stderr) == (0, f"torch {isa} False\n", "")
    assert (
        python("from hotkernels import backends\nprint(backends.FROM_ENVIRONMENT)", HOTKERNELS_BACKEND="").stdout
        == "None\n"
    )


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 9, 2)
    monkeypatch.setattr(backends, "FROM_ENVIRONMENT", "torch")
    assert hotkernels.explain("dpc_knn", x).chosen == "torch"
    monkeypatch.setattr(backends, "FROM_ENVIRONMENT", "triton")
    with pytest.raises(ValueError, match=r"^dpc_knn: HOTKERNELS_BACKEND must be .+, got 'triton' \(dpc"):
        hotkernels.dpc_knn(x, 2)
    hotkernels.dpc_knn(x, 2, backend="torch")  # the argument goes before the environment
    monkeypatch.setattr(backends, "FROM_ENVIRONMENT", "fpga")
    with pytest.raises(ValueError, match=r"^dpc_knn: HOTKERNELS_BACKEND must be unset, 'cuda', .+, got 'fpga'$"):
        hotkernels.dpc_knn(x, 2)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("dpc_knn: keep must be -1 or in [0, 9), got 9", ValueError),
        ("hotkernels: force must be an instruction set, got 'x'", ValueError),
        ("dpc_knn: launch must be accepted by the GPU, got no device", RuntimeError),
        ("DefaultCPUAllocator: size must be less", RuntimeError),
    ],
)
def test_errors_of_kernels_as_pytorch_2_15_hands_them_on(text: str, error: type[Exception]) -> None:
    def kernel(told: str) -> None:
        raise RuntimeError(told)

    with pytest.raises(error, match=f"^{re.escape(text)}$") as raised:
        backends.call(kernel, text)
    assert raised.type is error


@needs_cpp
def test_wrong_instruction_set_in_the_environment() -> None:
    wrong = python("from hotkernels import backends; backends.instruction_set()", HOTKERNELS_ISA="mmx")
    last = wrong.stderr.strip().splitlines()[-1]
    assert "hotkernels: HOTKERNELS_ISA must be an instruction set of this machine (base" in last
    assert last.endswith("got 'mmx'")


@needs_cpp
def test_instruction_set_can_be_forced() -> None:
    before = backends.instruction_set()
    try:
        assert backends.instruction_set("base") == "base"
        assert backends.instruction_set() == "base"
        with pytest.raises(
            ValueError, match=r"^hotkernels: force must be an instruction set of this machine .+, got 'x'$"
        ):
            backends.instruction_set("x")
        assert backends.instruction_set() == "base"
    finally:
        assert backends.instruction_set(before) == before


WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "hotkernels._C_cpu":
            raise ImportError("blocked for a test")
sys.meta_path.insert(0, Block())
import torch, hotkernels
from hotkernels import backends
x = torch.randn(2, 9, 4, requires_grad=True)
"""


def test_a_missing_extension_breaks_nothing() -> None:
    done = python(
        WITHOUT
        + """
assert backends.instruction_set() is None
assert "schemas" in backends.LIBRARIES["_C_cuda"]
print(backends.LIBRARIES["_C_cpu"])
print(hotkernels.explain("dpc_knn", x))
peaks = hotkernels.dpc_knn(x, 3)
hotkernels.merge_tokens(x, peaks.assignment, 3).sum().backward()
hotkernels.gather_tokens(x, peaks.index).sum().backward()
assert x.grad is not None
try:
    hotkernels.dpc_knn(x, 3, backend="cpp")
except ValueError as error:
    print(error)
"""
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "an import prints nothing"
    why, *table, refusal = done.stdout.strip().splitlines()
    assert why.startswith("_C_cpu: ")
    assert table[0] == "dpc_knn: served by torch"
    assert refusal == f"dpc_knn: backend must be one that can serve this call, got 'cpp' ({why})"


def test_checked_has_nothing_to_look_at_on_meta() -> None:
    with hotkernels.checked():
        index = torch.zeros(1, 4, dtype=torch.int64, device="meta")
        assert hotkernels.gather_tokens(torch.zeros(1, 9, 2, device="meta"), index).shape == (1, 4, 2)


def test_checked_can_be_nested_and_is_undone_by_errors() -> None:
    from hotkernels import errors

    def leave_by_an_error() -> None:
        with hotkernels.checked(), hotkernels.checked():
            assert errors._looking.get()
            raise KeyError

    assert not errors._looking.get()
    with pytest.raises(KeyError):
        leave_by_an_error()
    assert not errors._looking.get()


def test_errors_name_the_first_argument_of_the_op() -> None:
    with pytest.raises(TypeError, match=r"^invert_index: index must be of a dtype that a backend serves"):
        hotkernels.explain("invert_index", torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"^gathered_attention: query must be of a dtype that a backend serves"):
        hotkernels.explain("gathered_attention", torch.zeros(1, 1, 2, 8, dtype=torch.int64))


def test_tritons_interpreter_takes_the_place_of_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the operators that it has kernels for: float64, which it does not take, goes to PyTorch."""
    monkeypatch.setattr(backends, "TRITON_DEVICE", "cpu")
    monkeypatch.setitem(backends.LIBRARIES, "triton", None)
    query = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
    assert hotkernels.explain("gathered_attention", query).chosen == "torch"
    assert "replace the C++ ones" in str(hotkernels.explain("gathered_attention", query).reasons["cpp"])
    assert backends.why_not("gather_tokens", "cpp", "cpu", query.dtype) == backends.LIBRARIES["_C_cpu"]


@needs_cpp
def test_large_results_ask_for_huge_pages() -> None:
    """Else the system hands their pages out one by one, which takes several times as long as to write to them."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no huge pages to ask for")
    out = hotkernels.gather_tokens(torch.ones(1, 1, 1), torch.zeros(1, 9 << 20, dtype=torch.int64), backend="cpp")
    middle, here, flags = out.data_ptr() + out.nbytes // 2, False, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(span[1], 16) <= middle < int(span[2], 16)
        elif here and line.startswith("VmFlags:"):
            flags = line
    assert "hg" in flags.split()
