"""merge_tokens on the shapes at which published models merge. _b<n>: the batch is cut to n."""

from bench.harness import at, at_gpu, rows

test_merge_tokens = rows(
    "merge_tokens",
    at("tiny", (1, 16, 64), 4, gpu=True),
    at("tcformer_stage1_b8", (8, 3136, 128), 784, memory=True),
    at("tcformer_stage2_b8", (8, 784, 320), 196),
    at("tcformer_stage3_b8", (8, 196, 512), 49),
    at("mmpose_384x288_b1", (1, 6912, 128), 1728),
    at("chat_univi_spatial_b8", (8, 256, 1024), 64, weighted=False),
    at("vit_token_reduction_b32", (32, 196, 384), 137),
    at_gpu("tcformer_stage1", (64, 3136, 128), 784),
    backward=True,
)
