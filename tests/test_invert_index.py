"""What is particular to invert_index: order, rows of any length, an index given back as it came."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import only_cpp

from hotkernels import backends, invert_index


def test_slots_of_a_token_are_ascending(backend: str) -> None:
    inverted = invert_index(torch.tensor([2, -1, 0, 2, 2, -1, 0]), 4, backend=backend)
    assert inverted.start.tolist() == [0, 2, 2, 5, 5]
    assert inverted.slots[:5].tolist() == [2, 6, 0, 3, 4]
    if backend.startswith("cpp"):
        assert inverted.slots[5:].tolist() == [-1, -1], "no uninitialised memory"


def test_the_index_comes_back(backend: str) -> None:
    index = torch.randint(-1, 9, (2, 3, 5, 4), dtype=torch.int32).transpose(1, 2)
    inverted = invert_index(index, 9, dims=2, backend=backend)
    assert inverted.index.dtype == torch.int64
    assert torch.equal(inverted.index, index.long())
    assert inverted.start.shape == (2, 5, 10)
    assert inverted.slots.shape == (2, 5, 12)


@pytest.mark.parametrize(
    ("N", "L"),
    [
        *itertools.product([0, 1, 255, 256, 600, 70_000], [1, 31, 33, 500, 8192, 8193, 10_000]),
        (600, 70_000),
        (600, 530_000),
    ],
)
def test_any_sizes(backend: str, L: int, N: int) -> None:
    """A stable sort, for every number of blocks per row, of passes over digits, of rounds that end in the middle."""
    index = torch.randint(-1, N, (2, L))
    index[1, L // 3 :] = index[1, 0].clone()  # one token has nearly all
    inverted = invert_index(index, N, backend=backend)
    for row, start, slots in zip(index, inverted.start, inverted.slots, strict=True):
        there = row >= 0
        assert torch.equal(start, torch.cat([there.new_zeros(1).long(), row[there].bincount(minlength=N).cumsum(0)]))
        absent = int((~there).sum())
        assert torch.equal(slots[: L - absent], row.sort(stable=True).indices[absent:])


def test_rows_of_several_dims(backend: str) -> None:
    index = torch.randint(-1, 7, (2, 3, 4, 5))
    for dims in (1, 2, 3):
        ours = invert_index(index, 7, dims=dims, backend=backend)
        flat = invert_index(index.flatten(-dims) if dims > 1 else index, 7, backend=backend)
        assert torch.equal(ours.start, flat.start)
        assert ours.slots.shape == flat.slots.shape
        assert torch.equal(ours.index, index)


@pytest.mark.skipif(backends.LIBRARIES["_C_cpu"] is not None, reason=str(backends.LIBRARIES["_C_cpu"]))
def test_the_raw_operator_is_there_on_any_gpu() -> None:
    """Where our CUDA library is missing, Triton's attention inverts an index in its backward all the same."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("hotkernels::invert_index", "CUDA")


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch tells from 2.13 on")
@only_cpp
def test_too_little_memory_is_told(backend: str) -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        invert_index(torch.zeros(1, 2, dtype=torch.int64), 1 << 46, backend=backend)
