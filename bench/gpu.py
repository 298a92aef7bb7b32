"""Proves the GPU code on the machine it runs on: `make gpu`, in under nine minutes, without a network.

Builds for this GPU, then runs the conformance loop and everything else that has tests on the backends "cuda" and
"triton", compute-sanitizer, and the benchmark. Each stage has a time limit and runs whatever became of those before
it. The summary is written anew after every stage. The exit status is 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.gpu_summary import kernels, summary
from bench.supervise import missing, results, run, supervise, tail

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build/gpu_cache"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# Stages of a group run at the same time. The benchmark has the GPU to itself.
GROUPS = (("build",), ("doctor",), ("tests", "warm", *SANITIZERS), ("bench",), ("tune",))
STAGES = tuple(stage for group in GROUPS[:-1] for stage in group)  # if nobody asks for others
# Where pip cannot install: the libraries alone, each on its own, so that one that fails does not take the other along.
BUILD = """
import pathlib, setup
failed = []
for name in ("_C_cpu", "_C_cuda"):
    try:
        library, objects = pathlib.Path("hotkernels", name + ".abi3.so"), pathlib.Path("build", name)
        setup.build_library(name, library.resolve(), objects.resolve())
    except Exception as error:
        failed.append(f"{name}: {error}")
raise SystemExit("; ".join(failed) or 0)
"""


@dataclass
class Outcome:
    """What became of a stage."""

    stage: str
    state: str  # passed, failed, skipped, or hazards
    detail: str
    seconds: float = 0.0


@dataclass
class Session:
    """What the stages share."""

    device: str
    quick: bool
    stages: tuple[str, ...]
    rows: str
    seconds: float
    out: Path
    results: Path
    begin: float = field(default_factory=time.monotonic)
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="hotkernels_gpu_"))
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").write_text("")
        self.gpu = self.device != "cpu"
        self.cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.env = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "2",
            "TORCHINDUCTOR_COMPILE_THREADS": "4",  # of each process
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            # Compiled once, by whichever process needs it first.
            "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
            "TRITON_CACHE_DIR": str(CACHE / "triton"),
        }
        self.about = about(self.gpu)
        self.lock = threading.Lock()

    def log(self, name: str) -> Path:
        """The log of a stage or of one of its processes."""
        return self.work / f"{name}.log"

    def journal(self, name: str) -> Path:
        """The journal of one of a stage's processes."""
        return self.work / f"{name}.jsonl"

    def left(self, share: float = 1.0) -> float:
        """Seconds until a share of the whole time is over."""
        return max(1.0, self.begin + share * self.seconds - time.monotonic())

    def run(self, name: str, *command: str, seconds: float, **env: str) -> int | None:
        """Run a command; its exit status, or None if it took too long."""
        return run(command, self.log(name), min(seconds, self.left()), ROOT, self.env | env)

    def shards(self, name: str, count: int, *command: str, share: float, hang: float, **env: str) -> list[str]:
        """Run `count` processes of a program that keeps a journal; what kept any of them from ending."""

        def one(i: int) -> str | None:
            full = [*command, "--journal", str(self.journal(f"{name}-{i}")), "--shard", f"{i}/{count}"]
            shard = f"{name}-{i}"
            deadline = time.monotonic() + self.left(share)
            return supervise(full, self.journal(shard), self.log(shard), deadline, hang, ROOT, self.env | env)

        with ThreadPoolExecutor(count) as pool:
            ended = list(pool.map(one, range(count)))
        return [f"process {i}: {why}" for i, why in enumerate(ended) if why]

    def tasks(self, name: str) -> list[dict[str, Any]]:
        """What the processes of a stage did."""
        return [entry for path in sorted(self.work.glob(f"{name}-*.jsonl")) for entry in results(path)]

    def not_done(self, name: str) -> int:
        """What they did not come to."""
        return sum(missing(path) for path in self.work.glob(f"{name}-*.jsonl"))


