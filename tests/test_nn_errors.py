"""What the drop-in modules refuse, and in which words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hotkernels.nn import Attention, BiLevelRoutingAttention, CrossAttention, TokenPruning, TokenRecovery

NESTED = torch.nested.nested_tensor([torch.zeros(3, 16), torch.zeros(2, 16)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Attention(30), r"^Attention: dim must be a multiple of num_heads = 8, got 30$"),
        (lambda: CrossAttention(30), r"^CrossAttention: dim must be a multiple of num_heads = 8, got 30$"),
        (lambda: Attention(16, num_heads=0), r"^Attention: num_heads must be at least 1, got 0$"),
        (lambda: Attention(1024, 2), r"^Attention: num_heads must be at least dim / 256 = 4, got 2$"),
        (lambda: Attention(0, 2), r"^Attention: dim must be at least 1, got 0$"),
        (lambda: Attention(-16, 2), r"^Attention: dim must be at least 1, got -16$"),
        (lambda: Attention(16, 2, qk_scale=math.inf), r"^Attention: qk_scale must be finite, got inf$"),
        (lambda: Attention(16, 2, attn_drop=1.5), r"^Attention: attn_drop must be in \[0, 1\), got 1.5$"),
        (lambda: CrossAttention(16, 2, proj_drop=-0.5), r"^CrossAttention: proj_drop must be in \[0, 1\), got -0.5$"),
        (lambda: TokenRecovery(30, 9), r"^TokenRecovery: dim must be a multiple of num_heads = 8, got 30$"),
        (lambda: TokenRecovery(16, 0), r"^TokenRecovery: length must be at least 1, got 0$"),
        (lambda: TokenPruning(0, 4), r"^TokenPruning: dim must be at least 1, got 0$"),
        (lambda: TokenPruning(16, 0), r"^TokenPruning: token_num must be at least 1, got 0$"),
        (lambda: TokenPruning(16, 4, k=0), r"^TokenPruning: k must be at least 1, got 0$"),
        (lambda: TokenPruning(16, 4, seed=2**63), r"^TokenPruning: seed must be in .+, got 9223372036854775808$"),
        (lambda: TokenPruning(16, 4)(torch.zeros(2, 5, 3, 12)), r"^TokenPruning: x must be .+ 16\], got .+ 12\]$"),
        (
            lambda: TokenPruning(16, 4)(torch.zeros(2, 3, 5, 16)),
            r"^TokenPruning: x must be \[B, F, J, C\] with F >= token_num = 4 and F >= k = 2, got \[2, 3, 5, 16\]$",
        ),
        (
            lambda: TokenPruning(16, 4)(torch.zeros(2, 5, 3, 16), torch.zeros(2, 3, dtype=torch.int64)),
            r"^TokenPruning: index must be \[B, M\] = \[2, 4\], got \[2, 3\]$",
        ),
        (lambda: Attention(16)(torch.zeros(2, 5, 16), along=1), r"^Attention: along must be -2 or -3, got 1$"),
        (lambda: Attention(16)(torch.zeros(2, 5, 16), along=-2.0), r"^Attention: along must be -2 or -3, got -2.0$"),
        (lambda: Attention(16)(torch.zeros(2, 5, 8)), r"^Attention: x must be .+ C = dim = 16, got \[2, 5, 8\]$"),
        (
            lambda: CrossAttention(16)(torch.zeros(5, 16), torch.zeros(2, 5, 8), torch.zeros(2, 5, 16)),
            r"^CrossAttention: x_2 must be \[\.\.\., C\] with C = dim = 16, got \[2, 5, 8\]$",
        ),
        (lambda: Attention(16)(torch.zeros(5, 16)), r"^Attention: x must be \[B, \.\.\., N, C\] .+, got \[5, 16\]$"),
        (lambda: Attention(16)(torch.zeros(2, 5, 16), along=-3), r"^Attention: x must be \[.+, got \[2, 5, 16\]$"),
        (
            lambda: Attention(16)(torch.zeros(2, 0, 16)),
            r"^Attention: x must be of at least one token, got \[2, 0, 16\]$",
        ),
        (
            lambda: Attention(16)(torch.zeros(2, 0, 5, 16), along=-3),
            r"^Attention: x must be of at least one token, got \[2, 0, 5, 16\]$",
        ),
        (
            lambda: CrossAttention(16)(torch.zeros(0, 16), *torch.zeros(2, 2, 5, 16)),
            r"^CrossAttention: x_1 must be of at least one token, got \[0, 16\]$",
        ),
        (
            lambda: CrossAttention(16)(torch.zeros(2, 5, 16), *torch.zeros(2, 2, 0, 16)),
            r"^CrossAttention: x_2 must be of at least one token, got \[2, 0, 16\]$",
        ),
        (lambda: Attention(16)(torch.zeros(2, 5, 3, 1, 16), along=-3), r"^Attention: x must be .+ \[2, 5, 3, 1, 16\]$"),
        (
            lambda: CrossAttention(16)(torch.zeros(1, 5, 16).expand(2, -1, -1), *torch.zeros(2, 3, 4, 16)),
            r"^CrossAttention: x_1 must be \[B, L, C\] with x_2's B = 3, got \[2, 5, 16\]$",
        ),
        (
            lambda: CrossAttention(16)(*[torch.zeros(5, 16)] * 3),
            r"^CrossAttention: x_2 must be \[B, M, C\] or \[B, M, J, C\], got \[5, 16\]$",
        ),
        (
            lambda: CrossAttention(16)(torch.zeros(16), *torch.zeros(2, 3, 4, 16)),
            r"^CrossAttention: x_1 must be \[L, C\], or \[B, L, C\] as x_2, got \[16\]$",
        ),
        (
            lambda: CrossAttention(16)(torch.zeros(2, 5, 16), *torch.zeros(2, 2, 4, 3, 16)),
            r"^CrossAttention: x_1 must be \[L, C\], or \[B, L, J, C\] as x_2, got \[2, 5, 16\]$",
        ),
        (
            lambda: CrossAttention(16)(torch.zeros(2, 5, 4, 16), *torch.zeros(2, 2, 4, 3, 16)),
            r"^CrossAttention: x_1 must be \[B = 2, L, J = 3, C\] as x_2, got \[2, 5, 4, 16\]$",
        ),
        (
            lambda: CrossAttention(16)(*[torch.zeros(2, 5, 16)] * 2, torch.zeros(2, 5, 3, 16)),
            r"^CrossAttention: x_3 must be \[B, M, C\] or \[B, M, J, C\] as x_2, got \[2, 5, 3, 16\]$",
        ),
        (
            lambda: CrossAttention(16)(*[torch.zeros(2, 5, 16)] * 2, torch.zeros(2, 4, 16)),
            r"^CrossAttention: x_3 must be \[2, 5, C\] as x_2, got \[2, 4, 16\]$",
        ),
        *[
            (lambda given=given: BiLevelRoutingAttention(32, **given), rf"^BiLevelRoutingAttention: {message}$")
            for given, message in (
                ({"num_heads": 5}, "dim must be a multiple of num_heads = 5, got 32"),
                ({"n_win": 0}, "n_win must be at least 1, got 0"),
                ({"topk": 50}, r"topk must be in \[1, 49\], got 50"),
                ({"side_dwconv": 4}, "side_dwconv must be 0 or odd, got 4"),
                ({"qk_dim": 16}, "qk_dim must be 32, got 16"),
                ({"kv_downsample_mode": "maxpool"}, "kv_downsample_mode must be 'identity', got 'maxpool'"),
                ({"param_attention": "qkv"}, "param_attention must be 'qkvo', got 'qkv'"),
                ({"soft_routing": True}, "soft_routing must be False, got True"),
            )
        ],
        (
            lambda: BiLevelRoutingAttention(32)(torch.zeros(2, 14, 14, 16)),
            r"^BiLevelRoutingAttention: x must be \[B, height, width, C = 32\], got \[2, 14, 14, 16\]$",
        ),
        (
            lambda: BiLevelRoutingAttention(32)(torch.zeros(2, 14, 13, 32)),
            r"^BiLevelRoutingAttention: x must be .+ that n_win = 7 divides \(or with auto_pad\), got \[2, 14, 13, 32",
        ),
        (
            lambda: BiLevelRoutingAttention(32, auto_pad=True)(torch.zeros(2, 14, 0, 32)),
            r"^BiLevelRoutingAttention: x must be of a height and a width .+, got \[2, 14, 0, 32\]$",
        ),
        (lambda: TokenPruning(16, 3)(torch.zeros(2, 5, 16)), r"^TokenPruning: x must be \[.+, got \[2, 5, 16\]$"),
        (lambda: TokenRecovery(16, 9)(torch.zeros(2, 5, 16)), r"^TokenRecovery: x must be \[.+, got \[2, 5, 16\]$"),
        (lambda: TokenRecovery(16, 9)(torch.zeros(2, 5, 3, 8)), r"^TokenRecovery: x must be \[.+, got \[2, 5, 3, 8\]$"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenRecovery(16, 9)(None), r"^TokenRecovery: x must be a torch.Tensor \[B, M, J, C\], got NoneType$"),
        (lambda: TokenPruning(16, 1)(torch.zeros(1, 2, 3, 16), [[0]]), r"^TokenPruning: index must be .+, got list$"),
        (lambda: TokenPruning(16, 1)(torch.ones(1, 2, 3, 16).long()), r"^TokenPruning: x must be .+, got int64$"),
        (
            lambda: Attention(16)(torch.zeros(1, 3, 16).long()),
            r"^Attention: x must be a tensor of float32, .+, got int64$",
        ),
        (lambda: Attention(16)(torch.zeros(1, 3, 16).to_sparse()), r"^Attention: x must be a dense tensor, got .+$"),
        (lambda: Attention(16)(NESTED), r"^Attention: x must be a dense tensor, got a nested one$"),
        (lambda: CrossAttention(16)(*[NESTED] * 3), r"^CrossAttention: x_1 must be a dense tensor, got a nested one$"),
        (
            lambda: TokenPruning(16, 1)(torch.zeros(2, 3, 4, 16), NESTED),
            r"^TokenPruning: index must be a dense tensor, got a nested one$",
        ),
        (
            lambda: CrossAttention(16)(*torch.zeros(2, 1, 3, 16), torch.zeros(1, 3, 16).int()),
            r"^CrossAttention: x_3 must be a tensor of float32, .+, got int32$",
        ),
        (lambda: TokenPruning(16, 1, center=1), r"^TokenPruning: center must be a bool, got int$"),
        (lambda: Attention("a"), r"^Attention: dim must be an int, got str$"),
        (lambda: Attention(16.0, 2), r"^Attention: dim must be an int, got float$"),
        (lambda: Attention(16, 2, qk_scale="1"), r"^Attention: qk_scale must be a float, got str$"),
        (lambda: Attention(16, 2)([1, 2]), r"^Attention: x must be a torch.Tensor \[.+, got list$"),
        (lambda: CrossAttention(16)(*[np.zeros((1, 2, 16))] * 3), r"^CrossAttention: x_1 must be .+, got ndarray$"),
        (
            lambda: CrossAttention(16)(*[torch.zeros(1, 2, 16)] * 2, None),
            r"^CrossAttention: x_3 must be a torch.Tensor \[B, M, C\] or .+ as x_2, got NoneType$",
        ),
    ],
)
def test_wrong_types(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
