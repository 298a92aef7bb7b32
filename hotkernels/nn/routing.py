"""Attention between regions of an image as BiFormer publishes it (Zhu et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ..dtypes import FLOATING
from ..errors import check_bool, check_float, check_int, check_tensor, fail
from ..ops.gathered_attention import gathered_attention
from .attention import check_dim
from .linear import linear

_FEW = 8  # tokens of a region; fewer are better served by an index per query: 4 in 0.5 to 0.75 of the time


class BiLevelRoutingAttention(nn.Module):
    """Attention of the tokens of each region to those of the `topk` regions most like it: BiFormer's.

    An image is cut into n_win x n_win regions. The mean query of a region is multiplied with the mean key of every one,
    and its queries attend to all tokens of the `topk` regions with the largest products. Keys are read where they lie:
    no copy of them per region and no matrix of probabilities, forward or backward.

    Same constructor, attributes and state_dict keys as the published module.

    Args:
        dim: channels C, a multiple of num_heads; C / num_heads up to 256.
        num_heads: H.
        n_win: regions along each side of the image.
        qk_dim: channels of queries and keys; only None or dim.
        qk_scale: scale of the logits; None, or 0 as published, = dim ** -0.5 (of all heads' channels, as published).
        kv_per_win, kv_downsample_ratio, kv_downsample_kernel: accepted, as published, and unused.
        kv_downsample_mode: only "identity": keys are not pooled.
        topk: regions that a region attends to, in [1, n_win * n_win].
        param_attention: only "qkvo": with projections.
        param_routing, diff_routing, soft_routing: only False: regions are chosen, not weighted.
        side_dwconv: kernel size of the depthwise convolution of the values that is added to the result; 0 = none.
        auto_pad: pad images whose sides n_win does not divide, with zeros at the bottom and at the right.
        device, dtype: of the parameters, as every PyTorch module takes them.

    Raises:
        ValueError, TypeError: ``BiLevelRoutingAttention: <arg> must be <expected>, got <actual>``.

    Example::

        >>> import torch
        >>> from hotkernels.nn import BiLevelRoutingAttention
        >>> attention = BiLevelRoutingAttention(64, num_heads=2, topk=4)
        >>> attention(torch.randn(2, 28, 28, 64)).shape  # B, height, width, C
        torch.Size([2, 28, 28, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_per_win: int | None = 4,
        kv_downsample_ratio: int | None = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "identity",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dim(_NAME, dim, num_heads)
        check_int(_NAME, "n_win", n_win, 1, None)
        check_int(_NAME, "topk", topk, 1, n_win * n_win)
        check_int(_NAME, "side_dwconv", side_dwconv, 0, None)
        if side_dwconv and side_dwconv % 2 == 0:
            fail(_NAME, "side_dwconv", "0 or odd", side_dwconv)
        check_bool(_NAME, "auto_pad", auto_pad)
        if qk_scale is not None:
            check_float(_NAME, "qk_scale", qk_scale)
        only: dict[str, tuple[Any, Any]] = {
            "qk_dim": (qk_dim or dim, dim),
            "kv_downsample_mode": (kv_downsample_mode, "identity"),
            "param_attention": (param_attention, "qkvo"),
            "param_routing": (param_routing, False),
            "diff_routing": (diff_routing, False),
            "soft_routing": (soft_routing, False),
        }
        for arg, (given, served) in only.items():
            if given != served:
                fail(_NAME, arg, repr(served), repr(given))
        self.dim = dim
        self.num_heads = num_heads
        self.n_win = n_win
        self.topk = topk
        self.scale = qk_scale or dim**-0.5
        self.auto_pad = auto_pad
        factory: Any = {"device": device, "dtype": dtype}
        self.lepe = (
            nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, **factory)
            if side_dwconv
            else torch.zeros_like
        )
        # Published as a module that splits what its own qkv makes.
        self.qkv = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, **factory)})
        self.wo = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Attend between the regions of x [B, height, width, C]; returns the same shape."""
        n = self.n_win
        check_tensor(_NAME, "x", x, "[B, height, width, C]", FLOATING)
        if x.dim() != 4 or x.shape[-1] != self.dim:
            fail(_NAME, "x", f"[B, height, width, C = {self.dim}]", list(x.shape))
        if min(x.shape[1:3]) < 1 or not (self.auto_pad or x.shape[1] % n == x.shape[2] % n == 0):
            fail(_NAME, "x", f"of a height and a width that n_win = {n} divides (or with auto_pad)", list(x.shape))
        # By PyTorch's product, not by `linear`: routes that nearly tie are as the published module rounds them.
        return bi_level_routing(
            self,
            x,
            lambda regions: self.qkv["qkv"](regions).chunk(3, -1),
            lambda query, key: (query * self.scale @ key.mT).topk(self.topk).indices,
        )


_NAME = BiLevelRoutingAttention.__name__


def bi_level_routing(
    module: Any,
    x: Tensor,
    project: Callable[[Tensor], tuple[Tensor, ...]],
    routes: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`BiLevelRoutingAttention.forward` for any module that has its lepe, wo, n_win, num_heads, scale and auto_pad.

    `project` makes query, key and value; `routes` says to which regions [B, P, topk] those with the mean queries and
    keys [B, P, C] attend.
    """
    n, (height, width) = module.n_win, x.shape[1:3]
    if module.auto_pad:
        x = F.pad(x, (0, 0, 0, -width % n, 0, -height % n))
    query, key, value = project(_regions(x, n))
    chosen = routes(query.detach().mean(2), key.detach().mean(2))
    out = attend_to_regions(query, key, value, chosen, module.num_heads, module.scale)
    out, values = (_image(regions, x.shape, n) for regions in (out, value))
    out = out + module.lepe(values.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return linear(module.wo, out)[:, :height, :width].contiguous()


def attend_to_regions(
    query: Tensor, key: Tensor, value: Tensor, routes: Tensor, num_heads: int, scale: float, backend: str | None = None
) -> Tensor:
    """Let the R tokens of each of P regions [B, P, R, C] attend to those of the regions routes [B, P, topk]."""
    B, P, R, C = query.shape
    if B == 0:
        return value
    if R < _FEW:
        slots = (routes[..., None] * R + torch.arange(R, device=routes.device)).flatten(2)  # of a sample's tokens
        index = slots.repeat_interleave(R, 1)
        query, key, value = (t.flatten(1, 2) for t in (query, key, value))
    else:  # the samples' regions attend, each to a set of the tokens of all samples
        first = torch.arange(B, device=routes.device)[:, None, None] * (P * R) + routes * R
        index = (first[..., None] + torch.arange(R, device=routes.device)).flatten(2).flatten(0, 1)
        query, key, value = query.flatten(0, 1), key.flatten(0, 2)[None], value.flatten(0, 2)[None]
    query, key, value = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    out = gathered_attention(query, key, value, index, scale=scale, backend=backend)
    return out.transpose(1, 2).reshape(B, P, R, C)


def _regions(image: Tensor, n: int) -> Tensor:
    """[B, height, width, C] in n x n regions: [B, n * n, tokens of a region, C]."""
    B, height, width, C = image.shape
    h, w = height // n, width // n
    return image.reshape(B, n, h, n, w, C).transpose(2, 3).reshape(B, n * n, h * w, C)


def _image(regions: Tensor, shape: torch.Size, n: int) -> Tensor:
    """What `_regions` cut from an image of this shape, put together again."""
    B, height, width, C = shape
    return regions.reshape(B, n, n, height // n, width // n, C).transpose(2, 3).reshape(shape)
