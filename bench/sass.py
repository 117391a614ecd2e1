"""What the assembler made of a kernel: registers, stack, shared memory, and the instructions that decide its speed.

Read with the ``cuobjdump`` in Triton's wheel; the CUDA toolkits on our machines have none.
"""

import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from reelforge.kernels.errors import KernelError

COUNTED = ("HGMMA", "QGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDL", "STL", "MUFU", "WARPGROUP")
GLOBAL = ("LDG", "STG", "LDGSTS")  # counted by width: LDG.128 is a load of 16 bytes a thread
_BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}

_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True)
class Code:
    """One kernel's machine code.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's local memory, which is where spills go.
        shared: bytes of static shared memory.
        counts: instructions in the code, not executed ones; only those that occur.
    """

    registers: int
    stack: int
    shared: int
    counts: dict[str, int]


def read(binary: Path) -> dict[str, Code]:
    """Kernels of a cubin or of a shared library, by (mangled) name.

    Raises:
        KernelError: it cannot be disassembled.
    """
    done = subprocess.run([_cuobjdump(), "-sass", "-res-usage", binary], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"cuobjdump cannot read {binary.name}: {done.stderr.strip()}.", "Build it for sm_90a.")
    return parse(done.stdout)


def parse(listing: str) -> dict[str, Code]:
    """The kernels in a listing of ``cuobjdump -sass -res-usage``."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        if found := _FUNCTION.match(line):
            current = counts.setdefault(found[1], Counter())
        elif (found := _INSTRUCTION.search(line)) and (kind := _kind(found[1])):
            current[kind] += 1
    return {
        name: Code(int(registers), int(stack) + int(local), int(shared), dict(sorted(counts.get(name, {}).items())))
        for name, registers, stack, shared, local in _RESOURCES.findall(listing)
    }


def _kind(mnemonic: str) -> str | None:
    name, *modifiers = mnemonic.split(".")
    if name in GLOBAL:
        return f"{name}.{next((_BITS[modifier] for modifier in modifiers if modifier in _BITS), 32)}"
    return name if name in COUNTED else None


def wide_share(counts: dict[str, int]) -> float:
    """Share of the bytes in global loads and stores, as counted in the code, that move 16 at a time."""
    moved = Counter[bool]()
    for kind, count in counts.items():
        name, _, bits = kind.partition(".")
        if name in GLOBAL:
            moved[bits == "128"] += count * int(bits)
    bulk = counts.get("UTMALDG", 0) + counts.get("UTMASTG", 0)
    return 1.0 if bulk else moved[True] / max(moved.total(), 1)


def _cuobjdump() -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise KernelError("There is no cuobjdump without Triton.", "Install triton.")
    return Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
