"""invert_index at the sizes of keys per query (RoITr; 4096 x 32) and of a pruned batch, against a stable sort."""

from bench.harness import at, at_gpu, rows

test_invert_index = rows(
    "invert_index",
    at("hot_mixste", (8, 1, 81), 243),
    at("knn_n4096_k32", (1, 4096, 32), 4096),
    at("roitr_n10000_k16", (1, 10000, 16), 10000),
    at_gpu("knn_n16384_k32", (1, 16384, 32), 16384),
)
