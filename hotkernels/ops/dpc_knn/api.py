"""Density-peak token clustering (DPC-kNN): M of N tokens stand for all, and every token is assigned to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import Kernel, call, choose, register
from ...dtypes import FLOATING, FUSED, INTEGER, accumulator
from ...errors import INTS, check_bool, check_index, check_int, check_seed, check_tensor, fail
from ...operators import fake
from .reference import dpc_knn_reference

_OP = "dpc_knn"
_K = 5
register(
    _OP,
    torch=Kernel(FLOATING),
    cpp=Kernel(FUSED, device="cpu", library="_C_cpu"),
    cuda=Kernel(FUSED, device="cuda", library="_C_cuda"),
)


class DensityPeaks(NamedTuple):
    """What `dpc_knn` returns."""

    index: Tensor  # type: ignore[assignment]  # tuple.index, which nobody calls on this
    """[B, M] int64: the kept tokens."""
    assignment: Tensor | Any  # None rarely enough that no caller need prove otherwise
    """[B, N] int64: the place in `index` of each token's cluster; None if it was not asked for."""
    density: Tensor
    """[B, N] float32."""
    delta: Tensor
    """[B, N] float32: distance to the nearest denser token."""
    score: Tensor
    """[B, N] float32: density * delta."""


def dpc_knn(
    x: Tensor,
    num_clusters: int,
    k: int = _K,
    *,
    mask: Tensor | None = None,
    keep: int | Sequence[int] | Tensor | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    assign: bool = True,
    ordered: bool = False,
    backend: str | None = None,
) -> DensityPeaks:
    r"""Choose `num_clusters` of the N tokens of each sample by density peaks, and assign every token to one of them.

    Equivalent to, up to ties::

        d = torch.cdist(x, x) / C**0.5
        density = (-(d.topk(k, largest=False).values ** 2).mean(-1)).exp()
        delta = d.masked_fill(density[:, None, :] <= density[:, :, None], torch.inf).amin(-1)  # densest: d.amax()
        index = (density * delta).topk(num_clusters).indices

    Step by step:

    1. :math:`d_{ij} = \lVert x_i - x_j \rVert_2 / \sqrt C`, exactly symmetric and exactly 0 on the diagonal.
    2. :math:`r_i` = mean of the k smallest :math:`d_{ij}^2`, i itself included; density :math:`= e^{-r_i}` (+ noise).
    3. j is denser than i by a strict total order: larger density (if there is noise), smaller r, smaller 32-bit hash of
       (seed, position), smaller position. With k = 2, mutual nearest neighbours always tie; the hash decides.
    4. :math:`\delta_i` = distance to the nearest denser token; for the densest, the largest distance of all.
    5. score = density * delta; the M best by log density + log delta, ties to the lower position.
    6. A token belongs to its nearest kept token (ties to the smaller place in `index`), a kept one to itself.

    Args:
        x: [B, N, C] float32, float16 or bfloat16 (float64 on the torch backend), any strides. A token with NaN or inf,
            or with a norm over 1e14, behaves as masked.
        num_clusters: M, tokens to keep, in [1, N].
        k: neighbours per density, the token itself included, in [1, N]; 5 unless given. If fewer are valid, those.
        mask: [B, N] bool, True = valid. Others are nobody's neighbour, never chosen, and assigned to -1.
        keep: positions (int, [K], or [B or 1, K]) that are always kept and take K of the M places, after the best
            ones. A position that is -1, masked or there twice takes a place and gives -1.
        noise: [B, N] floating, added to the density as float32 (float64 for float64 x); the published models pass
            ``torch.rand(B, N) * 1e-6``. A token whose noise is NaN behaves as masked.
        seed: of the hash that orders equal densities, any int64.
        assign: whether to compute `assignment`.
        ordered: return `index` in ascending position instead of best first.
        backend: "torch", "cpp", "cuda", or None for the fastest that can serve the call.

    Returns:
        DensityPeaks(index [B, M] int64, assignment [B, N] int64 or None, density, delta, score [B, N] float32). With
        fewer than M valid tokens the last places of index are -1. density, delta and score of invalid tokens are 0.
        Nothing here carries a gradient.

    Raises:
        ValueError, TypeError: ``dpc_knn: <arg> must be <expected>, got <actual>``.

    Numerics: float32 (squared distances below 1e-38 lose bits, tokens closer than 1e-22 are equal), but for density +
    noise, which orders and scores in float64: near 1, float32 (and so the published code) tells only nine values of
    ``rand * 1e-6`` apart. Half inputs are upcast. "cpp" and "cuda" first subtract, channel by channel, the median of
    three of the sample's tokens, so that neither a common offset nor an outlier takes bits from the others; where two
    tokens are more than 11 times nearer to each other than to that, "cpp" sums their distance from differences (others
    may be off by 6e-5 of themselves). "cuda" then rounds tokens to 11 bits (as in TF32), and distances, in float32, are
    those of the rounded tokens: its choice can differ from others' where distances differ by less than that. It has
    fewer bits for coordinates below 2^-27 (1e-8) of the sample's largest. The result is the same bits on every run, for
    any number of threads and whatever else is in the batch. "torch" sums distances from differences; on a CPU, where it
    may look at values (not traced, compiled or under vmap), it multiplies in float64 instead, and keeps that promise
    but for a distance on the edge between two floats.

    Cost: half of :math:`N^2 C` multiply-adds; O(N (k + C)) memory beyond the input, of which "cpp" holds the N k per
    thread, N / 192 times at most. N x N distances are held only of few tokens: by "cpp" up to 816 (2.7 MB per thread)
    if k is at most 16, by "cuda" up to 352 on chips without clusters, by "torch" where the batch has 4 million at most,
    and in compiled code up to 2,048 tokens.

    Source: density peaks: Rodriguez & Laio, Science 344 (2014), eq. 1-2; the kNN density: Du, Ding & Jia,
    Knowl.-Based Syst. 99 (2016); in transformers: TCFormer (Zeng et al., CVPR 2022, eq. 1-3) and the Token Pruning
    Cluster of HoT (Li et al., CVPR 2024, arXiv 2311.12028).

    Example::

        >>> import torch, hotkernels
        >>> x = torch.tensor([[[0.0], [0.1], [0.3], [5.0], [5.2], [5.35]]])
        >>> peaks = hotkernels.dpc_knn(x, num_clusters=2, k=2)
        >>> peaks.index, peaks.assignment
        (tensor([[0, 4]]), tensor([[0, 0, 0, 1, 1, 1]]))
    """
    check_tensor(_OP, "x", x, "[B, N, C]", FLOATING, shape=(None, None, None))
    B, N, C = x.shape
    if N < 1 or C < 1:
        fail(_OP, "x", "[B, N, C] with N >= 1 and C >= 1", list(x.shape))
    check_int(_OP, "num_clusters", num_clusters, 1, N, "N = ")
    check_int(_OP, "k", k, 1, N, "N = ", _K)
    check_seed(_OP, seed)
    seed = seed if isinstance(seed, (int, torch.SymInt)) else int(seed)  # NumPy's are of few bits
    check_bool(_OP, "assign", assign)
    check_bool(_OP, "ordered", ordered)
    if mask is not None:
        check_tensor(_OP, "mask", mask, "[B, N]", (torch.bool,), shape=(B, N), device=x.device)
        mask = mask.contiguous()
    if noise is not None:
        check_tensor(_OP, "noise", noise, "[B, N]", FLOATING, shape=(B, N), device=x.device)
        noise = noise.detach().to(accumulator(x.dtype)).contiguous()
    if keep is not None:
        keep = _keep_positions(keep, B, N, num_clusters, x.device)
    x = x.detach()
    backend = choose(_OP, x, backend)
    if keep is not None:
        check_index(_OP, "keep", keep, N, backend)
    if backend == "torch":
        index, assignment, *rest = dpc_knn_reference(x, num_clusters, k, mask, keep, noise, seed, assign, ordered)
        density, delta, score = (t.float() for t in rest)
    else:
        index, assignment, density, delta, score = call(
            torch.ops.hotkernels.dpc_knn_fwd, x, num_clusters, k, mask, keep, noise, seed, assign, ordered
        )
    return DensityPeaks(index, assignment if assign else None, density, delta, score)


