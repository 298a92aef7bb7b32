"""Every example in a docstring, and in the README, runs; the figures of README are those of the results files."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import hotkernels
from hotkernels.swap import twins

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
ROOT = Path(__file__).resolve().parents[1]
MODULES = ["hotkernels"] + [
    module.name
    for module in pkgutil.walk_packages(hotkernels.__path__, "hotkernels.")
    if not module.name.rpartition(".")[2].startswith("_")  # extensions, and __main__, which runs
]
README = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "triton"):  # what hotkernels can do without
            raise
        pytest.skip(f"{error.name} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(twins, "TWINS", list(twins.TWINS))  # what an example registers goes with it
    failed, _ = doctest.testmod(module, globs={}, optionflags=FLAGS)  # an example imports what it uses
    assert failed == 0


HOMES = (hotkernels, hotkernels.nn, hotkernels.models, hotkernels.autograd)
PUBLIC = [getattr(home, name) for home in HOMES for name in home.__all__]
OTHERS = [getattr(hotkernels.compat, name) for name in hotkernels.compat.__all__] + [hotkernels.models.strategies]


@pytest.mark.parametrize("public", PUBLIC, ids=lambda public: public.__name__)
def test_public_names_are_documented_with_an_example(public: Any) -> None:
    assert public.__doc__
    if callable(public) and (not isinstance(public, type) or issubclass(public, nn.Module)):
        assert ">>>" in public.__doc__, "an example that runs"


@pytest.mark.parametrize("module", OTHERS, ids=lambda module: module.__name__.removeprefix("hotkernels."))
def test_functions_of_public_modules_are_documented(module: Any) -> None:
    """Each of them; and clustering with an example, which shows merging where a module has that."""
    functions = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    public = {f.__name__: f.__doc__ or "" for f in functions if not f.__name__.startswith("_")}
    assert public
    assert all(public.values()), public
    if "cluster_dpc_knn" in public:
        example = public["cluster_dpc_knn"].partition(">>>")[2]
        assert all(f"{name}(" in example for name in public.keys() & {"cluster_dpc_knn", "merge_tokens"})


@pytest.mark.parametrize("block", README)
def test_readme_examples(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


FIGURES = [  # of README's first table, row by row: op, row, what is compared
    ("dpc_knn", "hot_mixste", "eager"),
    ("dpc_knn", "tokens_8192", "eager"),
    ("merge_tokens", "tcformer_stage1_b8", "eager"),
    ("gathered_attention", "mixste_spatial", "eager"),
    ("gathered_attention", "mixste_spatial", "sdpa"),
    ("gathered_attention", "mixste_temporal", "eager"),
    ("gathered_attention", "mixste_temporal", "sdpa"),
    ("gathered_attention", "knn_n4096_k32", "eager"),
    ("gathered_attention", "biformer_stage2", "eager"),
    ("gathered_attention", "biformer_stage2", "sdpa"),
    ("recovery_attention", "hot_mixste_b1", "eager"),
    ("hot-mixste", "swapped", "eager"),
    ("hot-mixste", "native", "eager"),
]


def _cell(op: str, row: str, against: str, results: Path) -> str:
    """`2.5x / 2.9x`: forward and, where there is one, with backward, of one results file; "-" without the row."""
    if op == "hot-mixste":
        measured = json.loads((results.parent / f"hot-mixste-{results.name}").read_text())["rows"]
        pairs = [(measured[step][against], measured[step][row]) for step in ("forward", "training step")]
    else:
        rows = [r for r in json.loads(results.read_text())["rows"] if (r["op"], r["row"]) == (op, row)]
        pairs = [(r["seconds"][against], r["seconds"]["ours"]) for r in rows]
    ratios = [theirs["median"] / ours["median"] for theirs, ours in pairs]
    return " / ".join(f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x" for ratio in ratios) or "-"


def test_readme_figures_are_those_of_the_results() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    table = [line.strip("|").split("|")[1:] for line in lines[first + 1 : first + 1 + len(FIGURES)]]
    linked = dict.fromkeys(re.findall(r"\((bench/results/\w[^)]*)\.md\)", "\n".join(lines[: first + 30])))
    results = [ROOT / f"{name}.json" for name in linked]
    assert len(results) == len(table[0])
    said = [[cell.strip() for cell in row] for row in table]
    assert said == [[_cell(*figure, file) for file in results] for figure in FIGURES]
