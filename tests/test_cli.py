"""`hotkernels`, which is `python -m hotkernels`: usage, exit codes, and the doctor's page."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from hotkernels import __version__, backends, doctor
from hotkernels.__main__ import main


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", "hotkernels", *argv], capture_output=True, text=True, env=env, check=False
    )


def test_no_command_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    told = capsys.readouterr().err
    assert told.startswith("usage: hotkernels [--version] COMMAND")
    assert all(f"\n  {name} " in told for name in ("demo", "doctor", "bench"))


def test_an_unknown_command_is_named() -> None:
    done = run("dmeo")
    assert done.returncode == 2
    assert done.stderr.startswith("hotkernels: command must be one of demo, doctor, bench, got 'dmeo'\nusage: ")


def test_the_console_script_is_there() -> None:
    """`hotkernels`, unlike `python -m hotkernels`, does not import a source tree that it is called in."""
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert scripts["hotkernels"] == "hotkernels.__main__:console"
    script = Path(sys.executable).with_name("hotkernels")
    assert subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout.startswith("usage: ")


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_the_demo_help_warns_of_pickles(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--help"])
    assert stopped.value.code == 0
    assert "Unpickling runs code from the file" in " ".join(capsys.readouterr().out.split())


def test_a_bad_file_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--keypoints", str(tmp_path / "no.npz"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("demo: --keypoints must be an .npz file")
    assert not (tmp_path / "out").exists()


def test_doctor_in_a_process_of_its_own() -> None:
    """The environment is read when the library loads."""
    done = run("doctor", HOTKERNELS_BACKEND="torch", HOTKERNELS_ISA="")
    assert done.returncode == (1 if doctor.problems() else 0)
    assert "  HOTKERNELS_BACKEND=torch" in done.stdout
    assert "torch: float32, float16, bfloat16, float64" in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "HOTKERNELS_BACKEND",
            "foo",
            r"HOTKERNELS_BACKEND=foo serves no call here: \w+: HOTKERNELS_BACKEND must be unset, ",
        ),
        (
            "HOTKERNELS_BACKEND",
            "cuda",
            r"HOTKERNELS_BACKEND=cuda serves no call here: \w+: HOTKERNELS_BACKEND must be one",
        ),
        ("HOTKERNELS_ISA", "foo", r"hotkernels: HOTKERNELS_ISA must be an instruction set of this machine \(base"),
    ],
)
def test_doctor_fails_on_a_setting_with_which_calls_fail(name: str, value: str, told: str) -> None:
    if value == "cuda" and backends.LIBRARIES["_C_cuda"] is None and torch.cuda.is_available():
        pytest.skip("that backend serves calls here")
    if name == "HOTKERNELS_ISA" and backends.LIBRARIES["_C_cpu"] is not None:
        pytest.skip("the C++ extension is not built here")
    done = run("doctor", **{"HOTKERNELS_BACKEND": "", "HOTKERNELS_ISA": "", name: value})
    assert done.returncode == 1
    assert re.search(f"^PROBLEM: {told}", done.stdout, re.M)


def test_doctor_report() -> None:
    before = backends.instruction_set()
    page = doctor.report()
    assert backends.instruction_set() == before
    for expected in (__version__, torch.__version__, "triton", "numpy", "platform", "cpu", "threads"):
        assert expected in page
    for op in backends.OPS:
        assert f"\n  {op} " in page
    for library, why in backends.LIBRARIES.items():
        said = "loaded" if why is None else why.removeprefix(f"{library}: ")
        assert f"\n  {library:<12}{said}\n" in page
    if before is not None:
        assert f"{before} in use; available: base" in page
        assert "cpp: float32, float16, bfloat16; torch: float64" in page


CPUINFO = """processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model		: 17
model name	: AMD EPYC: cloud
power management:

