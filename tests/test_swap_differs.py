"""What hotkernels.swap leaves for what it does: run beside a twin, it computes, keeps or draws something else."""

from __future__ import annotations

import functools
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import published
import published_tcformer
import pytest
import torch
from published import TimmMlp, ToQkvAttention
from published_tcformer import GridAttention, KeyValueAttention, TCAttention
from swapping import assert_left
from torch import Tensor, nn

import hotkernels
from hotkernels.baselines import AttentionEager, BiLevelRoutingAttentionEager, CrossAttentionEager
from hotkernels.models import eager
from hotkernels.nn.linear import _HAS_ONEDNN
from hotkernels.swap import twins

# What looks like plain attention and is not. All of it would pass a look at a fresh module's output or at its layers.


class Written(AttentionEager):
    """Plain attention in steps, each of which others change."""

    def __init__(self, dim: int = 32, num_heads: int = 4) -> None:
        super().__init__(dim, num_heads)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * self.scale

    def weights(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (self.weights(self.logits(q, k)) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(self.attend(x)))


class Rotary(Written):
    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        angle = torch.arange(q.shape[-2])[:, None] * torch.logspace(0, -1, q.shape[-1] // 2)
        turn = torch.polar(torch.ones_like(angle), angle)
        turned = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn for t in (q, k))
        return super().logits(*(torch.view_as_real(t).flatten(-2) for t in turned))


class Residual(AttentionEager):
    """Zero at the start, as a projection that is initialised to zero hides."""

    def __init__(self) -> None:
        super().__init__(32, 4)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.proj(x)


class DropKey(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (torch.rand(x.shape[:2]) > 0.1)[..., None]) if self.training else super().forward(x)


class TrainingScale(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.1 if self.training else 1.0)


class ReturnsWeights(AttentionEager):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class StoresMap(Written):
    """What a model prunes by later: on the module or in a list of its."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.maps = where, []

    def weights(self, logits: Tensor) -> Tensor:
        attn = super().weights(logits)
        if self.where == "list":
            self.maps.append(attn.detach())
        elif self.where == "attribute" or self.training:
            self.attn_map = attn.detach()
        return attn


class Limited(Written):
    """Plain attention where there are few tokens; what else it does says `limit`."""

    def __init__(self, limit: str) -> None:
        super().__init__()
        self.limit = limit

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        logits, N = super().logits(q, k), k.shape[-2]
        if self.limit == "window":
            far = (torch.arange(N) - torch.arange(N)[:, None]).abs() > 128
            return logits.masked_fill(far, -torch.inf)
        if self.limit == "top-k":
            least = logits.topk(min(256, N)).values[..., -1:]
            return logits.masked_fill(logits < least, -torch.inf)
        if self.limit == "chunks":
            chunk = torch.arange(N) // 49
            return logits.masked_fill(chunk != chunk[:, None], -torch.inf)
        if self.limit == "log N":
            return logits * max(1.0, math.log(N, 197))
        if N > 256:
            raise IndexError
        return logits


class ShortFrames(published.FramesAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.shape[1 if self.mode == "temporal" else 2] <= 243 else 0.5)


class ShortSequence(eager.MotionBERTAttention):
    def forward(self, x: Tensor, seqlen: int = 1) -> Tensor:
        return super().forward(x, seqlen) * (1.0 if (seqlen if self.mode == "temporal" else x.shape[1]) <= 243 else 0.5)


class OtherLength(eager.MotionBERTAttention):
    def forward(self, x: Tensor, seqlen: int = 2) -> Tensor:
        return super().forward(x, seqlen)


class ShortCross(CrossAttentionEager):
    def forward(self, x_1: Tensor, x_2: Tensor, x_3: Tensor) -> Tensor:
        return super().forward(x_1, x_2[:, :243], x_3[:, :243])


class ShortGrid(GridAttention):
    def attend(self, x: Tensor, keys: Tensor, score: Tensor | None = None) -> Tensor:
        return super().attend(x, keys[:, :243], score if score is None else score[:, :243])


class ShortTokens(TCAttention):
    def attend(self, x: Tensor, keys: Tensor, score: Tensor | None = None) -> Tensor:
        return super().attend(x, keys[:, :243], score if score is None else score[:, :243])


class ShortContext(KeyValueAttention):
    def attend(self, x: Tensor, keys: Tensor, score: Tensor | None = None) -> Tensor:
        return super().attend(x, keys[:, :243])


class Gated(KeyValueAttention):
    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return super().forward(x, context) * x.sigmoid()


class Cooler(Written):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.temperature = 0.9

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return super().logits(q, k) * self.temperature


class Alibi(Written):
    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        slope = 0.25 * 0.5 ** torch.arange(2, 2 * self.num_heads + 2, 2, dtype=q.dtype)
        place = torch.arange(k.shape[-2])
        return super().logits(q, k) - slope[:, None, None] * (place - place[:, None]).abs()


class WiderInHalf(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.dtype == torch.float32 else 1.5)


class Times(AttentionEager):
    def __init__(self, factor: float | Tensor, name: str = "factor") -> None:
        super().__init__(32, 4)
        self.name = name
        setattr(self, name, factor)

    def forward(self, x: Tensor) -> Tensor:
        factor = getattr(self, self.name)
        return super().forward(x) * (factor[1000] if isinstance(factor, Tensor) else factor)


class NeedsMask(AttentionEager):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * mask


class DetachedMetric(published.ToMeAttention):
    def forward(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, metric = super().forward(x, size)
        return x, metric.detach()


class Window(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (-1, 7))
        return super().forward(windows.flatten(0, 1)).unflatten(0, windows.shape[:2]).flatten(1, 2)


class NormOfOutput(ToQkvAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(super().forward(x, mask))


class ShortToQkv(ToQkvAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.arange(x.shape[1]).expand(len(x), -1) < 243)


class MapOfKeys(TCAttention):
    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        return published_tcformer.TCAttention.forward(self, {**q_dict, "map_size": kv_dict["map_size"]}, kv_dict)


class DetachedScore(TCAttention):
    def forward(self, q_dict: dict[str, Any], kv_dict: dict[str, Any]) -> Tensor:
        score = kv_dict["token_score"].detach() if "token_score" in kv_dict else kv_dict["x"][..., :1] * 0
        return published_tcformer.TCAttention.forward(self, q_dict, {**kv_dict, "token_score": score})


class GatedMlp(eager.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(self.act(hidden) * hidden.sigmoid())


class ShortMlp(eager.Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.shape[1] <= 243 else 0.5)


class DropsNever(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.attend(x))


class DropsBefore(Written):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.proj_drop(self.attend(x)))


class ChangesItsInput(AttentionEager):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x[:, 0] = 0  # a second call finds nothing to change
        return super().forward(x)


class LayerDrop(AttentionEager):
    """By the random numbers of another library; one in a million, so that outputs are the same."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__(32, 4)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.draw() > 1e-6)


class Clamped(Written):
    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return super().logits(q, k).clamp(-20, 20)


class Controller:
    """Prompt-to-Prompt's AttentionStore, by its kind."""

    def __init__(self) -> None:
        self.maps: dict[str, list[Tensor]] = {"all": []}

    def __call__(self, weights: Tensor) -> Tensor:
        self.maps["all"].append(weights.detach())
        return weights


class Controlled(Written):
    def __init__(self) -> None:
        super().__init__()
        self.controller = Controller()

    def weights(self, logits: Tensor) -> Tensor:
        return self.controller(super().weights(logits))


class Counting(AttentionEager):
    """On a module inside."""

    def __init__(self, count: Any) -> None:
        super().__init__(32, 4)
        self.proj.count = count

    def forward(self, x: Tensor) -> Tensor:
        self.proj.count += 1
        return super().forward(x)


class WeightedRoutes(BiLevelRoutingAttentionEager):
    """Whose values are weighted after the attention, once more."""

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Tensor:
        return super().forward(x) * self.router.scale


class FewKeys(ToQkvAttention):
    """Multi-query: one key and value for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(32, 48)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.to_qkv(x).split([32, 8, 8], -1)
        q, k, v = q.unflatten(-1, (4, 8)).transpose(1, 2), k[:, None], v[:, None]
        return self.to_out(((q @ k.mT * self.scale).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Halves(TimmMlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(torch.cat([self.act(hidden), self.act(hidden)], -1))


DIFFERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "rotary": (Rotary, "its output differs from attention"),
    "residual": (Residual, "its output differs from attention"),
    "drop key": (lambda: DropKey(32, 4), "its forward draws random numbers in training"),
    "training scale": (lambda: TrainingScale(32, 4), "its output differs from attention in training"),
    "returns weights": (lambda: ReturnsWeights(32, 4), "it returns a tuple"),
    "stores its map": (lambda: StoresMap("attribute"), "its forward stores attn_map"),
    "stores its map in training": (lambda: StoresMap("training"), "its forward stores attn_map in training"),
    "adds to a list": (lambda: StoresMap("list"), "its forward stores maps"),
    "window of 256": (lambda: Limited("window"), "its output differs from attention on long input"),
    "256 largest": (lambda: Limited("top-k"), "its output differs from attention on long input"),
    "chunks of 49": (lambda: Limited("chunks"), "its output differs from attention on long input"),
    "scaled by log N": (lambda: Limited("log N"), "its output differs from attention on long input"),
    "at most 256": (
        lambda: Limited("error"),
        "its forward or its gradient fails (IndexError on [1, 300, 32]) on long input",
    ),
    "cross-attention to 243": (
        lambda: ShortCross(32, 4),
        "its output differs from cross-attention on long input",
    ),
    "keys and values of 243": (
        lambda: ShortContext(32, 4),
        "its output differs from cross-attention on long input",
    ),
    "gated": (lambda: Gated(32, 4), "its output differs from cross-attention"),
    "243 tokens": (
        lambda: ShortTokens(32, 4, sr_ratio=2),
        "its output differs from attention over tokens with scores on long input",
    ),
    **{
        f"243 of {cls.func.__name__}, {mode}": (
            lambda cls=cls, mode=mode: cls(mode=mode),
            "its output differs from attention over frames or joints on long input",
        )
        for cls in (
            functools.partial(ShortFrames, 32, 32, 4),
            functools.partial(ShortSequence, 32, 4),
        )
        for mode in ("spatial", "temporal")
    },
    "reduced to 243": (
        lambda: ShortGrid(32, 4, sr_ratio=2),
        "its output differs from attention over a grid on long input",
    ),
    **{
        f"MLP, {cls.__name__}": (lambda cls=cls: cls(32, 64), f"its output differs from MLP{where}")
        for cls, where in ((GatedMlp, ""), (ShortMlp, " on long input"))
        if _HAS_ONEDNN
    },
    "to_qkv, norm of the output": (lambda: NormOfOutput(dim_head=6), "its output differs from attention"),
    "to_qkv of 243": (lambda: ShortToQkv(dim_head=6), "its output differs from attention on long input"),
    "weighted routes": (lambda: WeightedRoutes(32, 4, 3), "its output differs from attention between regions"),
    "needs a mask": (lambda: NeedsMask(32, 4), "its forward or its gradient fails (TypeError on [2, 5, 32], None)"),
    "second output detached": (lambda: DetachedMetric(32, 4), "it returns a tuple"),
    "windows": (lambda: Window(32, 4), "its forward or its gradient fails (RuntimeError on [2, 5, 32])"),
    "other default": (
        lambda: OtherLength(32, 4, "temporal"),
        "its output differs from attention over frames or joints",
    ),
    "map of the keys": (
        lambda: MapOfKeys(32, 4, sr_ratio=2),
        "its output differs from attention over tokens with scores",
    ),
    "detached score": (
        lambda: DetachedScore(32, 4, sr_ratio=2),
        "its gradients differ from attention over tokens with scores",
    ),
    "drops nothing": (DropsNever, "it applies proj_drop elsewhere than attention"),
    "drops elsewhere": (DropsBefore, "it applies proj_drop elsewhere than attention"),
    "changes its input": (lambda: ChangesItsInput(32, 4), "its forward changes its input"),
    "Python's random numbers": (lambda: LayerDrop(random.random), "its forward draws random numbers"),
    "NumPy's random numbers": (lambda: LayerDrop(np.random.rand), "its forward draws random numbers"),
    "clamped logits": (Clamped, "its output differs from attention on large input"),
    "a controller": (Controlled, "its forward stores controller"),
    "a count on a layer": (lambda: Counting(0), "its forward stores proj.count"),
    "a tensor on a layer": (lambda: Counting(torch.zeros(1)), "its forward stores proj.count"),
    "an array on a layer": (lambda: Counting(np.zeros(1)), "its forward stores proj.count"),
    "few keys": (FewKeys, "attention fails on what it takes (RuntimeError)"),
    **({"halves": (lambda: Halves(nn.GLU()), "MLP fails on what it takes (RuntimeError)")} if _HAS_ONEDNN else {}),
}


@pytest.mark.parametrize("what", DIFFERS)
def test_left_alone_with_a_reason(what: str) -> None:
    make, reason = DIFFERS[what]
    odd = make()
    assert_left(odd, reason)
    assert getattr(odd, "maps", []) == []


class OwnGenerator(AttentionEager):
    """Drops its whole output now and then, by numbers of its own."""

    def __init__(self, generator: Any) -> None:
        super().__init__(32)
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        g = self.generator
        drawn = torch.rand((), generator=g).item() if isinstance(g, torch.Generator) else g.random()
        return super().forward(x) * (drawn >= 0.001 or not self.training)


@pytest.mark.parametrize("make", [torch.Generator, random.Random, np.random.default_rng, np.random.RandomState])
def test_a_forward_that_draws_from_a_generator_of_its_own(make: Any) -> None:
    """It is left, and the generator is where it was."""
    generator = make()
    state = generator.get_state() if isinstance(generator, torch.Generator) else pickle.dumps(generator)
    with pytest.raises(ValueError, match="its forward stores generator"):
        hotkernels.swap(OwnGenerator(generator))
    now = generator.get_state() if isinstance(generator, torch.Generator) else pickle.dumps(generator)
    assert torch.equal(now, state) if isinstance(now, Tensor) else now == state


def test_a_twin_that_differs_leaves_a_module_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unlike(hotkernels.Twin):
        kind = "unlike"
        fits = staticmethod(lambda module: isinstance(module, AttentionEager))
        examples = staticmethod(lambda module: [(torch.randn(2, 5, 32),)])

        def forward(self, x: Tensor) -> Tensor:
            return x

    monkeypatch.setattr(twins, "TWINS", [Unlike, *twins.TWINS])
    assert hotkernels.swap(AttentionEager(32, 4)).replaced == [("", "attention")]


def test_a_verdict_is_for_modules_that_hold_the_same() -> None:
    """It is reached once for all modules that differ in the values of their parameters alone."""
    report = hotkernels.swap(nn.Sequential(Times(1.0), Times(2.0), Times(1.0)))
    assert [name for name, _ in report.replaced] == ["0", "2"]
    assert report.left == [("1", "its output differs from attention")]
    ones = torch.ones(2000)  # of which a text shows the ends
    for factors, name in (((1.0, 2.0), "_factor"), ((ones, ones.index_fill(0, torch.tensor(1000), 2.0)), "factor")):
        report = hotkernels.swap(nn.Sequential(*(Times(factor, name) for factor in factors)))
        assert report.left == [("1", "its output differs from attention")]
    report = hotkernels.swap(nn.Sequential(WiderInHalf(64, 4), WiderInHalf(64, 4).bfloat16()))
    assert report.left == [("1", "its output differs from attention")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", ["Cooler", "Alibi", "WiderInHalf"])
def test_rounding_in_half_precision_hides_nothing(dtype: torch.dtype, change: str) -> None:
    """Of a module: rounding to half precision is larger than what some of these change."""
    model = nn.Sequential(globals()[change](64, 4), AttentionEager(64, 4)).to(dtype)
    report = hotkernels.swap(model)
    assert report.left == [("0", "its output differs from attention")]
    assert report.replaced == [("1", "attention")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_of_16_blocks_is_no_difference(dtype: torch.dtype) -> None:
    model = eager.HoTMixSTEEager(frames=81, token_num=27, layer_index=3, channels=64, depth=8).to(dtype)
    report = hotkernels.swap(model, example_inputs=torch.randn(2, 81, 17, 2, dtype=dtype))
    assert len(report.replaced) == 17
