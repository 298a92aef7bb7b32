"""Which backend serves a call, and why the others do not.

Backends: "torch" (plain PyTorch, the definition), "cpp" (C++ on CPUs), "cuda" (CUDA C++), "triton". An op registers the
kernels it has; a call takes the first that can serve it, fastest first, or the one named by `backend=` or by the
environment variable HOTKERNELS_BACKEND (read at import).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dtypes import names
from .errors import check_probability, fail

BACKENDS = ("cuda", "triton", "cpp", "torch")  # fastest first
FROM_ENVIRONMENT = os.environ.get("HOTKERNELS_BACKEND") or None
"""The backend of HOTKERNELS_BACKEND, for all calls that name none."""


def _load(library: str) -> str | None:
    """Import a native library, which registers its operators. None if it loaded, else the exact reason why not."""
    name, package = f"hotkernels.{library}", Path(__file__).parent
    try:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and Path(spec.origin).resolve().parent != package.resolve():
            raise ImportError(f"what Python finds belongs to another hotkernels: {spec.origin}")
        importlib.import_module(name)
    except ImportError as error:
        report = package / "build_report.txt"
        if not report.exists() and (package.parent / "setup.py").exists():
            return f"{library}: not built in the source tree {package.parent}, from which Python imports hotkernels"
        lines = report.read_text().splitlines() if report.exists() else []
        why = [line for line in lines if line.startswith(f"{library}: not built")]
        return why[0] if why else f"{library}: {error}"
    return None


# Library -> None if it is loaded, else why not.
LIBRARIES: dict[str, str | None] = {"_C_cpu": _load("_C_cpu")}
if LIBRARIES["_C_cpu"] is not None:
    LIBRARIES["_C_cuda"] = "_C_cuda: needs _C_cpu, which holds the operators' schemas"
elif torch.version.cuda is None:
    LIBRARIES["_C_cuda"] = "_C_cuda: torch has no CUDA"
else:
    LIBRARIES["_C_cuda"] = _load("_C_cuda")

# Under its interpreter, Triton kernels run on CPU tensors and replace the C++ ones.
TRITON_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
if LIBRARIES["_C_cpu"] is not None:
    LIBRARIES["triton"] = "triton: needs _C_cpu, which holds the operators' schemas"
elif TRITON_DEVICE == "cuda" and torch.version.cuda is None and torch.version.hip is None:
    LIBRARIES["triton"] = "triton: torch has no CUDA"
else:
    LIBRARIES["triton"] = None if importlib.util.find_spec("triton") else "triton: not installed"


@dataclass(frozen=True)
class Kernel:
    """What one backend of one op serves."""

    dtypes: tuple[torch.dtype, ...]
    device: str | None = None  # None: any
    library: str | None = None  # None: none needed


# op -> backend -> kernel.
OPS: dict[str, dict[str, Kernel]] = {}


def register(op: str, **kernels: Kernel) -> None:
    """Declare the backends that an op has."""
    OPS[op] = kernels


def why_not(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve `op` on this device and dtype; None if it can."""
    kernel = OPS[op].get(backend)
    if kernel is None:
        return f"{op} has no {backend} kernel"
    if kernel.device is not None and device != kernel.device:
        return f"it runs on {kernel.device} tensors, got {device}"
    if dtype not in kernel.dtypes:
        return f"it takes {names(kernel.dtypes)}, got {names([dtype])}"
    if backend == "cpp" and "triton" in OPS[op] and TRITON_DEVICE == "cpu" and LIBRARIES["triton"] is None:
        return "under Triton's interpreter its kernels replace the C++ ones"
    if kernel.library is not None and LIBRARIES[kernel.library] is not None:
        return LIBRARIES[kernel.library]
    return None


