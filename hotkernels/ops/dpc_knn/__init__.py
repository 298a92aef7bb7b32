"""`dpc_knn`: public function in api.py, definition in reference.py."""

from .api import DensityPeaks, dpc_knn

__all__ = ["DensityPeaks", "dpc_knn"]
