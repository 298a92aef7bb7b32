"""Multi-head attention modules as vision and pose transformers publish them (timm's ViT, MixSTE, HoT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import FLOATING
from ..errors import check_float, check_int, check_probability, check_tensor, fail
from ..ops.gathered_attention.api import MAX_HEAD_DIM, packed_attention, unpack
from ..ops.recovery_attention import recovery_attention
from .linear import is_strided, linear, multiply, unrecorded
from .plain import DROPS, dropout_p, is_plain

_LARGE = 32 << 20  # bytes; glibc's malloc maps larger blocks anew every time, and touching fresh pages is slow
_PIECE = 1536  # tokens per thread; the fastest of 512 to 4,096 for 512 channels


class Attention(nn.Module):
    """Multi-head self-attention: qkv, softmax(q k^T * scale) v, proj.

    Same constructor, attributes and state_dict keys as timm's ViT and MixSTE. The fused operator reads q, k and v where
    the qkv projection wrote them, and writes what proj reads: no layout copy.

    Args:
        dim: channels C, a multiple of num_heads; C / num_heads up to 256.
        num_heads: H.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: scale of the logits; None, or 0 as published, = (C / H) ** -0.5.
        attn_drop, proj_drop: dropout on the probabilities and on the output, in training, each in [0, 1). With
            attn_drop > 0 training runs on the torch backend, which has dropout; evaluation stays fused.
        device, dtype: of the parameters, as every PyTorch module takes them.

    If `attn_drop` is replaced by anything but a Dropout or an Identity, or has hooks (global ones count), it is called
    on all the probabilities [..., H, N, N], and the attention is not fused.

    Without autograd on a CPU, a qkv projection of more than 32 MiB is computed and used a few samples at a time.

    Raises:
        ValueError, TypeError: ``Attention: <arg> must be <expected>, got <actual>``.

    Example::

        >>> import torch
        >>> from hotkernels.nn import Attention
        >>> x = torch.randn(2, 243, 17, 64)  # B, F, J, C
        >>> Attention(64)(x, along=-3).shape  # frames attend to frames, joint by joint
        torch.Size([2, 243, 17, 64])
    """

    def __init__(
        self,
        dim: int,
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
        check_options("Attention", dim, num_heads, qk_scale, attn_drop, proj_drop)
        factory: Any = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, along: int = -2) -> Tensor:
        """Attend along one dim of x; every other dim but the last is batch.

        Args:
            x: [B, N, C], or [B, F, J, C] with `along` = -2 (joints of a frame) or -3 (frames of a joint).
            along: the dim of the tokens that attend to each other.

        Returns:
            Same shape as x, contiguous.
        """
        return self.proj_drop(linear(self.proj, self.attend(x, along)))

    def attend(self, x: Tensor, along: int = -2) -> Tensor:
        """Everything before `proj`; arguments and the result's shape as `forward`."""
        _check_channels("Attention", self.dim, x=x)
        return self_attention(self, x, along)