def choose(op: str, x: Tensor, backend: str | None, first: str = "x") -> str:
    """The backend that serves a call on x, the op's argument `first`: the named one, or the first that can.

    Raises ValueError if the named one cannot, TypeError for a dtype that none serves.
    """
    device, dtype = x.device.type, x.dtype
    named = "backend"
    if backend is None and FROM_ENVIRONMENT is not None:
        backend, named = FROM_ENVIRONMENT, "HOTKERNELS_BACKEND"
    if backend is None and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        backend = "torch"  # ONNX has no operators of ours
    if backend is None:
        kernels = OPS[op]
        for name in BACKENDS:
            if name in kernels and why_not(op, name, device, dtype) is None:
                return name
        served = names(OPS[op]["torch"].dtypes)
        fail(op, first, f"of a dtype that a backend serves ({served})", names([dtype]), TypeError)
    if not isinstance(backend, str) or backend not in BACKENDS:
        fail(op, named, ", ".join(["None" if named == "backend" else "unset", *map(repr, BACKENDS)]), repr(backend))
    why = why_not(op, backend, device, dtype)
    if why is not None:
        fail(op, named, "one that can serve this call", f"'{backend}' ({why})")
    return backend


_NO_DROPOUT = "it has no dropout"


def choose_attention(op: str, query: Tensor, dropout_p: float, backend: str | None, first: str = "query") -> str:
    """The backend of an attention call: dropout is honoured by the torch backend only."""
    check_probability(op, "dropout_p", dropout_p)
    if dropout_p > 0.0:
        if isinstance(backend, str) and backend != "torch":
            fail(op, "backend", "one that can serve this call", f"'{backend}' ({_NO_DROPOUT}; 'torch' has)")
        backend = "torch" if backend is None else backend
    return choose(op, query, backend, first)


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: per backend, None if it can serve the call, else why not."""

    op: str
    chosen: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op}: served by {self.chosen}"]
        for backend, why in self.reasons.items():
            state = "serves this call" if backend == self.chosen else "could serve this call" if why is None else why
            lines.append(f"  {backend:<7}{state}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(op: str | Callable[..., Any], *args: object, **kwargs: object) -> Explanation:
    """Say which backend would serve `op(*args, **kwargs)`, and for each of the others why not.

    Args:
        op: the public function or its name, as in ``hotkernels.dpc_knn`` or ``"dpc_knn"``.
        *args, **kwargs: the call. Device and dtype of its first argument decide, ``backend=``, and of attention
            ``dropout_p=``; all else is ignored.

    Returns:
        An Explanation: prints as a table; ``.chosen`` and ``.reasons`` hold the same.

    Raises:
        ValueError: for an unknown op, or a named backend that cannot serve the call.
        TypeError: without a tensor, or with one of a dtype that no backend serves.

    Example::

        >>> import torch, hotkernels
        >>> hotkernels.explain("dpc_knn", torch.zeros(1, 16, 8, dtype=torch.float64))
        dpc_knn: served by torch
          cuda   it runs on cuda tensors, got cpu
          triton dpc_knn has no triton kernel
          cpp    it takes float32, float16 or bfloat16, got float64
          torch  serves this call
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        fail("explain", "op", "one of " + ", ".join(sorted(OPS)), repr(name))
    parameters = inspect.signature(getattr(sys.modules[__package__], name)).parameters
    first = next(iter(parameters))
    x = args[0] if args else kwargs.get(first)
    if not isinstance(x, Tensor):
        fail("explain", first, f"{name}'s first argument, a torch.Tensor", type(x).__name__, TypeError)
    backend: Any = kwargs.get("backend")
    dropout_p: Any = kwargs.get("dropout_p", 0.0) if "dropout_p" in parameters else 0.0
    chosen = choose_attention(name, x, dropout_p, backend, first)
    reasons = {b: why_not(name, b, x.device.type, x.dtype) for b in BACKENDS}
    if dropout_p > 0.0:
        reasons = {b: why or (None if b == "torch" else _NO_DROPOUT) for b, why in reasons.items()}
    return Explanation(name, chosen, reasons)


def instruction_set(force: str | None = None) -> str | None:
    """The instruction set of the C++ kernels, None if they are not loaded; `force` changes it.

    base, avx2, avx512, or avx512_bf16: avx512, and bfloat16 attention multiplies bfloat16.
    """
    return None if LIBRARIES["_C_cpu"] is not None else str(call(torch.ops.hotkernels._isa, force))


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call function(*args) and turn kernel errors of the one form into ValueErrors, except launch failures.

    Since 2.15 PyTorch raises everything that stable-ABI kernels throw as RuntimeError.
    """
    if torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except RuntimeError as error:
        op, _, rest = str(error).partition(": ")
        if op in (*OPS, "hotkernels") and " must be " in rest and not rest.startswith("launch "):
            raise ValueError(str(error)) from None
        raise