def _keep_positions(keep: int | Sequence[int] | Tensor, B: int, N: int, M: int, device: torch.device) -> Tensor:
    """`keep` in any of its forms as int64 [B or 1, K]."""
    if not isinstance(keep, Tensor):
        if not isinstance(keep, (*INTS, Sequence)) or isinstance(keep, (str, bytes, bytearray, memoryview)):
            fail(_OP, "keep", "an int, a sequence of ints or a tensor", type(keep).__name__, TypeError)
        positions = keep if isinstance(keep, Sequence) else [keep]
        for position in positions:
            check_int(_OP, "keep", position, -1, N - 1, "N - 1 = ")
        # Filled on the device: a copy from the host would wait for a GPU, and cannot be captured in a graph.
        columns = [torch.full((1, 1), position, dtype=torch.int64, device=device) for position in positions]
        keep = torch.cat(columns, 1) if columns else torch.empty(1, 0, dtype=torch.int64, device=device)
    check_tensor(_OP, "keep", keep, "[K] or [B, K]", INTEGER, device=device)
    if keep.dim() not in (1, 2) or (keep.dim() == 2 and keep.shape[0] not in (1, B)):
        fail(_OP, "keep", f"an int, [K] or [B, K] with B = {B}", list(keep.shape))
    keep = (keep if keep.dim() == 2 else keep[None]).long().contiguous()
    if keep.shape[1] > M:
        fail(_OP, "keep", f"at most num_clusters = {M} positions", keep.shape[1])
    return keep


@fake("dpc_knn_fwd")
def _dpc_knn_fwd_fake(
    x: Tensor,
    num_clusters: int,
    k: int,
    mask: Tensor | None,
    keep: Tensor | None,
    noise: Tensor | None,
    seed: int,
    assign: bool,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, N, _ = x.shape
    per_token = [x.new_empty(B, N, dtype=torch.float32) for _ in range(3)]
    index = x.new_empty(B, num_clusters, dtype=torch.int64)
    assignment = x.new_empty(B, N if assign else 0, dtype=torch.int64)
    return index, assignment, per_token[0], per_token[1], per_token[2]
