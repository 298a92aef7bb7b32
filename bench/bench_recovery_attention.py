"""recovery_attention at HoT's shapes: the whole module, then the attention alone. _b<n>: batch cut to n."""

from bench.harness import at, rows

test_module = rows(
    "recovery_attention",
    at("hot_mixste_b1", (1, 243, 17, 512), 81),
    at("hot_mixste_b2", (2, 243, 17, 512), 81, memory=True),
    at("hot_motionbert_b2", (2, 243, 17, 256), 81),
    at("hot_motionagformer_b2", (2, 243, 17, 128), 81),
    backward=True,
)
test_core = rows(
    "recovery_attention",
    at("core_mixste_b1", (1, 243, 17, 512), 81, core=True, contenders=("eager", "compile", "sdpa", "ours")),
    at("core_mixste_b2", (2, 243, 17, 512), 81, core=True, contenders=("eager", "compile", "sdpa", "ours")),
    backward=True,
)
