"""What the pose transformers share: MLP, residual with stochastic depth, and the hourglass around the blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import check_ascending, check_bool, check_float, check_int, check_probability, check_tensor, fail
from ..nn import Attention, CrossAttention
from ..nn.attention import check_dim
from ..nn.hourglass import recover_tokens
from ..nn.linear import add_linear, linear, unrecorded
from ..nn.plain import is_idle, is_plain
from ..ops.gather_tokens import gather_tokens
from .strategies import SELECT, Scene, Select, interpolate

_TILE = 1024  # tokens per thread: the fastest of 256 to 2048 for MLPs 512 -> 1024 -> 512 on a core with 2 MB of L2


class Mlp(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def hidden(self, x: Tensor) -> Tensor:
        """[..., C] -> what goes into fc2."""
        return self.drop(linear(self.fc1, x, gelu=True))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.drop(linear(self.fc2, self.hidden(x)))


def is_plain_mlp(mlp: nn.Module) -> TypeGuard[Mlp]:
    """Whether this is an Mlp that nobody has replaced or hooked."""
    return is_plain(mlp, Mlp)


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm with the published epsilon."""
    return nn.LayerNorm(dim, eps=1e-6)


def stochastic_depth(x: Tensor, along: int, drop_path: float) -> Tensor | None:
    """What to multiply a branch of x [B, F, J, C] by, so that whole sequences along dim `along` are dropped at once.

    The random numbers are those of timm's DropPath on sequences as rows. None: nothing is dropped.
    """
    if drop_path == 0:
        return None
    rows = list(x.shape)
    rows[along] = rows[-1] = 1
    return x.new_empty(rows).bernoulli_(1 - drop_path).div_(1 - drop_path)


def add_branch(residual: Tensor, branch: Tensor, factor: Tensor | None, out: Tensor | None) -> Tensor:
    """residual + branch, the branch times `factor` if there is any; without autograd into `out` if given."""
    if factor is None:
        return torch.add(residual, branch, out=out)
    return torch.addcmul(residual, branch, factor, out=out)


def add_layer(
    residual: Tensor, layer: nn.Module, x: Tensor, drop: nn.Module, factor: Tensor | None, out: Tensor | None
) -> Tensor:
    """`add_branch` of drop(layer(x)), in one step where possible."""
    if factor is None and is_idle(drop):
        return add_linear(residual, layer, x, out)
    return add_branch(residual, drop(linear(layer, x)), factor, out)


