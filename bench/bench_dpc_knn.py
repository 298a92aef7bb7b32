"""dpc_knn on the shapes at which published models call it. _b<n>: the batch is cut to n, to fit a small machine."""

from bench.harness import at, at_gpu, rows

test_dpc_knn = rows(
    "dpc_knn",
    at("tiny", (1, 16, 64), 4, k=5, gpu=True),
    at("hot_mixste", (16, 243, 512), 81, k=2, memory=True, gpu=True),
    at("hot_mixste_smooth", (16, 243, 512), 81, k=2, smooth=True),
    at("hot_mixste_b1", (1, 243, 512), 81, k=2, gpu=True),
    at("hot_motionbert", (8, 243, 256), 81, k=2),
    at("hot_motionagformer", (8, 243, 128), 81, k=2),
    at("tpc_mixste_centre", (4, 243, 512), 61, k=2, center=121),
    at("mhformer_centre_b16", (16, 351, 1536), 117, k=2, center=175, memory=True),
    at("tcformer_stage1_b2", (2, 3136, 128), 784, k=5, memory=True, quick=False),
    at("tcformer_stage2_b8", (8, 784, 320), 196, k=5),
    at("tcformer_stage3_b8", (8, 196, 512), 49, k=5),
    at("mmpose_384x288_b1", (1, 6912, 128), 1728, k=5, memory=True, quick=False),
    at("chat_univi_spatial_b8", (8, 256, 1024), 64, k=5),
    at("chat_univi_spatial2_b8", (8, 64, 1024), 32, k=3),
    at("prunevid_temporal", (1, 16, 4096), 4, k=7),
    at("prunevid_spatial", (1, 144, 4096), 72, k=7),
    at("holitom_b8", (8, 196, 3584), 49, k=7),
    at("vit_token_reduction_b32", (32, 196, 384), 137, k=5),
    at("vla_patches", (1, 729, 1152), 182, k=5),
    at("ermvp_lidar_half", (1, 12800, 64), 1408, k=10, memory=True, quick=False),
    at("tokens_1024", (8, 1024, 256), 256, k=5, quick=False),
    at("tokens_4096", (2, 4096, 256), 1024, k=5, memory=True, quick=False),
    at("tokens_8192", (1, 8192, 256), 2048, k=5, memory=True, quick=False),
    at_gpu("mhformer_centre", (256, 351, 1536), 117, k=2, center=175),
    at_gpu("tokens_4096_b8", (8, 4096, 256), 1024, k=5, memory=True),
    at_gpu("tokens_16384", (1, 16384, 1024), 4096, k=5, memory=True),
    at_gpu("tcformer_stage1", (64, 3136, 128), 784, k=5),
)
