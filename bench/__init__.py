"""The benchmark suite: one file per op, one row per workload, named after where it comes from. See README.md."""
