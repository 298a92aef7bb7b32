"""The clustering and merging functions that hotkernels.swap finds in what a model calls, and those out of its reach."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import published
import pytest
import torch
from swapping import answer, swapped_modules
from torch import Tensor, nn

import hotkernels
from hotkernels.baselines import AttentionEager
from hotkernels.models import eager
from hotkernels.models.eager import cluster_dpc_knn
from hotkernels.swap import functions

# Functions of a file that have a published name and are not the published function.


def file_with(source: str) -> Any:
    """A module class `M` whose file is `source`, after the imports of the published one."""
    names: dict[str, Any] = {**vars(published), "__name__": "published"}
    exec(source, names)
    return names["M"]


MODULE = """
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = AttentionEager(8, 2)
    def forward(self, x):
        return {call}
"""


@pytest.mark.parametrize(
    ("define", "call", "reason"),
    [
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x, cluster_num, k, token_mask)[::2]",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x + 0 * torch.rand(x.shape), cluster_num, k, token_mask)",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x, cluster_num, min(k, cluster_num), token_mask)",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x, cluster_num, min(k, 5), token_mask)",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x, min(cluster_num, x.shape[1]), k, token_mask)",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x, cluster_num, min(k, x.shape[1]), token_mask)",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(token_dict, cluster_num, k=5, token_mask=None):\n"
            "    return theirs(token_dict['x'], cluster_num, min(k, cluster_num), token_mask)[1], cluster_num",
            "cluster_dpc_knn({'x': x}, 3)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    return theirs(x, cluster_num, k)",
            "cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: its answers are of no published form",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k=7, token_mask=None):\n"
            "    return theirs(x.float(), cluster_num, k, token_mask)[1], cluster_num",
            "cluster_dpc_knn(x, 3)",
            "forward: cluster_dpc_knn: its arguments (x, cluster_num, k=7, token_mask=None) are of no published form",
        ),
        (
            "from hotkernels.compat.tcformer import merge_tokens as theirs\n"
            "def merge_tokens(token_dict, idx_cluster, cluster_num, token_weight=None):\n"
            "    return theirs(token_dict, idx_cluster, cluster_num)",
            "merge_tokens(x, x, 3)",
            "forward: merge_tokens: its answers are of no published form",
        ),
        (
            "def dpc_knn(features, num_clusters, k=7, valid_token_mask=None):\n"
            "    return cluster_dpc_knn(features, num_clusters, k, valid_token_mask)[::-1]",
            "dpc_knn(x, 3)",
            "forward: dpc_knn: its answers are of no published form",
        ),
        (
            "def cluster_and_merge(x, cluster_num):\n"
            "    member = nn.functional.one_hot(cluster_dpc_knn(x, cluster_num, 3)[1], cluster_num).to(x)\n"
            "    return member.mT @ x / (member.sum(1)[..., None] + 1e-6)",
            "cluster_and_merge(x, 3)",
            "forward: cluster_and_merge: its answers are of no published form",
        ),
        (
            "def cluster_dpc_knn(x, cluster_num, coords): return x",
            "cluster_dpc_knn(x, 3, None)",
            "forward: cluster_dpc_knn: its arguments (x, cluster_num, coords) are of no published form",
        ),
        (
            "",
            "self.cluster_dpc_knn(x) if x is None else cluster_dpc_knn(x, 3, 2)",
            "forward: cluster_dpc_knn: cluster_dpc_knn is also the name of an attribute",
        ),
    ],
)
def test_functions_left_alone(define: str, call: str, reason: str) -> None:
    model = file_with(define + MODULE.format(call=call))()
    report = hotkernels.swap(model)
    assert report.left == [("", reason)]
    assert report.functions == []
    assert type(model).__name__ == "M"


@pytest.mark.parametrize(
    ("define", "call", "ours"),
    [
        ("", "(lambda y: cluster_dpc_knn(y, 3, 4))(x)", "hot.cluster_dpc_knn"),
        ("", "cluster_dpc_knn(x, 3, 4), torch.rand(2)", "hot.cluster_dpc_knn"),
        ("def choose(x): return cluster_dpc_knn(x, 3, 4)", "choose(x)", "hot.cluster_dpc_knn"),
        ("chosen = cluster_dpc_knn", "chosen(x, 3, 4)", "hot.cluster_dpc_knn"),
        ("def f(x): return f(x[None]) if x.dim() < 3 else cluster_dpc_knn(x, 3, 4)", "f(x)", "hot.cluster_dpc_knn"),
        ("", "[cluster_dpc_knn_center(y, 3, k=4, center=4) for y in (x,)]", "hot.cluster_dpc_knn_center"),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k): return theirs(x, cluster_num, k)",
            "cluster_dpc_knn(x, 3, 4)",
            "hot.cluster_dpc_knn",
        ),
        (  # another cluster for masked tokens: nobody's business
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k, token_mask=None):\n"
            "    index, cluster = theirs(x, cluster_num, k, token_mask)\n"
            "    return index, cluster if token_mask is None else cluster.masked_fill(~token_mask, 1)",
            "cluster_dpc_knn(x, 3, 4)",
            "hot.cluster_dpc_knn",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k=5, token_mask=None):\n"
            "    return theirs(x.float(), cluster_num, k, token_mask)[1], cluster_num",
            "cluster_dpc_knn(x, 3)",
            "prunevid.cluster_dpc_knn",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(token_dict, cluster_num, k=5, token_mask=None):\n"
            "    return theirs(token_dict['x'].float(), cluster_num, k, token_mask)[1], cluster_num",
            "cluster_dpc_knn({'x': x}, 6)",
            "chat_univi.cluster_dpc_knn",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k=5, token_mask=None):\n"
            "    return theirs(x, cluster_num, k, token_mask)[::-1]",
            "cluster_dpc_knn(x, 3, k=4)",
            "token_reduction.cluster_dpc_knn",
        ),
        (
            "theirs = cluster_dpc_knn\ndef cluster_dpc_knn(x, cluster_num, k=5):\n"
            "    return theirs(x, cluster_num, k)[1], cluster_num",
            "cluster_dpc_knn(x, 3, 4)",
            "ermvp.cluster_dpc_knn",
        ),
        (
            "def dpc_knn(features, num_clusters, k=7, valid_token_mask=None):\n"
            "    return cluster_dpc_knn(features.float(), num_clusters, k, valid_token_mask)[::-1]",
            "dpc_knn(features=x, num_clusters=3)",
            "flashvid.dpc_knn",
        ),
        (
            "def cluster_and_merge(x, cluster_num):\n"
            "    member = nn.functional.one_hot(cluster_dpc_knn(x, cluster_num, cluster_num)[1], cluster_num).to(x)\n"
            "    return member.mT @ x / (member.sum(1)[..., None] + 1e-6)",
            "cluster_and_merge(x, 3)",
            "sparsevlm.cluster_and_merge",
        ),
        (
            "import published_tcformer\n"
            "def merge_tokens(x, idx_token, agg_weight, idx_cluster, cluster_num, token_weight=None):\n"
            "    size = {'map_size': None, 'init_grid_size': None}\n"
            "    tokens = {'x': x, 'idx_token': idx_token, 'agg_weight': agg_weight, **size}\n"
            "    out = published_tcformer.merge_tokens(tokens, idx_cluster, cluster_num, token_weight)\n"
            "    return out['x'], out['idx_token'], out['agg_weight']",
            "merge_tokens(x, x[..., 0].argsort(1), x[..., :1], x[..., 1].argsort(1), 9)",
            "token_reduction.merge_tokens",
        ),
        (
            "from hotkernels.baselines import merge_tokens_eager\n"
            "def merge_tokens(x, idx_cluster, cluster_num, token_weight=None):\n"
            "    return merge_tokens_eager(x, idx_cluster, cluster_num, token_weight), idx_cluster.clone()",
            "merge_tokens(x, x[..., 0].argsort(1), 9, x[..., :1])",
            "ermvp.merge_tokens",
        ),
    ],
)
def test_functions_found(define: str, call: str, ours: str) -> None:
    model, x = file_with(define + MODULE.format(call=call))(), torch.randn(2, 9, 8)
    torch.manual_seed(0)
    expected = model(x)
    report = hotkernels.swap(model, example_inputs=x)
    assert [what.rpartition("hotkernels.compat.")[2] for _, what in report.functions] == [ours]
    returns_choices = ours.startswith(("hot.", "token_reduction.c", "flashvid."))
    assert report.choices == ((2 * 3, 0) if returns_choices else None)
    model.forward.__globals__.update(dict.fromkeys(functions.FORMS))  # theirs are not called
    torch.manual_seed(0)
    assert str(model(x)) == str(expected)


def test_a_function_that_calls_itself_is_called_as_it_was_from_inside() -> None:
    define = "def f(x): return f(x[None]) if x.dim() < 3 else cluster_dpc_knn(x, 3, 4)"
    report = hotkernels.swap(file_with(define + MODULE.format(call="f(x)"))())
    assert report.left == [("", "forward: f: from inside itself, it is called as it was")]


UTILS = """
import math
def helper(x): return cluster_dpc_knn(x, 3, 4)
"""


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file `pack.utils` with clustering functions, and the package that holds it."""
    package: Any = ModuleType("pack")
    package.utils = ModuleType("pack.utils")
    vars(package.utils).update({**vars(published), "__name__": "pack.utils"})
    exec(UTILS, vars(package.utils))
    monkeypatch.setitem(sys.modules, "pack", package)
    monkeypatch.setitem(sys.modules, "pack.utils", package.utils)
    return package.utils


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("utils.cluster_dpc_knn(x, 3, 4)", "utils.cluster_dpc_knn"),
        ("pack.utils.cluster_dpc_knn(x, 3, 4), pack.utils.math.inf", "pack.utils.cluster_dpc_knn"),
        ("utils.cluster_dpc_knn_center(x, 3, 4, 4), utils.math.inf", "utils.cluster_dpc_knn_center"),
        ("utils.helper(x)", "utils.helper: cluster_dpc_knn"),
    ],
)
def test_functions_of_an_imported_module(utils: Any, call: str, found: str) -> None:
    """Only for the swapped model; what else changes in that file is seen by it."""
    cls = file_with("import pack\nfrom pack import utils\n" + MODULE.format(call=call))
    model, other, x = cls(), cls(), torch.randn(2, 9, 8)
    torch.manual_seed(0)
    expected = str(model(x))
    theirs = utils.cluster_dpc_knn, utils.helper
    report = hotkernels.swap(model, example_inputs=x)
    assert [line.replace("forward, ", "").replace("forward: ", "") for _, line in report.functions] == [
        f"{found} is hotkernels.compat.hot.{found.rpartition('.')[2].rpartition(' ')[2]}"
    ]
    assert (utils.cluster_dpc_knn, utils.helper) == theirs
    for each in (model, other, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        assert str(each(x)) == expected
    utils.cluster_dpc_knn = utils.cluster_dpc_knn_center = None
    model(x)
    with pytest.raises(TypeError):
        other(x)
    if "math" in call:
        utils.math = None
        with pytest.raises(AttributeError):
            model(x)


@pytest.mark.parametrize(
    ("define", "call", "reason"),
    [
        ("", "(self.cluster_dpc_knn(x, 3, 4), 1)", "forward: cluster_dpc_knn: it is an attribute of an object"),
        (
            "def f(): return 1",
            "vars(utils)['cluster_dpc_knn'](x, 3, 4), utils.cluster_dpc_knn(x, 3, 4)",
            "used by itself",
        ),
        (
            "",
            "utils.cluster_dpc_knn(x, 3, 4), x.utils",
            "forward: utils.cluster_dpc_knn: utils is also the name of an a",
        ),
        (
            "from functools import partial\nchoose = partial(cluster_dpc_knn, k=4)",
            "choose(x, 3)",
            "forward: choose: it is a partial",
        ),
        (
            "def closed(f):\n    def choose(x): return f(x, 3, 4)\n    return choose\nchoose = closed(cluster_dpc_knn)",
            "choose(x)",
            "forward: f: a closure holds it",
        ),
        (
            "def closed(f):\n    def choose(x): return f(x)\n    return choose\n"
            "choose = closed(lambda x: cluster_dpc_knn(x, 3, 4))",
            "choose(x)",
            "forward: f: a closure holds it",
        ),
    ],
)
def test_functions_out_of_reach(utils: Any, define: str, call: str, reason: str) -> None:
    model = file_with(f"from pack import utils\n{define}\n" + MODULE.format(call=call))()
    report = hotkernels.swap(model)
    assert [path for path, _ in report.left] == [""]
    assert reason in report.left[0][1]
    assert report.functions == []
    assert type(model).__name__ == "M"


class Held(nn.Module):
    """Holds the function as its methods do not name it."""

    on_the_class = staticmethod(cluster_dpc_knn)

    def __init__(self) -> None:
        super().__init__()
        self.attn = AttentionEager(8, 2)
        self.here = functools.partial(cluster_dpc_knn, k=4)

    def forward(self, x: Tensor) -> Any:
        from hotkernels.models.eager import cluster_dpc_knn_center

        return self.here(x, 3), self.on_the_class(x, 3, 4), cluster_dpc_knn_center(x, 3, 4, 4)


def test_our_own_operators_are_no_published_functions() -> None:
    """`hotkernels.dpc_knn` has the name of FlashVID's."""
    model = file_with("from hotkernels import dpc_knn\n" + MODULE.format(call="dpc_knn(x, 3).index"))()
    report = hotkernels.swap(model)
    assert (report.left, report.functions) == ([], [])


class Method(nn.Module):
    """HoliTom's: the clustering is a method."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = AttentionEager(8, 2)

    def cluster_dpc_knn(self, x: Tensor, cluster_num: int, k: int = 7) -> Any:
        return cluster_dpc_knn(x, cluster_num, k)[0]

    def forward(self, x: Tensor) -> Any:
        return self.cluster_dpc_knn(x, 3, 4)


def test_a_method_of_that_name() -> None:
    """Is not replaced; what it calls is."""
    model, x = Method(), torch.randn(2, 9, 8)
    torch.manual_seed(0)
    expected = model(x)
    report = hotkernels.swap(model)
    assert report.left == [("", "forward: cluster_dpc_knn: it is a method")]
    assert report.functions == [("", "cluster_dpc_knn: cluster_dpc_knn is hotkernels.compat.hot.cluster_dpc_knn")]
    torch.manual_seed(0)
    assert torch.equal(model(x), expected)


def test_functions_that_objects_hold() -> None:
    assert hotkernels.swap(Held()).left == [
        ("", "on_the_class: it is cluster_dpc_knn, held as an attribute"),
        ("", "forward: cluster_dpc_knn_center: it is imported inside the function"),
        ("", "here: it is cluster_dpc_knn, held as an attribute"),
    ]


OUT_OF_REACH = """
import torch
from functools import cached_property, lru_cache, partial, partialmethod
def helper(x): return cluster_dpc_knn(x, 3, 4)
CHOICES = {{"dpc": cluster_dpc_knn}}
class M(nn.Module):
    {attribute}
    def __init__(self):
        super().__init__()
        self.attn = AttentionEager(8, 2)
        {held}
    def forward(self, x{default}):
        return {call}
"""


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            {"attribute": "@staticmethod\n    def choose(x): return cluster_dpc_knn(x, 3, 4)", "call": "M.choose(x)"},
            "choose: cluster_dpc_knn: called in a staticmethod",
        ),
        (
            {"attribute": "@classmethod\n    def choose(cls, x): return helper(x)", "call": "self.choose(x)"},
            "choose: helper: called in a classmethod",
        ),
        (
            {"attribute": "@property\n    def kept(self): return cluster_dpc_knn(self.x, 3, 4)", "call": "self.kept"},
            "kept: cluster_dpc_knn: called in a property",
        ),
        (
            {"attribute": "@cached_property\n    def chosen(self): return helper(self.x)", "call": "self.chosen"},
            "chosen: helper: called in a cached_property",
        ),
        (
            {"attribute": "@lru_cache\n    def choose(self, x): return helper(x)", "call": "self.choose(x)"},
            "choose: helper: called by a function that an attribute holds",
        ),
        (
            {"attribute": "@torch.no_grad()\n    def choose(self, x): return helper(x)", "call": "self.choose(x)"},
            "choose: helper: called in a decorated function",
        ),
        (
            {"attribute": "choices = {'dpc': [cluster_dpc_knn]}", "call": "self.choices['dpc'][0](x, 3, 4)"},
            "choices: it holds cluster_dpc_knn",
        ),
        (
            {"attribute": "choices = {'dpc': lambda x: helper(x)}", "call": "self.choices['dpc'](x)"},
            "choices: helper: called by a function that an attribute holds",
        ),
        ({"call": "CHOICES['dpc'](x, 3, 4)"}, "forward: CHOICES: it is a dict"),
        ({"default": ", f=cluster_dpc_knn", "call": "f(x, 3, 4)"}, "forward: f: the default of an argument holds it"),
        ({"default": ", *, f=helper", "call": "f(x)"}, "forward: f: the default of an argument holds it"),
        ({"held": "self.f = partial(cluster_dpc_knn, k=4)"}, "f: it is cluster_dpc_knn, held as an attribute"),
        (
            {"held": "self.f = partial(lambda f, x: f(x, 3, 4), cluster_dpc_knn)"},
            "f: it holds cluster_dpc_knn",
        ),
        (
            {"held": "self.f = partial(lambda x, f: f(x, 3, 4), f=cluster_dpc_knn)"},
            "f: it holds cluster_dpc_knn",
        ),
        ({"held": "self.f = partial(helper)"}, "f: cluster_dpc_knn: called by a function that an attribute holds"),
        (
            {"held": "self.f = lambda x: cluster_dpc_knn(x, 3, 4)"},
            "f: cluster_dpc_knn: called by a function that an attribute holds",
        ),
        ({"default": ", f=CHOICES", "call": "f['dpc'](x, 3, 4)"}, "forward: f: the default of an argument holds it"),
        ({"held": "self.f = {'dpc': cluster_dpc_knn}"}, "f: it holds cluster_dpc_knn"),
    ],
)
def test_called_from_elsewhere(parts: dict[str, str], reason: str) -> None:
    """What is not called by a plain method is left and reported, never counted as replaced."""
    parts = {"attribute": "", "held": "", "default": "", "call": "self.f(x, 3)", **parts}
    report = hotkernels.swap(file_with(OUT_OF_REACH.format(**parts))())
    assert report.left == [("", reason)]
    assert report.functions == []


def test_a_method_that_the_instance_holds() -> None:
    """It stays the original, though the method of the class is another."""
    parts = {"attribute": "def choose(self, x): return cluster_dpc_knn(x, 3, 4)", "held": "self.f = self.choose"}
    model = file_with(OUT_OF_REACH.format(default="", call="self.f(x)", **parts))()
    report = hotkernels.swap(model)
    assert report.left == [("", "f: cluster_dpc_knn: called by a function that an attribute holds")]
    assert report.functions == [("", "choose: cluster_dpc_knn is hotkernels.compat.hot.cluster_dpc_knn")]


def test_a_function_named_at_creation_alone_is_no_module_to_swap() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choose = functools.partial(cluster_dpc_knn, k=4)

        def forward(self, x: Tensor) -> Any:
            return self.choose(x, 3)

    with pytest.raises(ValueError, match=r"got Kept \(choose: it is cluster_dpc_knn, held as an attribute\)"):
        hotkernels.swap(Kept())


def test_functions_of_torch_that_a_module_holds_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(function: Any, *_: Any) -> Any:
        assert not function.__module__.startswith("torch")
        return ()

    monkeypatch.setattr(functions, "_find_renames", searched)
    held = {"activation": nn.functional.relu, "others": [functools.partial(nn.functional.softmax, dim=-1)]}
    assert functions.find_held(nn.TransformerEncoderLayer, held) == []
    assert functions.find_held(Held, held) == []


def test_called_by_a_method_of_the_instance() -> None:
    model = published.MotionAGFormer()
    model.forward = model.forward  # as libraries do that wrap it
    report = hotkernels.swap(model)
    assert report.left == [("", "forward: it was replaced on the instance")]
    assert "" not in swapped_modules(model)


def test_called_by_a_method_that_is_overridden() -> None:
    class Derived(eager.HoTMixSTEEager):
        def forward(self, x: Tensor, index: Tensor | None = None) -> Any:
            return super().forward(x, index)

    report = hotkernels.swap(Derived(channels=32, depth=2))
    assert report.functions == []
    assert report.left == [("", "forward: _chosen: called in a method that a derived class overrides")]


def test_a_method_keeps_its_defaults_and_closure() -> None:
    class Chosen(nn.Linear):
        def forward(self, x: Tensor, number: int = 3, *, scale: float = 2.0) -> Tensor:
            """Scaled."""
            index, _ = cluster_dpc_knn(x, number, 5)
            return super().forward(x.gather(1, index[..., None].expand(-1, -1, 8))) * scale

    model, x = Chosen(8, 8), torch.randn(2, 9, 8)
    expected, _ = answer(model, x)
    report = hotkernels.swap(model, example_inputs=x)
    assert [path for path, _ in report.functions] == [""]
    torch.testing.assert_close(answer(model, x)[0], expected)
    assert model.forward.__doc__ == "Scaled."
