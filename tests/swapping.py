"""The models that `swap` is tested on, what they answer, and which of their modules are swapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import published
import pytest
import torch
from published import ViT, hot_mixste, hot_motionbert
from published_tcformer import TCFormer
from torch import Tensor, nn

import hotkernels
from hotkernels.baselines import AttentionEager

# Five neighbours where published models take two: then no densities tie, which rounding would order differently.
MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "HoT-MixSTE": (lambda: hot_mixste(k=5), (2, 27, 5, 2)),
    "TPC-MixSTE": (lambda: hot_mixste(center=True, recover=None, k=5), (2, 27, 5, 2)),
    "HoT-MotionBERT": (lambda: hot_motionbert(k=5), (2, 27, 5, 3)),
    "HoT-MotionAGFormer": (lambda: published.MotionAGFormer(k=5), (2, 27, 5, 3)),
    "TPC-MHFormer": (lambda: published.MHFormer(k=5), (2, 27, 4, 2)),
    "TCFormer": (TCFormer, (2, 3, 32, 32)),
    "ViT": (ViT, (2, 3, 16, 16)),
    "BiFormer": (published.BiFormer, (2, 3, 48, 48)),
}
each_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    return make(), torch.randn(shape)


def answer(model: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The model's output from a seed, and the random state that it leaves."""
    torch.manual_seed(seed)
    return first(model(x)), torch.get_rng_state()


def first(out: Any) -> Tensor:
    """The output, or the first of several."""
    return out[0] if isinstance(out, tuple) else out


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out, _ = answer(model, x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    grads = torch.autograd.grad((out * weight).sum(), list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    return {"": out.detach(), **{n: g for n, g in zip(names, grads, strict=True) if g is not None}}


def swapped_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__.startswith("Fused")}


def assert_left(odd: nn.Module, reason: str) -> None:
    """Beside a module that is replaced, and alone, which is an error."""
    cls = type(odd)
    report = hotkernels.swap(nn.ModuleDict({"odd": odd, "plain": AttentionEager(32)}))
    assert report.left == [("odd", reason)]
    assert report.replaced == [("plain", "attention")]
    assert type(odd) is cls
    with pytest.raises(ValueError, match=r"swap: model must be one with a module that swap knows, got .+") as error:
        hotkernels.swap(odd)
    assert reason in str(error.value)
