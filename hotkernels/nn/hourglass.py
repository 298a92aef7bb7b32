"""The two ends of the hourglass of HoT (Li et al., CVPR 2024): prune to representative frames, recover all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import FLOATING, INTEGER
from ..errors import check_bool, check_int, check_seed, check_tensor, fail
from ..ops.dpc_knn import dpc_knn
from ..ops.gather_tokens import gather_tokens
from .attention import CrossAttention, check_options
from .linear import linear


class TokenPruning(nn.Module):
    """Token Pruning Cluster: keep the `token_num` frames that stand for all, and add a position embedding to them.

    Frames are clustered by the mean of their joints' tokens, and kept in temporal order.

    Args:
        dim: channels C.
        token_num: M, frames to keep.
        k: neighbours per density; HoT uses 2.
        center: always keep the centre frame (F - 1) // 2, as MHFormer and the TPC models do.
        seed: orders equal densities, see `hotkernels.dpc_knn`; the published code draws random numbers for that.
        device, dtype: of the position embedding, as every PyTorch module takes them.

    Raises:
        ValueError, TypeError: ``TokenPruning: <arg> must be <expected>, got <actual>``.

    Example::

        >>> import torch
        >>> from hotkernels.nn import TokenPruning
        >>> kept, index = TokenPruning(64, token_num=81)(torch.randn(2, 243, 17, 64))
        >>> kept.shape, index.shape
        (torch.Size([2, 81, 17, 64]), torch.Size([2, 81]))
    """

    def __init__(
        self,
        dim: int,
        token_num: int,
        k: int = 2,
        center: bool = False,
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("TokenPruning", "dim", dim, 1, None)
        check_int("TokenPruning", "token_num", token_num, 1, None)
        check_int("TokenPruning", "k", k, 1, None)
        check_bool("TokenPruning", "center", center)
        check_seed("TokenPruning", seed)
        self.token_num = token_num
        self.k = k
        self.center = center
        self.seed = seed
        self.pos_embed_token = nn.Parameter(torch.zeros(1, token_num, dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Prune.

        Args:
            x: [B, F, J, C], F at least token_num and k.
            index: [B, M], to reuse a choice (HoT's flipped second pass); None = choose.

        Returns:
            (pruned [B, M, J, C], index [B, M]): ascending if chosen here, as given if not.
        """
        pos, M = self.pos_embed_token, self.token_num
        check_tensor("TokenPruning", "x", x, "[B, F, J, C]", FLOATING, shape=(None, None, None, pos.shape[-1]))
        if index is None:
            if x.shape[1] < M or x.shape[1] < self.k:
                fail(
                    "TokenPruning", "x", f"[B, F, J, C] with F >= token_num = {M} and F >= k = {self.k}", list(x.shape)
                )
            # A tensor, so that an export for any number of frames need not prove its value in range.
            keep = torch.full((1,), (x.shape[1] - 1) // 2, device=x.device) if self.center else None
            index = cluster_frames(x, M, self.k, keep=keep, seed=self.seed)
        elif not isinstance(index, Tensor) or index.is_nested or index.shape[-1:] != (M,):
            check_tensor("TokenPruning", "index", index, "[B, M]", INTEGER, shape=(x.shape[0], M))
        return gather_tokens(x, index, pos), index


def cluster_frames(x: Tensor, token_num: int, k: int = 2, keep: Tensor | None = None, **more: Any) -> Tensor:
    """The frames of x [B, F, J, C] that stand for all, by the mean of their joints' tokens: [B, M] int64, ascending.

    If there are too few valid frames, frames with NaN fill the remaining places, in order, so that NaN input gives NaN
    output; `keep` stays even so.
    """
    index = dpc_knn(x.detach().mean(2), token_num, k, keep=keep, **more, assign=False, ordered=True).index
    places = x.shape[1] + 1  # a spare one, to which -1 points: it is never selected
    left = torch.ones(x.shape[0], places, dtype=torch.uint8, device=x.device).scatter(1, index % places, 0)
    left[:, -1] = 1
    if keep is not None:
        left = left.scatter(1, keep.expand(x.shape[0], -1), 0)
    return left.argsort(dim=1, stable=True)[:, :token_num].sort(1).values


class TokenRecovery(nn.Module):
    """Token Recovering Attention: learned tokens, one per frame, attend to the kept frames of each joint.

    Equivalent to ``x_token + cross_attention(x_token, x, x)`` for every joint, on [B, M, J, C] as it is: no rearrange
    copy, and x_token projected once. The parts of `cross_attention` are called, not the module: hooks belong on them.

    Args:
        dim: channels C.
        length: L, frames to recover.
        num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, device, dtype: as `CrossAttention`.

    Raises:
        ValueError, TypeError: ``TokenRecovery: <arg> must be <expected>, got <actual>``.

    Example::

        >>> import torch
        >>> from hotkernels.nn import TokenRecovery
        >>> TokenRecovery(64, length=243)(torch.randn(2, 81, 17, 64)).shape
        torch.Size([2, 243, 17, 64])
    """

    def __init__(
        self,
        dim: int,
        length: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options("TokenRecovery", dim, num_heads, qk_scale, attn_drop, proj_drop)
        check_int("TokenRecovery", "length", length, 1, None)
        factory: Any = {"device": device, "dtype": dtype}
        options = (num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, length)
        self.x_token = nn.Parameter(torch.zeros(1, length, dim, **factory))
        self.cross_attention = CrossAttention(dim, *options, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Recover x [B, M, J, C] to [B, L, J, C]."""
        C = self.x_token.shape[-1]
        check_tensor("TokenRecovery", "x", x, "[B, M, J, C]", None, shape=(None, None, None, C))
        return recover_tokens(x, self.x_token, self.cross_attention)


def recover_tokens(x: Tensor, x_token: Tensor, attention: CrossAttention) -> Tensor:
    """What `TokenRecovery` does to x [B, M, J, C], for a model that owns x_token [1, L, C] and the attention itself."""
    attended = attention.attend(x_token[0], x, x)  # [B, L, J, C]
    # Adding inside the product, by oneDNN or by addmm, was slower.
    return x_token[:, :, None] + attention.proj_drop(linear(attention.proj, attended))
