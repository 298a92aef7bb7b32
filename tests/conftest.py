"""What every test needs: a seed of its own, the backends with their instruction sets, a count of what really ran.

GPU backends run where there is a GPU. Without one, test_emulation.py starts pytest again with each of these in the
environment; then that backend, alone, takes CPU tensors:

- HOTKERNELS_EMULATE_CUDA=1: "cuda", as a compiler for the host understands it; =ptx: by the PTX of nvcc's
- TRITON_INTERPRET=1: "triton" in its interpreter
- HOTKERNELS_EMULATE_TRITON=90: "triton" by the PTX that it compiles for compute capability 9.0
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import emulation
import pytest
import torch
from emulation.processes import Process, start

from hotkernels import backends
from hotkernels.nn import linear

pytest.register_assert_rewrite("as_published", "attention_cases", "cases", "comparing", "dpc_knn_steps", "swapping")

GPU_BACKENDS = ("cuda", "triton")
EMULATED = ""
if how := os.environ.get("HOTKERNELS_EMULATE_CUDA"):
    EMULATED = "cuda"
    emulation.load(by_ptx=how == "ptx")
elif capability := os.environ.get("HOTKERNELS_EMULATE_TRITON"):
    from emulation import compiled_triton

    EMULATED = "triton"
    compiled_triton.install(int(capability))
elif backends.TRITON_DEVICE == "cpu":
    from emulation import bounds

    EMULATED = "triton"
    bounds.install()
# A backend, or one with a forced instruction set: cpp-avx2.
PAIRS = "cpp-avx512_bf16"  # as cpp-avx512, but for attention of bfloat16: tests of all else leave it out
BACKENDS: tuple[str, ...] = ("torch", "cpp-base", "cpp-avx2", "cpp-avx512", PAIRS)
if EMULATED:
    BACKENDS = (EMULATED,)
elif torch.cuda.is_available():
    BACKENDS += GPU_BACKENDS
# What stands in for our kernels where one instruction set is enough: for tests of what plain PyTorch does not promise.
FUSED_BACKENDS: tuple[str, ...] = tuple(dict.fromkeys(b.partition("-")[0] for b in BACKENDS if b != "torch"))
only_cpp = pytest.mark.parametrize("backend", ["cpp"], indirect=True)
on_every_cpp = pytest.mark.parametrize("backend", [b for b in BACKENDS if b.startswith("cpp-")], indirect=True)
CAPTURED = Path(__file__).resolve().parents[2] / "shared/data/cmu_01_01_17joints.npz"  # a walk; not in the repository
# cuBLAS is deterministic, and allowed where tests ask for determinism, with a workspace of this size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_ran: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Every test draws the same numbers on every run, whichever other tests run; others for HOTKERNELS_TEST_SEED=..."""
    number = zlib.crc32((os.environ.get("HOTKERNELS_TEST_SEED", "") + request.node.nodeid).encode())
    torch.manual_seed(number)
    if EMULATED == "cuda":
        emulation.configure(compute_capability=(90, 80, 90, 86, 90, 120)[number % 6])


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    """What runs the tests of GPU backends without a GPU."""
    running = start(tmp_path_factory.mktemp("emulation"))
    yield running
    for process in running.values():
        process.popen.kill()


@pytest.fixture(scope="session", autouse=True)
def _emulated_first(request: pytest.FixtureRequest) -> None:
    """They take minutes, beside which the other tests run. What keeps them from it is their tests' error.

    On one thread, where a test asks for no more: threads that wait for each other would wait for a processor, too.
    """
    if any("emulated" in getattr(item, "fixturenames", ()) for item in request.session.items) and not EMULATED:
        with contextlib.suppress(RuntimeError):
            if request.getfixturevalue("emulated"):
                torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The value for `backend=`, once per instruction set; skips what this machine or build cannot run.

    With a GPU backend, tensors that a test makes are on the GPU unless it says otherwise.
    """
    name, _, isa = request.param.partition("-")
    if EMULATED and name != EMULATED:
        pytest.skip(f"this process emulates {EMULATED}")
    op = next((op for op in backends.OPS if request.node.path.stem.startswith(f"test_{op}")), "")
    if name not in backends.OPS.get(op, {name: None}):
        pytest.skip(f"{op} has no {name} kernel")
    if request.param == PAIRS and op and "attention" not in op:
        pytest.skip(f"{op} has no kernel of its own for pairs of bfloat16")
    if name in GPU_BACKENDS:
        library = {"cuda": "_C_cuda", "triton": "triton"}[name]
        if backends.LIBRARIES[library] is not None:
            pytest.skip(str(backends.LIBRARIES[library]))
        if not EMULATED and not torch.cuda.is_available():
            pytest.skip(f"{name}: no GPU")
        with contextlib.nullcontext() if EMULATED else torch.device("cuda"):
            yield name
        return
    if name == "cpp" and backends.LIBRARIES["_C_cpu"] is not None:
        pytest.skip(str(backends.LIBRARIES["_C_cpu"]))
    before = backends.instruction_set()
    if isa:
        try:
            backends.instruction_set(isa)
        except ValueError as error:
            pytest.skip(str(error))
    yield name
    if isa:
        backends.instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_layers_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers of any size are computed as only large ones are elsewhere."""
    monkeypatch.setattr(linear, "_LEAST", 1)
    monkeypatch.setattr(linear, "_LEAST_ROWS", 1)


@pytest.fixture(params=[True, False], ids=["Intel", "AMD"])
def products(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_layers_as_large_ones: None
) -> list[bool]:
    """Whether GELU is within the product, of all that oneDNN is asked for, of whatever size."""
    if not linear._HAS_ONEDNN:
        pytest.skip("torch has no oneDNN")
    monkeypatch.setattr(linear, "_MKL_IS_FAST", request.param)
    asked: list[bool] = []
    product = linear._onednn
    monkeypatch.setattr(linear, "_onednn", lambda *args: asked.append(len(args) > 3 and args[3]) or product(*args))
    return asked


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "emulated" in getattr(item, "fixturenames", ()))  # what waits for processes is last


def pytest_configure(config: pytest.Config) -> None:
    config.option.reportchars += "s"  # a test that cannot run says why


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if report.when == "call" and not report.skipped and hasattr(item, "callspec"):
        _ran[item.callspec.params.get("backend", "")] += 1
    return report


def _missing(session: pytest.Session) -> str | None:
    """What this run should have run and did not."""
    selected = any(
        hasattr(item, "callspec")
        and str(item.callspec.params.get("backend", "")).startswith("cpp")
        and item.get_closest_marker("skip") is None
        for item in session.items
    )
    idle = session.config.option.collectonly or session.testsfailed
    loaded = backends.LIBRARIES["_C_cpu"] is None
    if selected and loaded and not idle and not any(name.startswith("cpp") for name in _ran):
        return "no kernel test ran on cpp, though _C_cpu is loaded"
    return None


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and _missing(session):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in sorted(_ran.items()) if name)
    terminalreporter.write_line(f"kernel tests run per backend: {counts or 'none'}")
    for why in (backends.LIBRARIES["_C_cpu"], _missing(terminalreporter._session)):
        if why:
            terminalreporter.write_line(why, red=True)


@pytest.fixture
def gpu(backend: str) -> Iterator[Callable[..., None]]:
    """Chooses the emulated GPU and which of its threads run first; skips where nothing is emulated."""
    if EMULATED != "cuda":
        pytest.skip("only an emulated GPU can be another one")
    yield emulation.configure
    emulation.configure()