processor	: 1
model		: 18
model name	: AMD EPYC: the other socket
"""


@pytest.mark.parametrize(
    ("cpuinfo", "told"),
    [
        (CPUINFO, "AMD EPYC: cloud family 25 model 17"),
        ("processor : 0\nmodel name : Some Arm\n", "Some Arm"),
        ("processor : 0\nmodel : 3\nBogoMIPS : 50.00\n", "of platform"),
        (None, "of platform"),
    ],
)
def test_a_processor_is_named_with_its_numbers(monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, told: str) -> None:
    def read_text(path: Path) -> str:
        if cpuinfo is None or path != Path("/proc/cpuinfo"):
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "of platform")
    assert doctor.processor() == told


def test_doctor_names_a_source_tree_that_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hotkernels").mkdir()
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "hotkernels/backends.py"))
    why = str(backends._load("_C_none"))
    assert why == f"_C_none: not built in the source tree {tmp_path}, from which Python imports hotkernels"
    monkeypatch.setitem(backends.LIBRARIES, "_C_cpu", why)
    assert f"PROBLEM: {why}: build it there" in doctor.report()


BOTH = "_C_cpu: built\n_C_cuda: built\n"


@pytest.mark.parametrize(
    ("report", "library", "cuda", "lost", "failed"),
    [
        (BOTH, "", "12.6", ("_C_cuda",), ["_C_cuda"]),
        (BOTH, "", None, ("_C_cuda",), []),
        (BOTH, "", "12.6", ("_C_cpu", "_C_cuda"), ["_C_cpu"]),
        (BOTH, "", "12.6", (), []),
        ("_C_cpu: not built: no compiler\n", "", None, ("_C_cpu",), []),
        ("_C_cpu: built\n_C_cuda: not built: no nvcc\n", "", "12.6", ("_C_cuda",), []),
        ("", "_C_cpu.abi3.so", None, ("_C_cpu",), ["_C_cpu"]),
    ],
)
def test_doctor_knows_what_should_have_loaded(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    report: str,
    library: str,
    cuda: str | None,
    lost: tuple[str, ...],
    failed: list[str],
) -> None:
    if report:
        (tmp_path / "build_report.txt").write_text(report)
    if library:
        (tmp_path / library).touch()
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for name in ("_C_cpu", "_C_cuda"):
        monkeypatch.setitem(backends.LIBRARIES, name, f"{name}: gone" if name in lost else None)
    assert doctor.failed() == failed


def test_doctor_lists_instruction_sets_and_leaves_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    forced = ["avx2"]

    def instruction_set(force: str | None = None) -> str:
        if force == "avx512":
            raise ValueError
        forced.extend([force] if force else [])
        return forced[-1]

    monkeypatch.setattr(doctor, "instruction_set", instruction_set)
    assert doctor._instruction_sets() == "avx2 in use; available: base, avx2, avx512_bf16"
    assert instruction_set() == "avx2"


@pytest.mark.skipif(backends.LIBRARIES["_C_cpu"] is not None, reason=str(backends.LIBRARIES["_C_cpu"]))
def test_doctor_accepts_a_backend_that_serves_some_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "FROM_ENVIRONMENT", "cpp")
    assert doctor.problems() == []
    assert "cpp: float32, float16, bfloat16; none (dpc_knn: HOTKERNELS_BACKEND must be one that" in doctor.report()


def test_doctor_has_a_page_where_cuda_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver older than torch needs: NVML counts the GPU, and nothing else works."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    page = doctor.report()
    assert "  gpu         none\n" in page
    assert "\nPROBLEM: there is a GPU on which CUDA does not start" in page


def test_whoever_reads_a_time_learns_that_nothing_is_fused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(backends.LIBRARIES, "_C_cpu", None)
    assert doctor.unfused() is None
    monkeypatch.setitem(backends.LIBRARIES, "_C_cpu", "_C_cpu: not built: no C++ compiler")
    assert main(["bench", "--shape", "1,9,8", "--seconds", "0"]) == 0
    assert (
        "; isa nothing is fused: _C_cpu: not built: no C++ compiler (see hotkernels doctor);" in capsys.readouterr().out
    )


def test_doctor_tells_where_gpu_kernels_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = backends.Kernel((torch.float32,), device="cuda")
    monkeypatch.setitem(backends.OPS, "dpc_knn", {**backends.OPS["dpc_knn"], "triton": kernel})
    assert "triton: compiled only" in doctor.report()
    monkeypatch.setitem(doctor.GPU_RUNS, ("dpc_knn", "triton"), "a GPU, a date, a commit")
    assert "triton: run on a GPU, a date, a commit" in doctor.report()


def test_the_readme_says_where_each_gpu_kernel_ran() -> None:
    """The same as doctor: a row per op, its CUDA C++ kernel, its Triton kernel."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    states = doctor.gpu_kernels()
    assert not doctor.GPU_RUNS.keys() - states.keys(), "a run of a kernel that is not there"
    for op in dict.fromkeys(op for op, _ in states):
        cells = " | ".join(states.get((op, backend), "none") for backend in ("cuda", "triton"))
        assert f"\n| {op} | {cells} |\n" in readme


def test_doctor_fails_on_a_built_extension_that_does_not_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = "_C_cpu" in {p.name.split(".")[0] for p in backends.Path(backends.__file__).parent.glob("_C_*so")}
    if not built:
        pytest.skip("the C++ extension is not built here")
    monkeypatch.setitem(backends.LIBRARIES, "_C_cpu", "_C_cpu: undefined symbol: nothing")
    assert doctor.main([]) == 1
    assert "PROBLEM: _C_cpu was built but did not load: _C_cpu: undefined symbol" in capsys.readouterr().out
