"""The command `hotkernels demo | doctor | bench`, which is `python -m hotkernels`, too."""

from __future__ import annotations

import importlib
import sys

from . import __version__

COMMANDS = {
    "demo": "keep 81 of 243 frames of a motion, attend, bring the others back, and compare with published code",
    "doctor": "versions, instruction sets, which extension loaded, which backend serves each op",
    "bench": "time one op against the published eager code, at a shape of your own",
}


def usage() -> str:
    """The commands, one per line."""
    lines = [f"  {name:<8}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: hotkernels [--version] COMMAND [--help | ...]", *lines])


def main(argv: list[str]) -> int:
    """Run a command and return its exit status."""
    if argv and argv[0] in COMMANDS:
        return int(importlib.import_module(f"hotkernels.{argv[0]}").main(argv[1:]) or 0)
    if argv == ["--version"]:
        print(f"hotkernels {__version__}")
        return 0
    asked = argv in (["-h"], ["--help"])
    if argv and not asked:
        print(f"hotkernels: command must be one of {', '.join(COMMANDS)}, got '{argv[0]}'", file=sys.stderr)
    print(usage(), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def console() -> int:
    """What `hotkernels` on the command line runs."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(console())
