"""PTX on the host: what compilers make of kernels, translated into C++ over ptx_machine.h.

Every instruction becomes a call of the function with its name, its types as template arguments: from
`fma.rn.f32 %r1, %r2, %r3, %r4` to `R_r1 = fma_rn<f32>(R_r2, R_r3, R_r4)`. What the machine has no function for does not
compile. A kernel's name becomes K_name.

`python tests/emulation/ptx.py in.ptx out.cpp` translates a module.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BITS = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
BITS |= {"pred": 8, "f16": 16, "bf16": 16, "tf32": 32, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64}
SPECIAL = {
    "laneid": "hk_emulation::lane()",
    "cluster_ctarank": "hk_emulation::cluster_rank()",
    "cluster_nctarank": "hk_emulation::cluster_size()",
} | {
    f"{register}.{axis}": f"hk_emulation::{index}.{axis}"
    for register, index in (("tid", "threadIdx"), ("ctaid", "blockIdx"), ("ntid", "blockDim"), ("nctaid", "gridDim"))
    for axis in "xyz"
}
# Instructions that write no register.
NO_RESULT = re.compile(
    r"(st|bar|cp|prefetch|fence|stmatrix|red|barrier)\b|mbarrier\.(init|arrive)|wgmma\.(fence|commit|wait)"
)
# Parts of an instruction that its arguments say, too.
SAID = re.compile(r"[vx][1248]|m64n\d+k\d+")
STATEMENT = re.compile(r"\s*([\w$%]+:(?=\s)|\{|\}|[^;]*?;)")  # where one begins: a label, a brace, or up to a semicolon
OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")


class Entry(NamedTuple):
    """A kernel of a module."""

    name: str
    offsets: dict[str, int]  # of its parameters
    parameter_bytes: int
    body: str


def entries(ptx: str) -> Iterator[Entry]:
    """The kernels of a module."""
    for found in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{", ptx):
        depth, end = 1, found.end()
        while depth:
            brace = re.compile(r"[{}]").search(ptx, end)
            assert brace is not None
            depth += 1 if brace[0] == "{" else -1
            end = brace.end()
        yield Entry(found[1], *_parameters(found[2]), ptx[found.end() : end - 1])


def _parameters(declared: str) -> tuple[dict[str, int], int]:
    offsets: dict[str, int] = {}
    end = 0
    for align, kind, name, count in re.findall(
        r"\.param\s+(?:\.align (\d+)\s+)?\.(\w+)\s+(?:\.ptr\s[^,]*?)?([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)", declared
    ):
        size = BITS[kind] // 8
        unit = int(align or size)
        offsets[name] = -(-end // unit) * unit
        end = offsets[name] + size * int(count or 1)
    assert len(offsets) == declared.count(".param")
    return offsets, end


class _Function:
    """The translation of one kernel."""

    def __init__(self, entry: Entry, symbols: dict[str, str]) -> None:
        self.entry = entry
        self.names = symbols | {
            name: f"(reinterpret_cast<Bits>(P) + {offset})" for name, offset in entry.offsets.items()
        }

    def value(self, operand: str) -> str:
        """A number, a register or a name, which is an address."""
        if operand.startswith("!"):
            return f"!{self.value(operand[1:])}"
        if operand.startswith("%"):
            return SPECIAL.get(operand[1:]) or f"R_{operand[1:]}"
        if found := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", operand):
            return f"0x{found[1]}u"
        if re.fullmatch(r"-?\d+U?|0[xX][0-9A-Fa-f]+U?", operand):
            return f"Bits({operand.removesuffix('U')}ll)"
        return self.names.get(operand) or f"N_{operand}"  # a register that inline assembly names

    def argument(self, operand: str) -> str:
        if not operand.startswith("["):
            return self.value(operand)
        found = re.fullmatch(r"\[([%\w$.]+?)(?:\+(-?\d+))?\]", operand.replace(" ", ""))
        assert found is not None, operand
        return f"({self.value(found[1])} + Bits({found[2] or 0}ll))"

    def instruction(self, text: str) -> str:
        found = re.fullmatch(r"(?:@(!?)(\S+)\s+)?(\S+)\s*(.*)", text, re.DOTALL)
        assert found is not None
        negated, guard, opcode, rest = found.groups()
        code = self.unguarded(opcode, [operand.strip() for operand in OPERAND.findall(rest)])
        return f"if ({negated}{self.value(guard)}) {{ {code} }}" if guard else code

    def unguarded(self, opcode: str, operands: list[str]) -> str:
        if opcode in ("bra", "bra.uni"):
            return f"goto {_label(operands[0])};"
        if opcode in ("ret", "exit"):
            return "return;"
        parts = opcode.replace("::", "_").split(".")
        types = [part for part in parts if part in BITS]
        name = "_".join(part for part in parts if part not in BITS and not SAID.fullmatch(part))
        name += "_" * (name in ("and", "or", "xor", "not"))  # words of C++
        in_memory = parts[0] in ("ld", "st") and "async" not in parts
        if in_memory:
            name = name.replace("_shared_cta", "_shared")
        writes = NO_RESULT.match(opcode) is None
        before, arguments, result, after = [], [], "", []
        for i, operand in enumerate(operands):
            if operand == "_":
                continue
            if operand.startswith("{") or (in_memory and not operand.startswith("[")):
                words = [word.strip() for word in operand.strip("{}").split(",")]
                is_result = writes and i == 0
                reads = not is_result or parts[0] == "wgmma"  # which adds to its result
                values = ", ".join("0" if word == "_" else self.value(word) for word in words) if reads else ""
                before.append(f"Bits v{i}[{len(words)}]{{{values}}};")
                arguments.append(f"v{i}")
                if is_result:
                    after += [f"{self.value(word)} = v{i}[{n}];" for n, word in enumerate(words) if word != "_"]
            elif writes and i == 0:
                first, _, second = operand.partition("|")
                result = "const Bits r = "
                after.append(f"{self.value(first)} = r;")
                if second:
                    after.append(f"{self.value(second)} = r >> 32;")
            else:
                arguments.append(self.argument(operand))
        template = f"<{', '.join(types)}>" if types else ""
        call = f"{result}{name}{template}({', '.join(arguments)});"
        return f"{{ {' '.join([*before, call, *after])} }}" if before or after else call

    def declaration(self, text: str) -> str:
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        assert found is not None, text
        c_type = "bool" if found[1] == "pred" else f"uint{BITS[found[1]]}_t"
        names = []
        for name in re.split(r"\s*,\s*", found[2].strip()):
            if many := re.fullmatch(r"%(\w+)<\d+>", name):
                used = {int(n) for n in re.findall(rf"%{many[1]}(\d+)\b", self.entry.body)}
                names += [f"R_{many[1]}{n}" for n in sorted(used)]
            else:
                names.append(self.value(name))
        return f"{c_type} {', '.join(names)};" if names else ""

    def translate(self) -> str:
        declarations, lines, depth = [], [], 0
        for statement in STATEMENT.findall(self.entry.body):
            if statement in "{}":
                depth += 1 if statement == "{" else -1
                lines.append(statement)
            elif statement.endswith(":"):
                lines.append(f"{_label(statement[:-1])}:;")
            elif statement.startswith(".reg"):
                (lines if depth else declarations).append(self.declaration(statement[:-1]))
            else:
                lines.append(f"PTX_INSTRUCTION {self.instruction(statement[:-1].strip())}")
        body = "\n".join([f"PTX_KERNEL({self.entry.name});", *declarations, *lines])
        return f'extern "C" void K_{self.entry.name}(const unsigned char* P) {{\n{body}\nreturn;\n}}\n'


def _label(name: str) -> str:
    return f"L_{name.replace('$', '_')}"


def without_comments(ptx: str) -> str:
    """A module without what its instructions do not need."""
    return re.sub(r"//[^\n]*|^\s*\.(loc|file|pragma)\b[^\n]*$", "", ptx, flags=re.MULTILINE)


def translate(ptx: str) -> str:
    """The C++ of a module."""
    ptx = without_comments(ptx)
    shared = re.findall(r"\.shared\s+\.align \d+\s+\.b8\s+([\w$]+)(\[\])?;", ptx)
    assert len(shared) == len(set(shared)) <= 1, "one array of shared memory, which a launch gives its size"
    symbols = {name: "Bits(0)" for name, _ in shared}
    functions = (_Function(entry, symbols).translate() for entry in entries(ptx))
    return "\n".join(['#include "ptx_machine.h"', "using namespace ptx;", *functions])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(translate(Path(sys.argv[1]).read_text()))
