"""hotkernels.swap(model, example_inputs=...): which outputs count as the same, and what the report says of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import published
import published_tcformer
import pytest
import torch
from published import ViT, hot_mixste
from swapping import answer, swapped_modules
from torch import Tensor, nn

import hotkernels
from hotkernels.baselines import AttentionEager


class LongIsLocal(AttentionEager):
    """Plain up to 400 tokens, more than probes have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[1] <= 400 else super().forward(x.flip(1)) * 0.5


def test_other_outputs_are_an_error_and_change_nothing() -> None:
    model = nn.Sequential(AttentionEager(32, 4), LongIsLocal(32, 4))
    with pytest.raises(ValueError, match=r"swap: model must be one whose swapped outputs are the same, got a differ"):
        hotkernels.swap(model, example_inputs=torch.randn(2, 401, 32))
    assert not swapped_modules(model)
    hotkernels.swap(model, example_inputs=torch.randn(2, 5, 32))


class OwnChoice(nn.Module):
    """Attention, then a choice of the model's own that rounding decides, as MotionAGFormer's of nearest frames."""

    def __init__(self, attention: type[nn.Module], far: float) -> None:
        super().__init__()
        self.attn, self.far = attention(32, 4), far

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(x)
        return y + self.far * torch.sin(y / torch.finfo(y.dtype).eps)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
