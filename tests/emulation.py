"""CUDA C++ on the host: builds the CUDA library against an emulation of the runtime, and lets it serve CPU tensors."""

from __future__ import annotations


def load() -> None:
    """Build the emulated library and make its kernels, as backend "cuda", serve CPU tensors in this process."""
    raise NotImplementedError
