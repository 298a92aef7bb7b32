"""Every example in a docstring, and in the README, runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", hotkernels.__all__)
def test_public_names_are_documented_with_an_example(name: str) -> None:
    public = getattr(hotkernels, name)
    assert public.__doc__
    if callable(public) and not isinstance(public, type):
        assert ">>>" in public.__doc__, "an example that runs"


@pytest.mark.parametrize("block", README)
def test_readme_examples(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
