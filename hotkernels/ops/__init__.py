"""One folder per operator: api.py (public function), reference.py (the definition), kernels and launches (Triton)."""