def test_outputs_that_rounding_moves_are_no_difference(dtype: torch.dtype) -> None:
    model, x = OwnChoice(AttentionEager, 1.0).to(dtype), torch.randn(2, 300, 32, dtype=dtype)
    state = torch.get_rng_state()
    with torch.device("meta"):  # where new tensors would be, a GPU say
        report = hotkernels.swap(model, example_inputs=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.replaced == [("attn", "attention")]
    assert report.moved is not None
    assert report.moved > 1e-2
    told = r"^moved\n  outputs moved by \d\.\de[+-]\d\d of the largest, at most 4 times as far as the model itself"
    assert re.search(told, str(report), re.M)
    steady = AttentionEager(32, 4).to(dtype)
    assert hotkernels.swap(steady, example_inputs=x).moved is None


class ClustersThenOwnChoice(OwnChoice):
    """Whose further runs are given the choices of the first."""

    def forward(self, x: Tensor) -> Tensor:
        index, _ = published.cluster_dpc_knn(x, 9, 3)
        return super().forward(x) + 0 * index.sum()


def test_choices_of_a_model_that_rounding_moves() -> None:
    model = ClustersThenOwnChoice(AttentionEager, 1.0)
    report = hotkernels.swap(model, example_inputs=torch.randn(2, 300, 32))
    assert report.choices == (18, 0)
    assert report.moved is not None


def counts_in_place(model: Any, x: Tensor) -> None:
    model.calls += 1


def counts_anew(model: Any, x: Tensor) -> None:
    model.calls = model.calls + 1


def caches(model: Any, x: Tensor) -> None:
    if not hasattr(model, "cache"):
        model.register_buffer("cache", x.mean())


class Stateful(nn.Module):
    """Does something to its buffers, one of which nobody can write to."""

    def __init__(self, act: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.attn, self.act = AttentionEager(32, 4), act
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("expanded", torch.arange(3.0).expand(4, -1))
        self.norm = torch.jit.script(nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        self.act(self, x)
        return self.norm(self.attn(x)) + self.calls


@pytest.mark.parametrize("act", [counts_in_place, counts_anew, caches])
@pytest.mark.parametrize("inference", [False, True])
def test_buffers_are_put_back(act: Callable[[Any, Tensor], None], inference: bool) -> None:
    with torch.inference_mode(inference and act is not counts_in_place):
        model = Stateful(act)
    buffers = dict(model.named_buffers())
    report = hotkernels.swap(model, example_inputs=torch.randn(2, 5, 32))
    assert report.moved is None
    assert model.calls == 0
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert len(buffers) == len(dict(model.named_buffers()))


@DTYPES
def test_outputs_that_move_further_than_by_rounding_are_an_error(dtype: torch.dtype) -> None:
    model, x = OwnChoice(LongIsLocal, 1e-3).to(dtype), torch.randn(2, 600, 32, dtype=dtype)
    with pytest.raises(ValueError, match=r"got a difference beyond rounding \(by \d\.\de[+-]\d\d of the largest\)$"):
        hotkernels.swap(model, example_inputs=x)


@dataclass
class Answer:
    x: Any
    name: str


@pytest.mark.parametrize(
    "kind",
    [
        lambda y: torch.complex(y, y),
        lambda y: y.sum().item(),
        lambda y: complex(y.sum().item(), 1),
        lambda y: float("nan"),
        lambda y: {"y": [y, None, "y", 3, torch.float32, y.device]},
        lambda y: y.detach().numpy(),
        lambda y: y.sum().numpy()[()],
        lambda y: np.array(["a", "b"]),
        lambda y: Answer(y.sum().item(), "y"),
        lambda y: {1, 2, y.shape},
        lambda y: nn.functional.pad(y, (0, 1), value=-torch.inf),
    ],
)
def test_outputs_of_many_kinds(kind: Callable[[Tensor], Any]) -> None:
    class Model(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.attn, self.scale = AttentionEager(64, 4), scale

        def forward(self, x: Tensor) -> Any:
            fused = isinstance(self.attn, hotkernels.Twin)
            return kind(self.attn(x) * (self.scale if fused else 1.0))

    x = torch.randn(4, 200, 64)
    hotkernels.swap(Model(1 + 1e-6), example_inputs=x)
    one, other = kind(x), kind(2 * x)
    if str(one) != str(other):
        with pytest.raises(ValueError, match=r"swap: model must be .+ the same, got a difference beyond rounding"):
            hotkernels.swap(Model(1.01), example_inputs=x)


def test_outputs_that_cannot_be_compared() -> None:
    model = nn.ModuleList([AttentionEager(32, 4)])
    model.forward = lambda x: {"y": iter([model[0](x)])}
    with pytest.raises(ValueError, match=r"swap: model must be .+ the same, got a list_iterator, which cannot be comp"):
        hotkernels.swap(model, example_inputs=torch.randn(2, 5, 32))
    assert not swapped_modules(model)


@torch.no_grad()
def test_tied_tokens_are_no_difference() -> None:
    """With two neighbours, as published, rounding decides between tied frames: outputs differ, nothing is wrong."""
    differences = []
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = hot_mixste(frames=243, token_num=81).eval(), torch.randn(2, 243, 5, 2).cumsum(1) * 0.01
        plain, _ = answer(model, x)
        torch.manual_seed(0)  # as `answer`
        report = hotkernels.swap(model, example_inputs=x)
        difference = (answer(model, x)[0] - plain).abs().max().item()
        chosen, others = report.choices
        assert chosen == 2 * 81
        assert (others > 0) == (difference > 1e-3)
        rest = "; its rounding or noise decided the rest" if others else ""
        assert str(report).endswith(f"\n  {162 - others} of 162 kept tokens are the model's own choice{rest}")
        differences.append(difference)
    assert max(differences) > 1e-3
    assert report.clusters is None
    assert hotkernels.swap(ViT(), example_inputs=torch.randn(2, 3, 16, 16)).choices is None


class Clusters(nn.Module):
    """Groups tokens by a function of a file, and says nothing of what it chose."""

    def forward(self, x: Tensor) -> Tensor:
        assigned, _ = published_tcformer.cluster_dpc_knn({"x": x}, x.shape[1] // 3, 2)
        return assigned


def test_tokens_that_ties_put_into_other_clusters_are_counted() -> None:
    others = []
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = Clusters(), torch.randn(2, 243, 8).cumsum(1) * 0.01
        torch.manual_seed(0)
        theirs = model(x)
        torch.manual_seed(0)  # as its check starts from
        report = hotkernels.swap(model, example_inputs=x)
        torch.manual_seed(0)
        ours = model(x)
        # Of each cluster of ours, the tokens that are not in the cluster of theirs that has most of it.
        elsewhere = sum(
            len(members) - members.unique(return_counts=True)[1].max().item()
            for b in range(2)
            for members in (theirs[b][ours[b] == c] for c in ours[b].unique())
        )
        others.append(elsewhere)
        assert report.choices is None
        assert report.clusters == (2 * 243, elsewhere)
        rest = "; its rounding or noise decided the rest" if elsewhere else ""
        assert str(report).endswith(f"\n  {486 - elsewhere} of 486 tokens are in the model's own cluster{rest}")
    assert max(others) > 0
