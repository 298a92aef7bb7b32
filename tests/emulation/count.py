"""How many instructions CUDA kernels take: those of their PTX, counted while they run on the host.

PYTHONPATH=tests python -m emulation.count "hotkernels.dpc_knn(torch.randn(1, 243, 512), 81, 2, ordered=True)"

prints each kernel's instructions of all threads over 32, as warps issue them; a multiprocessor issues four per cycle at
best. The GPU is of compute capability 9.0, with 132 multiprocessors. Machine code has other instructions, if not many.
"""

from __future__ import annotations

import ctypes
import itertools
import sys

import cuda_resources
import torch

import emulation
import hotkernels
from emulation.libraries import build_translations


def main() -> None:
    """Evaluate a call."""
    emulation.load()
    translations = build_translations("-DHK_COUNT", architectures=["90a"])
    emulation.translate_kernels(translations)
    emulation.configure(0)
    torch.manual_seed(0)
    eval(sys.argv[1], {"hotkernels": hotkernels, "torch": torch})
    count_of = ctypes.CDLL(str(translations["90a"])).hk_ptx_count
    count_of.restype = ctypes.c_char_p
    instructions = ctypes.c_uint64()
    for n in itertools.count():
        kernel = count_of(n, ctypes.byref(instructions))
        if kernel is None:
            break
        if instructions.value:
            print(f"{cuda_resources.demangle(kernel.decode())}: {instructions.value // 32}")


if __name__ == "__main__":
    main()
