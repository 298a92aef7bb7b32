"""GPU kernels on the host: the CUDA library's sources, or their PTX (ptx.py), over an emulation of the runtime."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
from pathlib import Path

import torch

from hotkernels import backends

from .libraries import LIBRARY, MACHINE, SELFTEST, build, build_translations

ORDERS = range(16)  # bits: warps, lanes, blocks reversed, asynchronous copies done late


def load(*, by_ptx: bool = False) -> None:
    """Let the CUDA kernels, as backend "cuda", serve CPU tensors in this process."""
    build()
    torch.ops.load_library(str(LIBRARY))
    if by_ptx:
        translate_kernels(build_translations())
    backends.LIBRARIES["_C_cuda"] = None
    for kernels in backends.OPS.values():
        if "cuda" in kernels:
            kernels["cuda"] = dataclasses.replace(kernels["cuda"], device="cpu")


def _symbols(library: Path) -> dict[str, int]:
    """Every function of a library -> where it is."""
    said = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    return {symbol: int(place, 16) for place, symbol in re.findall(r"^(\S+) [tTW] (\S+)$", said, re.MULTILINE)}


def _kernels(symbols: list[str]) -> dict[str, str]:
    """`gather_tokens_fwd_kernel<float, 4, true>` -> its symbol: compilers disagree on namespaces without a name."""
    mangled = [symbol for symbol in symbols if symbol.startswith("_Z") and "_kernel" in symbol]
    said = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout
    whole = re.compile(r"(?:void )?(?:\w+::|\(anonymous namespace\)::)+(\w+_kernel(?:<[^()]*>)?)\(.*\)")
    found = zip(map(whole.fullmatch, said.splitlines()), mangled, strict=True)
    return {kernel[1]: symbol for kernel, symbol in found if kernel is not None}


def translate_kernels(translations: dict[str, Path]) -> None:
    """Let the translations of every kernel run instead of it."""
    places = _symbols(LIBRARY)
    exported = "hk_dpc_knn_tune"
    address = ctypes.cast(ctypes.CDLL(str(LIBRARY))[exported], ctypes.c_void_p).value
    assert address is not None
    kernels = {name: address - places[exported] + places[symbol] for name, symbol in _kernels(list(places)).items()}
    translate = ctypes.CDLL(str(MACHINE)).hk_emulation_translate
    for arch, path in translations.items():
        library = ctypes.CDLL(str(path))
        entries = _kernels([symbol.removeprefix("K_") for symbol in _symbols(path) if symbol.startswith("K_")])
        assert entries.keys() == kernels.keys()
        for name, symbol in entries.items():
            function = ctypes.cast(library[f"K_{symbol}"], ctypes.c_void_p)
            translate(ctypes.c_void_p(kernels[name]), arch == "90a", function)


def configure(order: int | None = None, compute_capability: int = 90) -> None:
    """Choose which warps, lanes and blocks run first and which GPU this is.

    `order` is a sum of bits, see emulation.h; None takes another at every launch.
    """
    set_ = ctypes.CDLL(str(MACHINE)).hk_emulation_set
    set_(ctypes.c_int(-1 if order is None else order), ctypes.c_int(compute_capability))


def selftest(which: int, *, order: int = 0, bug: bool = False) -> float | None:
    """The error of a kernel of selftest.cpp; infinite if its launch failed, None if there is no such kernel."""
    configure(order)
    run = ctypes.CDLL(str(SELFTEST)).hk_emulation_selftest
    run.restype = ctypes.c_double
    error = run(which, bug)
    return {-1.0: float("inf"), -2.0: None}.get(error, error)
