"""gathered_attention from the qkv projection's output, as published models call it. _b<n>: batch cut to n."""

import torch

from bench.harness import CONTENDERS as DENSE
from bench.harness import At, at, at_gpu, rows

NO_GATHER = ("sdpa", "ours")  # rows on which the eager gather would take many seconds and GB


def dense(name: str, B: int, N: int, heads: int, D: int, dtype: torch.dtype = torch.float32) -> At:
    """All tokens attend to all."""
    return at(name, (B, N, heads * D), N, heads=heads, dtype=dtype, contenders=DENSE)


test_dense = rows(
    "gathered_attention",
    dense("mixste_spatial", 486, 17, 8, 64),
    dense("hot_mixste_kept", 34, 81, 8, 64),
    dense("mixste_temporal", 34, 243, 8, 64),
    dense("spatial_d32", 486, 17, 8, 32),
    dense("kept_d32", 34, 81, 8, 32),
    dense("temporal_d32", 34, 243, 8, 32),
    dense("spatial_bf16", 486, 17, 8, 64, torch.bfloat16),
    dense("kept_bf16", 34, 81, 8, 64, torch.bfloat16),
    dense("temporal_bf16", 34, 243, 8, 64, torch.bfloat16),
    dense("mhformer_channels", 17, 351, 9, 39),
    backward=True,
)
test_set = rows(
    "gathered_attention",
    at("hot_set_243_to_81", (34, 243, 512), 81, contenders=DENSE),
    backward=True,
)
test_regions = rows(
    "gathered_attention",
    *(
        at(f"biformer_{name}", shape, shape[1], heads=shape[2] // 32, regions=regions, k=k, contenders=DENSE)
        for name, shape, regions, k in (
            ("stage1", (8, 3136, 64), 49, 1),
            ("stage2", (8, 784, 128), 49, 4),
            ("stage3", (8, 196, 256), 49, 16),
        )
    ),
    at("biformer_512px", (1, 16384, 64), 16384, heads=2, regions=256, k=4, memory=True, contenders=DENSE),
    backward=True,
)
test_per_query = rows(
    "gathered_attention",
    at("knn_n4096_k32", (1, 4096, 512), 4096, k=32, quick=False, memory=True, contenders=DENSE),
    at("roitr_b1", (1, 10000, 128), 10000, heads=4, k=16, quick=False),
    backward=True,
)
test_per_query_inverted = rows(
    "gathered_attention",
    at("knn_n4096_k32_inverted", (1, 4096, 512), 4096, k=32, inverted=True, quick=False, contenders=NO_GATHER),
    backward=True,
)
test_on_gpus = rows(
    "gathered_attention",
    at_gpu("tiny", (2, 17, 512), 17, contenders=DENSE),
    *(
        at_gpu(f"{name}_{'bf16' if dtype == torch.bfloat16 else 'fp32'}", shape, keys, dtype=dtype, contenders=DENSE)
        for dtype in (torch.bfloat16, torch.float32)
        for name, shape, keys in (
            ("mixste_spatial_b16", (3888, 17, 512), 17),
            ("hot_mixste_kept_b16", (272, 81, 512), 81),
            ("mixste_temporal_b16", (272, 243, 512), 243),
            ("hot_set_243_to_81_b16", (272, 243, 512), 81),
        )
    ),
    at_gpu(
        "biformer_stage1_b64_bf16",
        (64, 3136, 64),
        3136,
        heads=2,
        regions=49,
        k=1,
        dtype=torch.bfloat16,
        contenders=DENSE,
    ),
    at_gpu("mixste_temporal_b16_tf32", (272, 243, 512), 243, contenders=DENSE, tf32=True),
    at_gpu("knn_n16384_k32_bf16", (1, 16384, 512), 16384, k=32, dtype=torch.bfloat16, contenders=DENSE),
    at_gpu(
        "knn_n16384_k32_inverted_bf16",
        (1, 16384, 512),
        16384,
        k=32,
        inverted=True,
        dtype=torch.bfloat16,
        contenders=NO_GATHER,
    ),
    backward=True,
)
test_per_query_and_dense = rows(
    "gathered_attention",
    *(
        at(f"knn_n4096_k{k}_{where}", (1, 4096, 512), 4096, k=k, local=local, quick=False, contenders=NO_GATHER)
        for k in (32, 64, 128, 256)
        for where, local in (("random", False), ("local", True))
    ),
)