class CrossAttention(nn.Module):
    """Multi-head cross-attention with separate projections, as HoT publishes it (`Cross_Attention`).

    A query input that is the same for the whole batch (x_1 expanded, stride 0 over the batch, or of batch 1) is
    projected and packed once. What it was expanded from gets the right gradient; x_1 itself has the sum over the batch
    in its first sample, unless it is a leaf, retains its gradient or has hooks (outside compiled code): then it is
    projected per sample. Where x_2 is x_3, keys and values come from one matrix product.

    Args:
        dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, device, dtype: as `Attention`.
        length: accepted, as published, and unused.

    As in `Attention`, a replaced or hooked `attn_drop` is called on all the probabilities, here [B, (J,) H, L, M].

    Raises:
        ValueError, TypeError: ``CrossAttention: <arg> must be <expected>, got <actual>``.

    Example::

        >>> import torch
        >>> from hotkernels.nn import CrossAttention
        >>> kept = torch.randn(2, 81, 64)
        >>> CrossAttention(64)(torch.randn(243, 64), kept, kept).shape
        torch.Size([2, 243, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        length: int = 27,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options("CrossAttention", dim, num_heads, qk_scale, attn_drop, proj_drop)
        factory: Any = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.linear_q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.linear_k = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.linear_v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        """Let x_1 [B, L, C] attend to keys from x_2 and values from x_3, both [B, M, C]; returns [B, L, C]."""
        return self.proj_drop(linear(self.proj, self.attend(x_1, x_2, x_3)))

    def attend(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        """Everything before `proj`.

        Args:
            x_1: [B, L, C], or [L, C] for the whole batch.
            x_2, x_3: [B, M, C], or [B, M, J, C] where every joint attends by itself; x_1 is then [L, C] or
                [B, L, J, C].

        Returns:
            [B, L, C] or [B, L, J, C].
        """
        _check_channels("CrossAttention", self.dim, x_1=x_1, x_2=x_2, x_3=x_3)
        return cross_attention(self, x_1, x_2, x_3)


def self_attention(module: Any, x: Tensor, along: int = -2) -> Tensor:
    """`Attention.attend` for any module that has its qkv, num_heads, scale and attn_drop."""
    if not isinstance(along, int) or along not in (-2, -3):
        fail("Attention", "along", "-2 or -3", along)
    if not isinstance(x, Tensor) or x.dim() < 3 or (along == -3 and x.dim() != 4):
        layout = "[B, ..., N, C] with along = -2, or [B, F, J, C] with along = -3"
        check_tensor("Attention", "x", x, layout, None)
        fail("Attention", "x", layout, list(x.shape))
    if x.shape[along] < 1:
        fail("Attention", "x", "of at least one token", list(x.shape))
    done = [_attend(module, piece, along) for piece in _pieces(x, module)]
    return done[0] if len(done) == 1 else torch.cat(done)


def cross_attention(module: Any, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
    """`CrossAttention.attend` for any module that has its projections, num_heads, scale and attn_drop."""
    tensors = isinstance(x_1, Tensor) and isinstance(x_2, Tensor) and isinstance(x_3, Tensor)
    if not tensors or x_2.dim() not in (3, 4) or x_3.dim() != x_2.dim():
        check_tensor("CrossAttention", "x_1", x_1, "[B, L, C] or [L, C]", None)
        for arg, x in {"x_2": x_2, "x_3": x_3}.items():
            layout = "[B, M, C] or [B, M, J, C]" + " as x_2" * (arg == "x_3")
            check_tensor("CrossAttention", arg, x, layout, None)
            if x.dim() not in (3, 4) or x.dim() != x_2.dim():
                fail("CrossAttention", arg, layout, list(x.shape))
    if x_3.shape[:-1] != x_2.shape[:-1]:
        expected = f"{[*x_2.shape[:-1], 'C']} as x_2".replace("'", "")
        fail("CrossAttention", "x_3", expected, list(x_3.shape))
    if x_1.dim() == 3:
        if x_1.shape[0] not in (1, x_2.shape[0]):
            fail("CrossAttention", "x_1", f"[B, L, C] with x_2's B = {x_2.shape[0]}", list(x_1.shape))
        expanded = x_1.shape[0] == 1 or (x_1.shape[0] > 0 and x_1.stride(0) == 0 and not _is_watched(x_1))
        # What was put in linear_q's place gets x_1 as it is, unless that has no place for joints.
        if expanded and (x_2.dim() == 4 or is_plain(module.linear_q, nn.Linear)):
            x_1 = x_1[0]
    if x_1.dim() not in (2, x_2.dim()):
        full = "[B, L, C]" if x_2.dim() == 3 else "[B, L, J, C]"
        fail("CrossAttention", "x_1", f"[L, C], or {full} as x_2", list(x_1.shape))
    if x_1.dim() == 4 and (x_1.shape[0], x_1.shape[2]) != (x_2.shape[0], x_2.shape[2]):
        expected = f"[B = {x_2.shape[0]}, L, J = {x_2.shape[2]}, C] as x_2"
        fail("CrossAttention", "x_1", expected, list(x_1.shape))
    for arg, x in {"x_1": x_1, "x_2": x_2}.items():
        if x.shape[0 if x.dim() == 2 else 1] < 1:
            fail("CrossAttention", arg, "of at least one token", list(x.shape))
    # [B, L, (J,) C] -> [B, (J,) H, L, D], a view
    query, key, value = (
        _split_heads(t, module.num_heads) for t in (linear(module.linear_q, x_1), *_keys_and_values(module, x_2, x_3))
    )
    if not is_plain(module.attn_drop, *DROPS):
        return _merge_heads(_unfused(module, query, key, value))
    return _merge_heads(
        recovery_attention(query, key, value, scale=module.scale, dropout_p=dropout_p(module.attn_drop))
    )


def _is_watched(x: Tensor) -> bool:
    """Whether something looks at the gradient of x itself, not only at that of what it was made from."""
    if not x.requires_grad or torch.compiler.is_compiling():
        return False
    return x.is_leaf or bool(x._backward_hooks) or x.retains_grad


def _keys_and_values(module: Any, x_2: Tensor, x_3: Tensor) -> tuple[Tensor, Tensor]:
    # A quantised weight is a Linear's own, and has no torch.cat.
    both = all(is_plain(each, nn.Linear) and is_strided(each.weight) for each in (module.linear_k, module.linear_v))
    if x_2 is not x_3 or not both or (module.linear_k.bias is None) != (module.linear_v.bias is None):
        return linear(module.linear_k, x_2), linear(module.linear_v, x_3)
    weight = torch.cat([module.linear_k.weight, module.linear_v.weight])
    bias = None if module.linear_k.bias is None else torch.cat([module.linear_k.bias, module.linear_v.bias])
    key, value = multiply(x_2, weight, bias).chunk(2, -1)
    return key, value


def _attend(module: Any, x: Tensor, along: int) -> Tensor:
    qkv = linear(module.qkv, x).unflatten(-1, (3, module.num_heads, -1))  # [..., N, 3, H, D], or [B, F, J, 3, H, D]
    if along == -2:
        qkv = qkv.flatten(0, -5)
    drop = module.attn_drop
    plain = is_plain(drop, *DROPS)
    out = packed_attention(qkv, module.scale, dropout_p(drop)) if plain else _unfused(module, *unpack(qkv))
    return _merge_heads(out).reshape(x.shape)


def _unfused(module: Any, *heads: Tensor) -> Tensor:
    """Attention of query, key and value [..., H, N, D] that calls what stands in attn_drop's place."""
    query, key, value = heads
    return module.attn_drop((query @ key.mT * module.scale).softmax(-1)) @ value


