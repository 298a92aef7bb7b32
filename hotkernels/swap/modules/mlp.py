"""MLPs, whose products oneDNN serves."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ...nn.linear import calls_onednn, is_fast_on, linear
from ...nn.plain import DROPS, is_plain
from ..classes import codes, methods
from ..twins import register_twin
from ..watch import in_probe
from .published import Published, child_of, described, forward_obstacle, served

_MLP = ("fc1", "act", "fc2")
_OF_SHAPE = frozenset({"dim", "flatten", "len", "ndim", "shape", "size"})


@register_twin
class _Mlp(Published):
    """MixSTE's, timm's: fc2(act(fc1(x))), where oneDNN is faster or fuses GELU into the product: float32, on a CPU."""

    kind = "MLP"
    _hotkernels_first = "fc1"
    _hotkernels_any_dims: ClassVar[bool]  # whether no method asks what shape the input has

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        fc1, act, fc2 = (child_of(module, name) for name in _MLP)
        others = [child for name, child in module.named_children() if name not in _MLP]
        return (
            type(fc1) is type(fc2) is nn.Linear
            and fc1.out_features == fc2.in_features  # false where half of them are gates
            and isinstance(act, nn.Module)
            and all(type(child) in DROPS for child in others)
            and is_fast_on(getattr(fc1, "weight", None))
            and is_fast_on(getattr(fc2, "weight", None))
            and not forward_obstacle(module, 1)
        )

    @classmethod
    def describe(cls, module: Any) -> str:
        drops = [child for child in module.children() if isinstance(child, nn.Dropout)]
        return described(cls, module, "drop", max(drops, key=lambda drop: drop.p, default=None))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if original := vars(cls).get("_hotkernels_original"):
            found = [code for _, method in methods(original) for code in codes(method.__code__)]
            cls._hotkernels_any_dims = not any(_OF_SHAPE & {*code.co_names} for code in found)

    def forward(self: Any, x: Tensor, /) -> Any:
        gelu, dims = _is_gelu(self.act), None if self._hotkernels_any_dims else 3
        gains = in_probe(self) or calls_onednn(self.fc1, x, gelu)
        if not (gains and served(self, _MLP, (x,), dims=dims)):
            return super().forward(x)
        hidden = linear(self.fc1, x, gelu)
        return linear(self.fc2, hidden if gelu else self.act(hidden))


@register_twin
class _Sequence(Published):
    """MLPs that are an nn.Sequential, as TokenPose's, vit-pytorch's and torchvision's."""

    kind = "MLP"
    _hotkernels_probed = False

    @classmethod
    def fits(cls, module: Any) -> bool | str:
        layers = [layer for layer in module.children() if type(layer) is nn.Linear]
        return (
            isinstance(module, nn.Sequential)
            and type(module).forward is nn.Sequential.forward
            and len(layers) > 1
            and is_fast_on(getattr(layers[0], "weight", None))
            and not forward_obstacle(module, 1)
        )

    @classmethod
    def describe(cls, module: Any) -> str:
        return cls.kind

    def forward(self: Any, input: Any, /) -> Any:
        layers, i = [*self], 0
        while i < len(layers):
            gelu = i + 1 < len(layers) and _is_gelu(layers[i + 1])
            if calls_onednn(layers[i], input, gelu):
                input = linear(layers[i], input, gelu)
                i += gelu
            else:
                input = layers[i](input)
            i += 1
        return input


def _is_gelu(act: Any) -> bool:
    return is_plain(act, nn.GELU) and act.approximate == "none"
