"""What is particular to invert_index: order, many rows on many threads, an index given back as it came."""

from __future__ import annotations

import pytest
import torch
from conftest import EMULATED

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


@pytest.mark.parametrize("N", [0, 1, 255, 256, 600, 70_000])
@pytest.mark.parametrize("L", [1, 31, 33, 500, 8192, 8193, 10_000])
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


def test_any_number_of_threads(backend: str, threads: None) -> None:
    index = torch.randint(17, (2_001 if EMULATED else 70_001, 5))  # emulated blocks take 0.2 ms each
    answers = []
    for count in (1, 2):
        torch.set_num_threads(count)
        answers.append(invert_index(index, 17, backend=backend))
    assert torch.equal(answers[0].start, answers[1].start)
    assert torch.equal(answers[0].slots, answers[1].slots)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("L", [500, 9000])
def test_on_a_gpu_what_is_out_of_range_refers_to_nothing(backend: str, L: int) -> None:
    index = torch.randint(-1, 300, (2, L))
    wild = torch.tensor([300, 301, 1 << 31, (1 << 62) + 5, -2, -(1 << 63)])[torch.randint(6, (2, L))]
    start, slots = torch.ops.hotkernels.invert_index(torch.where(index < 0, wild, index), 300)
    expected = invert_index(index, 300, backend=backend)
    assert torch.equal(start, expected.start)
    for ours, other, count in zip(slots, expected.slots, start[:, -1].tolist(), strict=True):
        assert torch.equal(ours[:count], other[:count])


def test_rows_of_several_dims(backend: str) -> None:
    index = torch.randint(-1, 7, (2, 3, 4, 5))
    for dims in (1, 2, 3):
        ours = invert_index(index, 7, dims=dims, backend=backend)
        flat = invert_index(index.flatten(-dims) if dims > 1 else index, 7, backend=backend)
        assert torch.equal(ours.start, flat.start)
        assert ours.slots.shape == flat.slots.shape
        assert torch.equal(ours.index, index)


def test_a_gpu_without_our_library() -> None:
    """PyTorch serves it there, also where Triton's attention inverts an index in its backward,
    and never waits for a value: tensors on "meta" have none."""
    if backends.LIBRARIES["_C_cpu"] is None:
        assert torch._C._dispatch_has_kernel_for_dispatch_key("hotkernels::invert_index", "CUDA")
    index = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    inverted = invert_index(index, 3)
    assert inverted.start.shape == (2, 4)
    assert inverted.start.is_contiguous()


@pytest.mark.parametrize("backend", ["cpp", "cuda"], indirect=True)
def test_raw_operator_checks_for_itself(backend: str) -> None:
    raw = torch.ops.hotkernels.invert_index
    index = torch.zeros(2, 5, dtype=torch.int64)
    calls = [("index", index.int(), 3), ("index", index.T, 3), ("index", index[0, 0], 3), ("num_tokens", index, -1)]
    if backend == "cpp":  # a GPU would have to be waited for
        calls += [("index", index, 0), *[("index", index + n, 3) for n in (3, -2, 1 << 62)]]
    else:
        calls += [("num_tokens", index, 1 << 30)]
    for arg, wrong, N in calls:
        with pytest.raises((ValueError, RuntimeError), match=rf"invert_index: {arg} must be .+, got .+"):
            raw(wrong, N)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch tells from 2.13 on")
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_too_little_memory_is_told(backend: str) -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        invert_index(torch.zeros(1, 2, dtype=torch.int64), 1 << 46, backend=backend)
