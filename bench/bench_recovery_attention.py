"""recovery_attention at HoT's shapes: the whole module, then the attention alone. _b<n>: batch cut to n."""

import torch

from bench.harness import CONTENDERS as DENSE
from bench.harness import at, at_gpu, rows

test_module = rows(
    "recovery_attention",
    at("hot_mixste_b1", (1, 243, 17, 512), 81),
    at("hot_mixste_b2", (2, 243, 17, 512), 81, memory=True),
    at("hot_motionbert_b2", (2, 243, 17, 256), 81),
    at("hot_motionagformer_b2", (2, 243, 17, 128), 81),
    at_gpu("hot_mixste_b16_tf32", (16, 243, 17, 512), 81, tf32=True),
    at_gpu("hot_mixste_b16_bf16", (16, 243, 17, 512), 81, dtype=torch.bfloat16),
    backward=True,
)
test_core = rows(
    "recovery_attention",
    at("core_mixste_b1", (1, 243, 17, 512), 81, core=True, contenders=DENSE),
    at("core_mixste_b2", (2, 243, 17, 512), 81, core=True, contenders=DENSE),
    at_gpu("core_mixste_b16_bf16", (16, 243, 17, 512), 81, core=True, dtype=torch.bfloat16, contenders=DENSE),
    at_gpu("core_mixste_b16_fp32", (16, 243, 17, 512), 81, core=True, contenders=DENSE),
    backward=True,
)
