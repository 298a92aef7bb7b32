"""What is particular to invert_index: order, many rows on many threads, an index given back as it came."""

from __future__ import annotations

import pytest
import torch

from hotkernels import invert_index


def test_slots_of_a_token_are_ascending(backend: str) -> None:
    inverted = invert_index(torch.tensor([2, -1, 0, 2, 2, -1, 0]), 4, backend=backend)
    assert inverted.start.tolist() == [0, 2, 2, 5, 5]
    assert inverted.slots[:5].tolist() == [2, 6, 0, 3, 4]


def test_the_index_comes_back(backend: str) -> None:
    index = torch.randint(-1, 9, (2, 3, 5, 4), dtype=torch.int32).transpose(1, 2)
    inverted = invert_index(index, 9, dims=2, backend=backend)
    assert inverted.index.dtype == torch.int64
    assert torch.equal(inverted.index, index.long())
    assert inverted.start.shape == (2, 5, 10)
    assert inverted.slots.shape == (2, 5, 12)


def test_any_number_of_threads(backend: str, threads: None) -> None:
    index = torch.randint(17, (70_001, 5))
    answers = []
    for count in (1, 2):
        torch.set_num_threads(count)
        answers.append(invert_index(index, 17, backend=backend))
    assert torch.equal(answers[0].start, answers[1].start)
    assert torch.equal(answers[0].slots, answers[1].slots)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_raw_operator_checks_for_itself(backend: str) -> None:
    raw = torch.ops.hotkernels.invert_index
    index = torch.zeros(2, 5, dtype=torch.int64)
    for wrong, N in (
        (index.int(), 3),
        (index.T, 3),
        (index[0, 0], 3),
        (index, -1),
        (index, 0),
        (index + 3, 3),
        (index - 2, 3),
        (index + (1 << 62), 3),
    ):
        with pytest.raises((ValueError, RuntimeError), match=r"invert_index: \w+ must be .+, got .+"):
            raw(wrong, N)
