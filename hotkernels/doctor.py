"""What this installation is and what serves each op on this machine, in one page to read or to paste into a report."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__
from .backends import LIBRARIES, OPS, choose, instruction_set

_ENVIRONMENT = ("HOTKERNELS_BACKEND", "HOTKERNELS_ISA")
# (op, backend) -> "GPU, date, commit" of the last run of its tests there, as `make gpu` prints it for what passed.
# Kernels that are not here are compiled only.
GPU_RUNS: dict[tuple[str, str], str] = {}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name and, as clouds name several generations alike, its numbers: AMD EPYC family 25 model 17."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    if "model name" not in fields:
        return platform.processor() or platform.machine() or "unknown"
    numbers = (("family", fields.get("cpu family")), ("model", fields.get("model")))
    return " ".join([fields["model name"], *(f"{name} {number}" for name, number in numbers if number)])


def _instruction_sets() -> str:
    """The instruction set in use, and those that could be."""
    try:
        current = instruction_set()
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    if current is None:
        return "none in use: the C++ kernels are not loaded"
    available = []
    for name in ("base", "avx2", "avx512", "avx512_bf16"):
        try:
            instruction_set(name)
        except (RuntimeError, ValueError):
            continue
        available.append(name)
    instruction_set(current)
    return f"{current} in use; available: {', '.join(available)}"


def failed() -> list[str]:
    """The extensions that were built and should have loaded, but did not."""
    package = Path(__file__).parent
    report = package / "build_report.txt"
    said = report.read_text() if report.exists() else ""

    def built(name: str) -> bool:
        return f"{name}: built" in said or any(package.glob(f"{name}.*so"))

    # Without CUDA in torch, or without _C_cpu, loading _C_cuda is not even tried.
    tried = [name for name in LIBRARIES if name == "_C_cpu" or (torch.version.cuda and LIBRARIES["_C_cpu"] is None)]
    return [name for name in tried if LIBRARIES[name] is not None and built(name)]


def _devices() -> list[str]:
    return ["cpu"] + ["cuda"] * torch.cuda.is_available()


def _servers(op: str, device: str) -> list[tuple[str | None, str, str]]:
    """(backend, dtype, why none) for each dtype, as a call without `backend=` would find it."""
    found: list[tuple[str | None, str, str]] = []
    for dtype in OPS[op]["torch"].dtypes:
        name = str(dtype).removeprefix("torch.")
        try:
            found.append((choose(op, torch.empty(0, dtype=dtype, device=device), None), name, ""))
        except (ValueError, TypeError) as error:
            found.append((None, name, str(error)))
    return found


def _served(op: str, device: str) -> str:
    """`cpp: float32, float16; torch: float64`."""
    dtypes: dict[str, list[str]] = {}
    for backend, dtype, why in _servers(op, device):
        dtypes.setdefault(backend or f"none ({why})", []).append(dtype)
    return "; ".join(f"{backend}: {', '.join(names)}" for backend, names in dtypes.items())


def _unserved() -> str | None:
    """Why nothing serves a call, of any op on any device; None if something does."""
    servers = [server for device in _devices() for op in OPS for server in _servers(op, device)]
    return None if any(backend for backend, *_ in servers) else servers[0][2]


def unfused() -> str | None:
    """Why plain PyTorch serves every call on CPUs, which whoever reads a time should know; None if kernels do."""
    why = LIBRARIES["_C_cpu"]
    return None if why is None else f"nothing is fused: {why} (see hotkernels doctor)"


def problems() -> list[str]:
    """What is wrong with this installation, or with the environment that it was started in."""
    found = [f"{name} was built but did not load: {LIBRARIES[name]}" for name in failed()]
    if "not built in the source tree" in (LIBRARIES["_C_cpu"] or ""):
        found.append(f"{LIBRARIES['_C_cpu']}: build it there (pip install -e .) or start Python in another folder")
    if torch.cuda.device_count() and not torch.cuda.is_available():
        found.append("there is a GPU on which CUDA does not start: its driver may be older than this torch needs")
    if why := _unserved():
        found.append(f"HOTKERNELS_BACKEND={os.environ.get('HOTKERNELS_BACKEND')} serves no call here: {why}")
    try:
        instruction_set()
    except (RuntimeError, ValueError) as error:
        found.append(str(error).splitlines()[0])
    return found


def gpu_kernels() -> dict[tuple[str, str], str]:
    """(op, backend) of each GPU kernel -> where it ran, or that it is compiled only."""
    kernels = [(op, backend) for op in sorted(OPS) for backend in ("cuda", "triton") if backend in OPS[op]]
    return {key: f"run on {GPU_RUNS[key]}" if key in GPU_RUNS else "compiled only" for key in kernels}


def report() -> str:
    """The whole page."""
    versions = {"hotkernels": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {package: _version(package) for package in ("triton", "numpy")}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()) if torch.cuda.is_available()]
    environment = [f"  {name}={os.environ[name]}" for name in _ENVIRONMENT if os.environ.get(name)]
    lines = ["versions", *(f"  {name:<12}{version}" for name, version in versions.items())]
    lines += [
        "package",
        f"  {Path(__file__).parent}",
        "machine",
        f"  platform    {platform.platform()}",
        f"  cpu         {processor()}, {os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads",
        f"  kernels     {_instruction_sets()}",
        f"  gpu         {', '.join(gpus) or 'none'}",
        "extensions",
        *(f"  {name:<12}{(why or 'loaded').removeprefix(f'{name}: ')}" for name, why in LIBRARIES.items()),
        "environment",
        *(environment or [f"  none of {', '.join(_ENVIRONMENT)} is set"]),
    ]
    for device in _devices():
        lines += [f"served on {device} by", *(f"  {op:<20}{_served(op, device)}" for op in sorted(OPS))]
    lines += ["gpu kernels", *(f"  {op:<20}{name}: {state}" for (op, name), state in gpu_kernels().items())]
    lines += [f"PROBLEM: {problem}" for problem in problems()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the page; 1 if it names a problem."""
    argparse.ArgumentParser(prog="hotkernels doctor", description=__doc__).parse_args(argv)
    print(report())
    return 1 if problems() else 0