def about(gpu: bool) -> dict[str, Any]:
    """The machine and the commit."""
    said = harness.header()
    for package in ("triton", "pytest"):
        with contextlib.suppress(ImportError):
            said[package] = importlib.import_module(package).__version__
    nvcc = find("nvcc")
    if nvcc:
        lines = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.splitlines()
        said["nvcc"] = next((line.split("release ")[1] for line in lines if "release " in line), "?")
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        said |= {"gpus": torch.cuda.device_count(), "capability": f"{properties.major}.{properties.minor}"}
        said |= {"multiprocessors": properties.multi_processor_count, "L2": properties.L2_cache_size}
        said |= {"memory": properties.total_memory, "cuda": torch.version.cuda}
        said["cudnn"] = torch.backends.cudnn.version()
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,power.limit",
            "--format=csv,noheader",
            "-i",
            "0",
        ]
        with contextlib.suppress(OSError):
            said["driver, clock, power"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return said


def find(tool: str) -> str | None:
    """A tool of the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which(tool), *(f"{home}/{folder}/{tool}" for home in homes if home for folder in ("bin", tool))]
    return next((place for place in places if place and os.access(place, os.X_OK) and Path(place).is_file()), None)


# ---- stages ----------------------------------------------------------------------------------------------------------


def lacking() -> list[str]:
    """What this machine should have and has not."""
    modules = [name for name in ("triton", "setuptools") if importlib.util.find_spec(name) is None]
    tools = [] if find("nvcc") else ["nvcc (set CUDA_HOME)"]
    tools += [] if any(map(shutil.which, ("g++", "clang++", "c++"))) else ["a C++ compiler"]
    tools += [] if importlib.util.find_spec("ninja") or shutil.which("ninja") else ["ninja"]
    tools += [] if Path(sysconfig.get_paths()["include"], "Python.h").exists() else ["Python's headers"]
    return [*(f"the Python package {name}" for name in modules), *tools]


def architecture() -> str:
    """What nvcc calls this GPU: 90a for Hopper, whose own instructions need the a."""
    major, minor = torch.cuda.get_device_capability(0)
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def build(session: Session) -> Outcome:
    """Build for this GPU alone: with pip where it can, else the libraries in place."""
    without = lacking()
    note = f"missing: {', '.join(without)}" if without else ""
    env = {"HOTKERNELS_BUILD_CUDA": "1" if session.gpu else "0"}
    if session.gpu:
        env["HOTKERNELS_CUDA_ARCHS"] = os.environ.get("HOTKERNELS_CUDA_ARCHS") or architecture()
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    ways = {"pip": install, "setup.build_library": ["-c", BUILD]}
    for way, command in ways.items():
        code = session.run("build", sys.executable, *command, seconds=150, **env)
        if code is None:  # another way would take as long
            break
        if code == 0:
            parts = [note, f"built by {way}", f"for sm_{env['HOTKERNELS_CUDA_ARCHS']}" if session.gpu else ""]
            return Outcome("build", "passed", "; ".join(part for part in parts if part))
    why = "out of time" if code is None else next((line for line in tail(session.log("build")) if "error" in line), "")
    return Outcome("build", "failed", "; ".join(part for part in (note, why[:300]) if part))


def doctor(session: Session) -> Outcome:
    """What this installation is; whether the libraries load."""
    code = session.run("doctor", sys.executable, "-m", "hotkernels", "doctor", seconds=60)
    page = session.log("doctor").read_text()
    loaded = [line.split()[0] for line in page.splitlines() if line.endswith(" loaded")]
    wanted = {"_C_cpu", "_C_cuda", "triton"} if session.gpu else set()
    good = code == 0 and wanted <= set(loaded)
    return Outcome("doctor", "passed" if good else "failed", f"loaded: {', '.join(loaded) or 'nothing'}")


def tests(session: Session) -> Outcome:
    """The conformance loop, the tests of each op, and test_gpu.py, on the GPU backends."""
    of_ops = [path for op in harness.OPS for path in sorted((ROOT / "tests").glob(f"test_{op}*.py"))]
    files = [*map(str, of_ops), "tests/test_conformance.py", "tests/test_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-p", "journal", "-q", *files]
    command += ["--only", "cuda,triton" if session.gpu else "cpp-base"]
    if session.quick:
        command += ["-k", "small and float32"]
    count = max(1, session.cpus * 5 // 8)
    stopped = session.shards("tests", count, *command, share=0.55 if "bench" in session.stages else 0.98, hang=90.0)
    states = Counter(entry["state"] for entry in session.tasks("tests"))
    never = session.not_done("tests")
    told = [f"{states[state]} {state}" for state in ("passed", "failed", "skipped")]
    told += [f"{never} not run"] * bool(never) + stopped
    good = states["passed"] and not states["failed"] and not never and not stopped
    return Outcome("tests", "passed" if good else "failed", ", ".join(told))


def sanitize(session: Session, tool: str) -> Outcome:
    """Every op under one of compute-sanitizer's tools."""
    sanitizer = find("compute-sanitizer")
    if sanitizer is None:
        return Outcome(tool, "skipped", "compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "30"]
    command += ["--target-processes", "application-only", sys.executable, "tests/run_once.py"]
    command += ["--device", session.device, "--seconds", "2" if session.quick else "75"]
    env: dict[str, str] = {}
    if tool == "memcheck":
        # One allocation per tensor: a byte past its end is another's, or nobody's.
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        # PyTorch and Triton ask the driver for what it may refuse; where our own calls fail, Python raises.
        command[1:1] = ["--report-api-errors", "no"]
    code = session.run(tool, *command, seconds=min(180.0, session.left(0.6)), **env)
    lines = tail(session.log(tool), 10_000)
    if any("Device not supported" in line for line in lines):
        return Outcome(tool, "skipped", "compute-sanitizer does not support this machine")
    marks = ("SUMMARY", "FAILED: ", "failed: each op")
    told = [line.strip(" =") for line in lines if any(mark in line for mark in marks)]
    told += ["out of time"] if code is None else [f"exit status {code}"] if code not in (0, 9) else []
    state = "passed" if code == 0 else "failed"
    if tool == "racecheck" and code == 9:
        state = "hazards"  # to be read, no verdict: it does not know every way in which asynchronous copies are awaited
    return Outcome(tool, state, "; ".join(told))


def warm(session: Session) -> Outcome:
    """Let torch.compile compile what the benchmark will call, while the tests run."""
    count = max(1, session.cpus // 4 if "tests" in session.stages else session.cpus * 3 // 4)
    stopped = session.shards("warm", count, *_rows(session), "--warm", share=0.55, hang=200.0)
    done = Counter(entry["state"] for entry in session.tasks("warm"))
    # Nothing depends on it: what is not compiled now is compiled later.
    return Outcome("warm", "passed", ", ".join([f"{done['passed']} rows, {done['failed']} failed", *stopped]))


def _rows(session: Session, program: str = "bench.gpu_rows") -> list[str]:
    command = [sys.executable, "-m", program, "--device", session.device, "--rows", session.rows]
    return [*command, "--quick", "--seconds", "0.01"] if session.quick else command


def bench(session: Session) -> Outcome:
    """Every row, each checked before it is timed."""
    # Which launch configuration is fastest was found beside other processes: it is to be found again.
    for choice in (CACHE / "inductor").rglob("*.best_config"):
        choice.unlink()
    stopped = session.shards("bench", 1, *_rows(session), share=0.98, hang=150.0)
    states = Counter(entry["state"] for entry in session.tasks("bench"))
    never = session.not_done("bench")
    told = [f"{states['passed']} rows measured", f"{states['failed']} wrong or failed"]
    told += [f"{never} not reached: make gpu ARGS='--stages build,warm,bench --rows TEXT'"] * bool(never)
    good = states["passed"] and not states["failed"]
    late = [why for why in stopped if "out of time" not in why]
    return Outcome("bench", "passed" if good and not late else "failed", ", ".join([*told, *late]))


def tune(session: Session) -> Outcome:
    """Other blocks for attention's kernels: compiled by all processes, then timed by one."""
    command, count = _rows(session, "bench.gpu_tune"), max(1, session.cpus * 3 // 4)
    session.shards("prepare", count, *command, "--warm", share=0.6, hang=300.0)
    stopped = session.shards("tune", 1, *command, share=0.98, hang=300.0)
    done = Counter(entry["state"] for entry in session.tasks("tune"))
    told = [f"{done['passed']} rows, {done['failed']} failed", *stopped]
    return Outcome(
        "tune", "passed" if done["passed"] and not done["failed"] and not stopped else "failed", ", ".join(told)
    )


def stage(session: Session, name: str) -> Outcome:
    """Run a stage, whatever happens in it, and write down what became of it."""
    functions: dict[str, Callable[[Session], Outcome]] = {
        "build": build, "doctor": doctor, "tests": tests, "warm": warm, "bench": bench, "tune": tune,
    }  # fmt: skip
    begin = time.monotonic()
    try:
        outcome = sanitize(session, name) if name in SANITIZERS else functions[name](session)
    except Exception as error:  # of this program itself: the stages to come still run
        outcome = Outcome(name, "failed", f"{type(error).__name__}: {error}")
    outcome.seconds = round(time.monotonic() - begin, 1)
    with session.lock:
        session.outcomes.append(outcome)
        print(f"{name}: {outcome.state}, {outcome.seconds} s: {outcome.detail}", flush=True)
        with (session.out / "log.txt").open("a") as log:
            for path in sorted(session.work.glob(f"{name}*.log")):
                lines = tail(path, 40 if outcome.state == "passed" else 400)
                log.write("\n".join([f"==== {path.stem}: {outcome.state}", *lines, ""]))
        write(session)
    return outcome


def write(session: Session) -> None:
    """The summary and the figures, as far as there are any."""
    rows, proved = session.tasks("bench") + session.tasks("tune"), session.tasks("tests")
    for entry in [entry for entry in proved if entry["state"] == "failed"][200:]:
        entry.pop("text", None)  # a file of tens of MB helps nobody
    (session.out / "summary.md").write_text(summary(session))
    figures = {"machine": session.about, "stages": [asdict(o) for o in session.outcomes], "rows": rows, "tests": proved}
    (session.out / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")


def save(session: Session) -> list[Path]:
    """<gpu>-<date>.md and .json, among the results and beside the summary. Tests that passed are only counted there."""
    name = session.about.get("gpu", session.about["cpu"])
    counts = [{"op": op, "backend": backend, **count} for (op, backend), count in kernels(session).items()]
    more = {"stages": [asdict(o) for o in session.outcomes], "tests": counts}
    rows = session.tasks("bench") + session.tasks("tune")
    folders = [session.results, session.out] if {"tests", "bench", "tune"} & set(session.stages) else [session.out]
    part = ["quick"] * session.quick + [session.rows] * bool(session.rows)
    part += session.stages if set(session.stages) != set(STAGES) else []
    return [harness.save(f, name, session.about, summary(session), rows, part, **more) for f in folders]


def main(argv: list[str] | None = None) -> int:
    """Run the stages; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="where to write (default build/gpu)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results", help="default bench/results")
    parser.add_argument("--stages", default=",".join(STAGES), help="which to run (default %(default)s)")
    parser.add_argument("--rows", default="", metavar="TEXT", help="of the benchmark: with this in '<op> <row>-<pass>'")
    parser.add_argument("--seconds", type=float, default=510.0, help="for everything (default %(default)s)")
    parser.add_argument("--device", default="cuda", help="default cuda; cpu, with --quick: to test this program")
    parser.add_argument("--quick", action="store_true", help="little of everything: does it work?")
    args = parser.parse_args(argv)
    stages = tuple(args.stages.split(","))
    every = [name for group in GROUPS for name in group]
    unknown = set(stages) - set(every)
    if unknown:
        parser.error(f"--stages must be some of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    if args.device != "cpu" and not torch.cuda.is_available():
        why = "torch has no CUDA" if torch.version.cuda is None else "torch sees no GPU"
        print(f"bench.gpu: needs a machine with a GPU, got none ({why})", file=sys.stderr)
        return 2
    session = Session(
        args.device, args.quick, stages, args.rows, args.seconds, args.out.resolve(), args.results.resolve()
    )
    print("; ".join(f"{key} {value}" for key, value in session.about.items()), flush=True)
    if session.about["commit"] == "unknown":
        print("the commit is unknown: make gpu COMMIT=...", flush=True)
    for group in GROUPS:
        wanted = [name for name in group if name in stages]
        if wanted:
            with ThreadPoolExecutor(len(wanted)) as pool:
                list(pool.map(lambda name: stage(session, name), wanted))
    written = save(session)
    print("\n" + summary(session)[:9000])
    print(f"written in {time.monotonic() - session.begin:.0f} s: {', '.join(map(str, written))}, and .json")
    shutil.rmtree(session.work, ignore_errors=True)
    return int(any(outcome.state == "failed" for outcome in session.outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
