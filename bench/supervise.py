"""Runs a program that may crash or hang on a GPU until its list of tasks is done, and keeps a journal of them.

The journal has one JSON object per line: {"tasks": n}, then two per task, {"id", "state": "started"} and {"id",
"state": "passed", "failed" or "skipped", ...}. Where the program dies or hangs, the task it was at is written down as
failed, and the program is started again: it goes on with what the journal does not have.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOST = 75
"""Exit status of a program whose GPU context is lost: its journal is complete so far, it must be started again."""


class Journal:
    """One program's tasks; the same file when the program is started again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = {entry["id"] for entry in read(path) if "id" in entry}

    def write(self, **entry: Any) -> None:
        """Add a line that survives whatever happens next."""
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def start(self, task: str) -> None:
        """Before a task."""
        self.write(id=task, state="started")

    def end(self, task: str, state: str, **more: Any) -> None:
        """After it."""
        self.write(id=task, state=state, **more)


def read(path: Path) -> list[dict[str, Any]]:
    """All entries; a last line that was not finished is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def results(path: Path) -> list[dict[str, Any]]:
    """The tasks that ended."""
    return [entry for entry in read(path) if entry.get("state") not in (None, "started")]


def missing(path: Path) -> int:
    """How many tasks were planned and did not end."""
    planned = [entry["tasks"] for entry in read(path) if "tasks" in entry]
    return max(planned, default=0) - len(results(path))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start(command: Sequence[str], log: Path, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, its output added to a file."""
    with log.open("ab") as file:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
        )


def run(command: Sequence[str], log: Path, seconds: float, cwd: Path, env: Mapping[str, str]) -> int | None:
    """Run a command for so many seconds at most; its exit status, None if it took longer and was killed."""
    process = start(command, log, cwd, env)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        end_group(process)
        return None


def supervise(
    command: Sequence[str], journal: Path, log: Path, deadline: float, hang: float, cwd: Path, env: Mapping[str, str]
) -> str | None:
    """Run a program until its tasks are done: None, or why it could not be brought to its end.

    `deadline` is a time of time.monotonic(); a task that takes longer than `hang` seconds is given up.
    """
    while True:
        done = len(results(journal))
        process = start(command, log, cwd, env)
        size, changed = journal.stat().st_size if journal.exists() else -1, time.monotonic()
        patience = 2 * hang  # until it writes for the first time: many import at once
        while process.poll() is None:
            time.sleep(0.1)
            now = time.monotonic()
            if journal.exists() and journal.stat().st_size != size:
                size, changed, patience = journal.stat().st_size, now, hang
            if now > deadline:
                end_group(process)
                return "out of time"
            if now - changed > patience:
                end_group(process)
        states = {entry["id"]: entry["state"] for entry in read(journal) if "id" in entry}
        current = [task for task, state in states.items() if state == "started"]
        code = process.returncode
        for task in current:
            how = f"hung for {hang:.0f} s" if code == -signal.SIGKILL else f"the process died with status {code}"
            Journal(journal).end(task, "failed", why=how, text="\n".join(tail(log)))
        if not current and code in (0, 1, 5):  # 5: pytest has no test left
            return None
        if len(results(journal)) == done:
            return f"ended with status {code} without doing anything"


def tail(log: Path, lines: int = 30) -> list[str]:
    """The end of a log."""
    return log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