def _pieces(x: Tensor, module: Any) -> tuple[Tensor, ...]:
    """x, a few samples at a time if its projection is large, on a CPU without autograd: about 8 % faster."""
    large = unrecorded(x) and 3 * x.numel() * x.element_size() > _LARGE
    if large and is_plain(module.qkv, nn.Linear) and is_plain(module.attn_drop, *DROPS):
        return x.split(max(1, _PIECE * torch.get_num_threads() // x[0, ..., 0].numel()))
    return (x,)


def _check_channels(module: str, dim: int, **inputs: Any) -> None:
    for arg, x in inputs.items():
        if isinstance(x, Tensor) and x.dim() > 0:
            check_tensor(module, arg, x, "[..., C]", FLOATING)
            if x.shape[-1] != dim:
                fail(module, arg, f"[..., C] with C = dim = {dim}", list(x.shape))


def check_dim(module: str, dim: int, num_heads: int, name: str = "dim") -> None:
    """Check that num_heads divides the channels, which the constructor calls `name`, into heads that kernels take."""
    check_int(module, name, dim, 1, None)
    check_int(module, "num_heads", num_heads, 1, None)
    if dim % num_heads != 0:
        fail(module, name, f"a multiple of num_heads = {num_heads}", dim)
    if dim // num_heads > MAX_HEAD_DIM:
        fail(module, "num_heads", f"at least {name} / {MAX_HEAD_DIM} = {-(-dim // MAX_HEAD_DIM)}", num_heads)


def check_options(
    module: str, dim: int, num_heads: int, qk_scale: float | None, attn_drop: float, proj_drop: float
) -> None:
    """Check what constructors of attention have in common."""
    check_dim(module, dim, num_heads)
    if qk_scale is not None:
        check_float(module, "qk_scale", qk_scale)
    check_probability(module, "attn_drop", attn_drop)
    check_probability(module, "proj_drop", proj_drop)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[(B,) N, (J,) C] -> [(B, J,) H, N, D]."""
    heads = x.unflatten(-1, (num_heads, -1))
    return heads.permute(0, 2, 3, 1, 4) if heads.dim() == 5 else heads.transpose(-3, -2)


def _merge_heads(out: Tensor) -> Tensor:
    """[B, (J,) H, N, D] -> [B, N, (J,) C]: a view of what the kernels allocate."""
    out = out.transpose(1, 2) if out.dim() == 4 else out.permute(0, 3, 1, 2, 4)
    return out.flatten(-2)
