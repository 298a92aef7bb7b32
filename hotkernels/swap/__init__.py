"""Put the fused operators into a live model and take them out again.

A swapped module stays the same object: only its class becomes a subclass of its own class, made for the purpose, whose
`forward` is fused. Parameters, buffers, hooks, flags, state_dict keys and isinstance checks are therefore untouched;
deepcopy and pickle name the original class and what was swapped, and make the subclass again. One more attribute, which
goes with the class, records what the module held at the swap, so that later changes are noticed. A clustering function
is replaced by giving that subclass a copy of the method in which the function has another name, one that is added to
the file's globals, so that other models of the file, and the function itself, stay as they are. Where the method calls
`utils.cluster_dpc_knn`, the other name is that of a module that is `utils` except for that function.
"""

from . import modules  # noqa: F401  (registers them)
from .api import SwapReport, swap, swapped, unswap
from .twins import Twin, register_twin

__all__ = ["SwapReport", "Twin", "register_twin", "swap", "swapped", "unswap"]
