"""HoT on MixSTE (Zhang et al., CVPR 2022; Li et al., CVPR 2024), tokens [B, F, J, C] from first block to last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Attention
from ..ops.gather_tokens import gather_tokens
from .layers import Hourglass, Mlp, layer_norm, pruned_block, remaining, transformer_block
from .strategies import Select


class Block(nn.Module):
    """A pre-norm transformer block along one dim of [B, F, J, C]: -2, the joints, or -3, the frames."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, along: int, drop: float, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.along, self.drop_path = along, drop_path
        self.norm1 = layer_norm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, hidden_dim, drop)

    def forward(self, x: Tensor, choose: Callable[[Tensor], Tensor] | None = None) -> Any:
        """[B, F, J, C] -> [B, F, J, C]; or, given a way to choose frames, ([B, M, J, C], their positions [B, M])."""
        drop_path = self.drop_path if self.training else 0.0
        parts = (self.norm1, self.attn, self.norm2, self.mlp)
        if choose is not None:
            return pruned_block(x, *parts, drop_path, choose)
        return transformer_block(x, *parts, self.along, self.along, drop_path)


class HoTMixSTE(Hourglass):
    """MixSTE with HoT's hourglass: 2D poses to 3D poses.

    Same parameters and state_dict keys as the published `hot_mixste`, so that its checkpoints load with strict=True,
    and the same outputs, given the same chosen frames. With ``center=True, recover=None`` it is `tpc_mixste` instead.

    Args:
        frames: F, of a sequence.
        token_num: M, frames kept; with several, the numbers kept by steps one after the other (H2OT).
        layer_index: the block before which frames are pruned, counted from 0 and at least 1; as many as token_num.
        channels: C, a multiple of num_heads.
        depth: pairs of one spatial and one temporal block.
        n_joints: J.
        num_heads: H.
        mlp_ratio: hidden channels of the MLPs, in units of C.
        in_channels: coordinates per joint of the input.
        center: always keep the centre frame (F - 1) // 2.
        select: how to choose: "cluster" (density peaks, reproducible), "cluster_random" (density peaks with the
            published noise, from torch's global generator), "uniform", "attention", "motion", or a function: see
            `hotkernels.models.strategies`.
        recover: "attention" (TRA), "interpolation" (of the poses, TRI), or None: only the kept frames are regressed.
        drop, attn_drop, drop_path: dropout, dropout of attention, and stochastic depth of the last block, in training,
            each in [0, 1).

    Blocks call the parts of their attention, not the module: hooks belong on `qkv`, `proj` or the block, and FSDP wraps
    blocks. With gradients and without dropout, what follows the attention in the block before a pruning runs twice:
    without gradients to choose, then with gradients on what is kept.

    Source: HoT, arXiv 2311.12028; H2OT, arXiv 2509.06956.

    Example::

        >>> import torch
        >>> from hotkernels.models import HoTMixSTE
        >>> model = HoTMixSTE(frames=27, token_num=9, channels=64, depth=4).eval()
        >>> model(torch.randn(2, 27, 17, 2)).shape
        torch.Size([2, 27, 17, 3])
    """

    def __init__(
        self,
        *,
        frames: int = 243,
        token_num: int | Sequence[int] = 81,
        layer_index: int | Sequence[int] = 3,
        channels: int = 512,
        depth: int = 8,
        n_joints: int = 17,
        num_heads: int = 8,
        mlp_ratio: float = 2.0,
        in_channels: int = 2,
        center: bool = False,
        select: str | Select = "cluster",
        recover: str | None = "attention",
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__(
            frames=frames, n_joints=n_joints, in_channels=in_channels, channels=channels, depth=depth, first_layer=1,
            token_num=token_num, layer_index=layer_index, center=center, select=select, recover=recover,
            num_heads=num_heads, mlp_ratio=mlp_ratio, drop=drop, attn_drop=attn_drop, drop_path=drop_path,
        )  # fmt: skip
        self.Spatial_patch_to_embedding = nn.Linear(in_channels, channels)
        self.Spatial_pos_embed = nn.Parameter(torch.zeros(1, n_joints, channels))
        self.Temporal_pos_embed = nn.Parameter(torch.zeros(1, frames, channels))
        self.pos_drop = nn.Dropout(drop)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        hidden = int(channels * mlp_ratio)
        self.STEblocks, self.TTEblocks = (
            nn.ModuleList(Block(channels, num_heads, hidden, along, drop, attn_drop, rate) for rate in rates)
            for along in (-2, -3)
        )
        self.Spatial_norm = layer_norm(channels)
        self.Temporal_norm = layer_norm(channels)
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 3))

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Lift 2D poses.

        Args:
            x: [B, F, J, 2].
            index: [B, M] int64 strictly ascending, the frames to keep, as for a flipped second pass; None = choose.
                Only where pruning has one step. Its values are checked as those of an operator's index.

        Returns:
            [B, F, J, 3]; with recover=None, (poses [B, M, J, 3], their frames [B, M]).
        """
        self.check_input(x, index)
        poses, given, index = x, index, None
        x = self.pos_drop(self.Spatial_patch_to_embedding(x) + self.Spatial_pos_embed)
        spatial: Any
        temporal: Any
        for i, (spatial, temporal) in enumerate(zip(self.STEblocks, self.TTEblocks, strict=True)):
            x = self.Spatial_norm(spatial(x))
            if i == 0:
                x = self.pos_drop(x + self.Temporal_pos_embed[:, :, None])
            if i + 1 in self.layer_index:
                x, index = self._pruned(i + 1, x, poses, index, given)
            else:
                x = self.Temporal_norm(temporal(x))
        assert index is not None
        return self.finished(self.head(self.recovered(x)), index)

    def _pruned(
        self, layer: int, x: Tensor, poses: Tensor, index: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The temporal block before `layer`, then pruning: the tokens and the frames that are left."""
        blocks: Any = self.TTEblocks
        norm, before, following = self.Temporal_norm, blocks[layer - 1], blocks[layer]
        choose = self.chooser(layer, poses, index, given, following.norm1, following.attn)
        pos = self.position(layer)
        if torch.is_grad_enabled():
            x, chosen = before(x, lambda x: choose(norm(x)))
            x = norm(x) if pos is None else norm(x) + pos[..., None, :]
        else:
            x = norm(before(x))
            chosen = choose(x)
            x = gather_tokens(x, chosen, pos)
        return x, remaining(index, chosen)
