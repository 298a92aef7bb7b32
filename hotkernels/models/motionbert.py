"""HoT on MotionBERT (Zhu et al., ICCV 2023; Li et al., CVPR 2024), tokens [B, F, J, C] from first block to last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check_int
from ..nn import Attention
from ..nn.linear import is_strided
from ..nn.plain import is_plain
from ..ops.gather_tokens import gather_tokens
from .layers import Hourglass, Mlp, layer_norm, remaining, transformer_block
from .strategies import Select

_ALONG = {"s": -2, "t": -3}


class Block(nn.Module):
    """Two pre-norm transformer blocks in turn: over the joints then over the frames ("st"), or the reverse ("ts")."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, order: str, drop: float, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.order, self.drop_path = order, drop_path
        self.norm1_s, self.norm1_t = layer_norm(dim), layer_norm(dim)
        self.attn_s, self.attn_t = (
            Attention(dim, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=drop) for _ in _ALONG
        )
        self.norm2_s, self.norm2_t = layer_norm(dim), layer_norm(dim)
        self.mlp_s, self.mlp_t = Mlp(dim, hidden_dim, drop), Mlp(dim, hidden_dim, drop)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, J, C] -> [B, F, J, C]."""
        drop_path = self.drop_path if self.training else 0.0
        for which in self.order:
            norm1, attn, norm2, mlp = (getattr(self, f"{name}_{which}") for name in ("norm1", "attn", "norm2", "mlp"))
            # MotionBERT's rows are frames throughout: these are what stochastic depth drops.
            x = transformer_block(x, norm1, attn, norm2, mlp, _ALONG[which], -2, drop_path)
        return x


class HoTMotionBERT(Hourglass):
    """MotionBERT's DSTformer with HoT's hourglass: 2D poses with a confidence to 3D poses.

    Same parameters and state_dict keys as the published `hot_motionbert`, so that its checkpoints load with
    strict=True, and the same outputs, given the same chosen frames.

    Args:
        frames, token_num, layer_index, channels, depth, n_joints, num_heads, mlp_ratio, in_channels, center, select,
            recover, drop, attn_drop, drop_path: as `HoTMixSTE`; layer_index may be 0.
        representation: channels before the head.

    Example::

        >>> import torch
        >>> from hotkernels.models import HoTMotionBERT
        >>> model = HoTMotionBERT(frames=27, token_num=9, channels=64, depth=2, representation=64).eval()
        >>> model(torch.randn(2, 27, 17, 3)).shape
        torch.Size([2, 27, 17, 3])
    """

    def __init__(
        self,
        *,
        frames: int = 243,
        token_num: int | Sequence[int] = 81,
        layer_index: int | Sequence[int] = 1,
        channels: int = 256,
        depth: int = 5,
        n_joints: int = 17,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        representation: int = 512,
        center: bool = False,
        select: str | Select = "cluster",
        recover: str | None = "attention",
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            frames=frames, n_joints=n_joints, in_channels=in_channels, channels=channels, depth=depth, first_layer=0,
            token_num=token_num, layer_index=layer_index, center=center, select=select, recover=recover,
            num_heads=num_heads, mlp_ratio=mlp_ratio, drop=drop, attn_drop=attn_drop, drop_path=drop_path,
        )  # fmt: skip
        check_int("HoTMotionBERT", "representation", representation, 1, None)
        self.joints_embed = nn.Linear(in_channels, channels)
        self.pos_drop = nn.Dropout(drop)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        hidden = int(channels * mlp_ratio)
        self.blocks_st, self.blocks_ts = (
            nn.ModuleList(Block(channels, num_heads, hidden, order, drop, attn_drop, rate) for rate in rates)
            for order in ("st", "ts")
        )
        self.norm = layer_norm(channels)
        self.pre_logits = nn.Sequential(OrderedDict([("fc", nn.Linear(channels, representation)), ("act", nn.Tanh())]))
        self.head = nn.Linear(representation, 3)
        self.temp_embed = nn.Parameter(torch.zeros(1, frames, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, n_joints, channels))
        self.ts_attn = nn.ModuleList(nn.Linear(channels * 2, 2) for _ in range(depth))
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.temp_embed, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        fuse: Any
        for fuse in self.ts_attn:
            nn.init.zeros_(fuse.weight)
            nn.init.constant_(fuse.bias, 0.5)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Lift 2D poses: x [B, F, J, 3], the last a confidence; index and results as `HoTMixSTE.forward`."""
        self.check_input(x, index)
        poses, given, index = x[..., :2], index, None
        x = self.pos_drop(self.joints_embed(x) + (self.pos_embed + self.temp_embed))
        block_ts: Any
        fuse: Any
        for i, (block_st, block_ts, fuse) in enumerate(zip(self.blocks_st, self.blocks_ts, self.ts_attn, strict=True)):
            if i in self.layer_index:
                chosen = self.chooser(i, poses, index, given, block_ts.norm1_t, block_ts.attn_t)(x)
                x, index = gather_tokens(x, chosen, self.position(i)), remaining(index, chosen)
            x = _fuse(block_st(x), block_ts(x), fuse)
        assert index is not None
        return self.finished(self.head(self.pre_logits(self.recovered(self.norm(x)))), index)


def _fuse(x_st: Tensor, x_ts: Tensor, fuse: Any) -> Tensor:
    """Mix two streams by the softmax of two logits: the sigmoid of their difference. Nothing is concatenated.

    Unless the layer is more than its weight and bias: then it is called, as published.
    """
    if not (is_plain(fuse, nn.Linear) and is_strided(fuse.weight)):  # a quantised weight has no rows to take
        share_st, share_ts = fuse(torch.cat([x_st, x_ts], -1)).softmax(-1).split(1, -1)
        return x_st * share_st + x_ts * share_ts
    weight_st, weight_ts = (fuse.weight[0] - fuse.weight[1]).chunk(2)
    share = (x_st @ weight_st + x_ts @ weight_ts + (fuse.bias[0] - fuse.bias[1])).sigmoid()
    return torch.lerp(x_ts, x_st, share[..., None].to(x_ts.dtype))  # under autocast the products are half
