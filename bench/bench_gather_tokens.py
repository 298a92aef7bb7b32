"""gather_tokens on the shapes at which published models prune. _b<n>: the batch is cut to n."""

from bench.harness import at, at_gpu, rows

test_gather_tokens = rows(
    "gather_tokens",
    at("tiny", (1, 16, 64), 4, pos=False, gpu=True),
    at("hot_mixste", (8, 243, 17, 512), 81, memory=True),
    at("hot_motionagformer", (8, 243, 17, 128), 81),
    at("evit_b64", (64, 197, 384), 138, pos=False),
    at_gpu("hot_mixste_b64", (64, 243, 17, 512), 81),
    backward=True,
)
