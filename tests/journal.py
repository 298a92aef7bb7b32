"""A pytest plugin for `make gpu`: a share of the tests, each written down as it ends, and an end to a lost GPU context.

Load it with -p journal. It selects the tests of some backends and whatever test_gpu.py holds.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.supervise import LOST, Journal
from hotkernels.backends import OPS

# They take tens of GB each: one after the other, in one process.
LARGE = ("test_tensors_of_more_than_two_to_the_31_elements", "test_strides_beyond_32_bits")
_reports: list[pytest.TestReport] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, required=True, help="where to write down each test")
    parser.addoption("--only", default="cuda,triton", help="the backends whose tests to run")
    parser.addoption("--shard", default="0/1", help="i/n: the i-th of n shares")


def _params(item: pytest.Item) -> dict[str, Any]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def _share(item: pytest.Item) -> str:
    """Tests with the same key run in the same process: they share compiled kernels."""
    name = getattr(item, "originalname", item.name)
    if name in LARGE:
        return "large"
    params = _params(item)
    if "case" in params and "op" in params:
        return f"{params['op'].name} {params['dtype']} {params['case']}"
    return item.nodeid


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_journal] = Journal(config.getoption("--journal"))


_journal = pytest.StashKey[Journal]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backends = config.getoption("--only").split(",")
    part, parts = map(int, config.getoption("--shard").split("/"))
    journal = config.stash[_journal]
    items[:] = [
        item
        for item in items
        if (_params(item).get("backend") in backends or item.path.stem == "test_gpu")
        and zlib.crc32(_share(item).encode()) % parts == part
    ]
    if not journal.known:
        journal.write(tasks=len(items))
    items[:] = [item for item in items if item.nodeid not in journal.known]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _reports.append(report)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    journal = item.config.stash[_journal]
    _reports.clear()
    journal.start(item.nodeid)
    result = yield
    lost = _lost()
    failed = [report for report in _reports if report.failed]
    skipped = [report for report in _reports if report.skipped]
    why = text = ""
    if failed:
        crash = getattr(failed[0].longrepr, "reprcrash", None)
        text = failed[0].longreprtext[-4000:]
        why = (crash.message if crash else text).strip()[:400]
    elif skipped:
        why = str(skipped[0].longrepr[2] if isinstance(skipped[0].longrepr, tuple) else skipped[0].longrepr)
    params, stem = _params(item), item.path.stem.removeprefix("test_")
    journal.end(
        item.nodeid,
        "failed" if failed or lost else "skipped" if skipped else "passed",
        op=params["op"].name if "op" in params else next((op for op in OPS if stem.startswith(op)), stem),
        backend=str(params.get("backend", "")),
        seconds=round(sum(report.duration for report in _reports), 2),
        why=f"{lost}; {why}" if lost else why,
        text=text,
    )
    if lost:
        os._exit(LOST)
    return result


def _lost() -> str:
    """What makes this process's GPU context unusable, if anything: an error that no later call could outlive."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""