def after_attention(
    x: Tensor, attended: Tensor, attention: Attention, norm2: nn.Module, mlp: nn.Module,
    factors: Sequence[Tensor | None], out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The rest of a pre-norm block, token by token: from x and the input of proj, both [B, F, J, C], to the output."""
    x = add_layer(x, attention.proj, attended, attention.proj_drop, factors[0], out)
    if is_plain_mlp(mlp):
        return add_layer(x, mlp.fc2, mlp.hidden(norm2(x)), mlp.drop, factors[1], out)
    return add_branch(x, mlp(norm2(x)), factors[1], out)


def is_token_wise(mlp: nn.Module, *layers: Any) -> TypeGuard[Mlp]:
    """Whether these work token by token and nobody watches their calls, so that they may run on pieces, or twice."""
    return is_plain_mlp(mlp) and all(is_plain(each, nn.LayerNorm, nn.Linear) for each in (*layers, mlp.fc1, mlp.fc2))


def transformer_block(
    x: Tensor, norm1: nn.Module, attention: Attention, norm2: nn.Module, mlp: nn.Module,
    along: int, rows: int, drop_path: float,
) -> Tensor:  # fmt: skip
    """A pre-norm block on x [B, F, J, C], attending along -2, the joints, or -3, the frames.

    On a CPU, without autograd and stochastic depth, all but the attention between frames runs on a few frames at a
    time, so that what lies between the layers stays in the cache (saves 10 % of a block's time at 512 channels); not
    where a layer was replaced or has hooks.

    Args:
        x: tokens.
        norm1, attention, norm2, mlp: the parts.
        along: the dim of attention.
        rows: the dim along which stochastic depth drops all at once.
        drop_path: its probability; 0 in evaluation.
    """
    factors = [stochastic_depth(x, rows, drop_path) for _ in range(2)]
    rest = functools.partial(after_attention, attention=attention, norm2=norm2, mlp=mlp, factors=factors)
    whole = not is_token_wise(mlp, norm1, norm2, attention.qkv, attention.proj)
    if whole or not unrecorded(x) or any(factor is not None for factor in factors):
        return rest(x, attention.attend(norm1(x), along))
    x = x.contiguous()
    out = torch.empty_like(x)
    if along == -2:
        for tile, into in zip(_tiles(x), _tiles(out), strict=True):
            rest(tile, attention.attend(norm1(tile)), out=into)
    else:
        attended = attention.attend(norm1(x), along)
        for tile, taken, into in zip(_tiles(x), _tiles(attended), _tiles(out), strict=True):
            rest(tile, taken, out=into)
    return out


def pruned_block(
    x: Tensor, norm1: nn.Module, attention: Attention, norm2: nn.Module, mlp: nn.Module,
    drop_path: float, choose: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A block between frames of which only some go on: the same output and gradients, with less to store and compute.

    What follows the attention works token by token, so the frames that are left out need no gradients there. It runs
    twice: on all frames without gradients, to choose, then on the chosen frames.

    Args:
        x, norm1, attention, norm2, mlp, drop_path: as `transformer_block`.
        choose: from the output of all frames to the positions [B, M] of those that go on.

    Returns:
        The output [B, M, J, C] at the chosen frames, and their positions.
    """
    factors = [stochastic_depth(x, -3, drop_path) for _ in range(2)]
    rest = functools.partial(after_attention, attention=attention, norm2=norm2, mlp=mlp, factors=factors)
    attended = attention.attend(norm1(x), -3)
    if not (is_token_wise(mlp, norm2, attention.proj) and is_idle(attention.proj_drop) and is_idle(mlp.drop)):
        # two runs might differ
        out = rest(x, attended)
        index = choose(out)
        return gather_tokens(out, index), index
    with torch.no_grad():
        index = choose(rest(x, attended))
    return rest(gather_tokens(x, index), gather_tokens(attended, index)), index


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    """[B, F, J, C] in pieces of [1, some frames, J, C]."""
    B, F, J, C = x.shape
    return x.view(1, B * F, J, C).split(max(1, _TILE * torch.get_num_threads() // J), 1)


class Hourglass(nn.Module):
    """What HoT puts around the blocks of a pose transformer: pruning before some of them, recovery after the last.

    Owns pos_embed_token, x_token and cross_attention, as published. See `HoTMixSTE` for the arguments.
    """

    def __init__(
        self,
        *,
        frames: int,
        n_joints: int,
        in_channels: int,
        channels: int,
        depth: int,
        first_layer: int,
        token_num: int | Sequence[int],
        layer_index: int | Sequence[int],
        center: bool,
        select: str | Select,
        recover: str | None,
        num_heads: int,
        mlp_ratio: float,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        for arg, size in {"frames": frames, "n_joints": n_joints, "in_channels": in_channels}.items():
            check_int(op, arg, size, 1, None)
        check_dim(op, channels, num_heads, "channels")
        check_float(op, "mlp_ratio", mlp_ratio)
        if channels * mlp_ratio < 1:
            fail(op, "mlp_ratio", f"at least 1 / channels = {1 / channels:.4g}", mlp_ratio)
        for arg, p in {"drop": drop, "attn_drop": attn_drop, "drop_path": drop_path}.items():
            check_probability(op, arg, p)
        check_bool(op, "center", center)
        self.frames, self.n_joints, self.in_channels = frames, n_joints, in_channels
        self.center, self.recover = center, recover
        self.token_num, self.layer_index = _several(token_num), _several(layer_index)
        steps = len(self.token_num)
        if steps != len(self.layer_index) or not steps:
            fail(op, "layer_index", "one layer for each of token_num", f"{self.layer_index} for {self.token_num}")
        check_int(op, "depth", depth, first_layer + steps, None)
        tokens, layer = frames, first_layer - 1
        for step, (i, M) in enumerate(zip(self.layer_index, self.token_num, strict=True)):
            check_int(op, "token_num", M, 1, tokens, "tokens before = " if step else "frames = ")
            check_int(op, "layer_index", i, layer + 1, depth - steps + step, "depth - 1 = " if steps == 1 else "")
            tokens, layer = M, i
        if recover not in ("attention", "interpolation", None):
            fail(op, "recover", "'attention', 'interpolation' or None", repr(recover))
        if not callable(select) and (not isinstance(select, str) or select not in SELECT):
            fail(op, "select", "a function, " + " or ".join(map(repr, SELECT)), repr(select))
        self.selects_by_name = isinstance(select, str)
        self.select = SELECT[select] if isinstance(select, str) else select

        if recover == "attention":
            embeddings = [nn.Parameter(torch.zeros(1, M, channels)) for M in self.token_num]
            self.pos_embed_token = embeddings[0] if len(embeddings) == 1 else nn.ParameterList(embeddings)
            self.x_token = nn.Parameter(torch.zeros(1, frames, channels))
            self.cross_attention = CrossAttention(
                channels, num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=drop
            )

    def check_input(self, x: Tensor, index: Tensor | None) -> None:
        """Check what forward is given."""
        op = type(self).__name__
        check_tensor(op, "x", x, "[B, F, J, C]", None, shape=(None, self.frames, self.n_joints, self.in_channels))
        if index is not None:
            if len(self.token_num) > 1:
                fail(op, "index", "None where frames are pruned in several steps", type(index).__name__)
            self._check_chosen("index", index, x, self.token_num[0])

    def _check_chosen(self, arg: str, index: Tensor, x: Tensor, token_num: int) -> None:
        """Check positions of frames of x [B, F, J, C] that the caller's code chose."""
        op = type(self).__name__
        check_tensor(op, arg, index, "[B, M]", (torch.int64,), shape=(x.shape[0], token_num), device=x.device)
        check_ascending(op, arg, index, x.shape[1])

    def chooser(
        self, layer: int, poses: Tensor, index: Tensor | None, given: Tensor | None,
        norm: nn.Module, attention: Attention,
    ) -> Callable[[Tensor], Tensor]:  # fmt: skip
        """How to choose among the tokens [B, F, J, C] before `layer`, one before which frames are pruned.

        Args:
            layer: number of the block that comes next.
            poses: the model's input.
            index: the frames that are left, None = all.
            given: the frames to keep, None = choose.
            norm, attention: the temporal attention that comes next, and the norm before it.

        Returns:
            From the tokens to the positions [B, M] of those to keep.
        """

        def choose(x: Tensor) -> Tensor:
            if given is not None:
                return given
            keep = None
            if self.center:
                middle = torch.full((1, 1), (self.frames - 1) // 2, device=x.device)
                keep = middle if index is None else (index == middle).int().argmax(1, keepdim=True)
            here = poses if index is None else gather_tokens(poses, index)
            token_num = self.token_num[self.layer_index.index(layer)]
            chosen = self.select(x, token_num, Scene(here, keep, norm, attention))
            if not self.selects_by_name:
                self._check_chosen("what select returns", chosen, x, token_num)
            return chosen

        return choose

    def position(self, layer: int) -> Tensor | None:
        """The embedding [1, M, C] of the frames that are kept before `layer`, where attention recovers the others."""
        if self.recover != "attention":
            return None
        pos: Any = self.pos_embed_token
        return pos[self.layer_index.index(layer)] if len(self.token_num) > 1 else pos

    def recovered(self, x: Tensor) -> Tensor:
        """The tokens of all frames, where attention recovers them; else those that are left."""
        return recover_tokens(x, self.x_token, self.cross_attention) if self.recover == "attention" else x

    def finished(self, poses: Tensor, index: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The poses of all frames, interpolated if need be; or those that are left, with their frames."""
        if self.recover is None:
            return poses, index
        return interpolate(poses, index, self.frames) if self.recover == "interpolation" else poses


def remaining(index: Tensor | None, chosen: Tensor) -> Tensor:
    """The frames that are left: the chosen of those before, None = all."""
    return chosen if index is None else index.gather(1, chosen)


def _several(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)
