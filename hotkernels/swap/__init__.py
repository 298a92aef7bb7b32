"""Put the fused operators into a live model and take them out again.

- A swapped module stays the same object: only its class becomes a subclass of its own class, whose `forward` is fused.
  Parameters, buffers, hooks, flags, state_dict keys and isinstance checks are therefore untouched. An attribute that
  comes and goes with the class records what the module held at the swap, so that later changes are noticed.
- deepcopy and pickle name the original class and what was swapped, and make the subclass again.
- Where a method calls a clustering function, the subclass has a copy of the method that calls ours under another name,
  one that is added to the file's globals. The function itself, and other models of the file, stay as they are. For
  `utils.cluster_dpc_knn`, the other name is that of a module that is `utils` except for that function.
"""

from . import modules  # noqa: F401  (registers them)
from .api import SwapReport, swap, swapped, unswap
from .twins import Twin, register_twin

__all__ = ["SwapReport", "Twin", "register_twin", "swap", "swapped", "unswap"]
