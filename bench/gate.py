"""``reelforge bench gate``: compile every kernel for sm_90a without a GPU and compare the machine code.

A kernel that spills, loses its tensor-core or its 16-byte instructions, takes more registers than before, no longer
compiles or is no longer launched shuts the gate: exit status 1. Triton's kernels are compiled by the installed Triton
and by the one of the GPU machines; those of the CUDA library are read from the library, where it was built.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import IO

import reelforge.kernels
from reelforge.bench import gate_table, sass
from reelforge.bench.gate_table import Problem, Report, Row
from reelforge.engine.core.errors import ConfigError, KernelError
from reelforge.engine.core.progress import say

CASES = "reelforge.bench.cases.catalogue:all_cases"
GPU_MACHINE_TRITON = "3.6.0"
LIBRARY = "lib/libreelforge_sm90a.so"
TIMEOUT_S = 300
STEPS = ("recording ", "compiling ")  # what the process says it is at


def main(arguments: argparse.Namespace) -> int:
    """Print the table of every compiler; 1 where one regressed.

    Args:
        arguments: ``update``: store what was compiled. ``triton``: folders with other Tritons, None for the GPU
            machines' own. ``json``: print JSON.

    Raises:
        ConfigError: a folder has no Triton.
        KernelError: a compiling process crashed or hung.
    """
    folders = [None, *(other_tritons() if arguments.triton is None else arguments.triton)]
    say("Compiling every kernel launch for sm_90a; this takes a minute or two.")
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(compile_cases, folders))
    reports += library_report()
    judged = [(report, judge(report, arguments.update)) for report in reports]
    if arguments.json:
        text = json.dumps(
            [{**report.table(), "problems": [problem.text for problem in found]} for report, found in judged]
        )
    else:
        text = "\n\n".join(render(report, found) for report, found in judged)
    sys.stdout.write(text + "\n")
    return int(any(found for _, found in judged))


def judge(report: Report, update: bool) -> list[Problem]:
    """What is wrong with a report; with ``update`` it becomes the stored table first."""
    if update:
        gate_table.store(report)
    return gate_table.broken_rules(report) + gate_table.regressions(report, gate_table.stored(report.compiler))


# -- reports ----------------------------------------------------------------------------------------------------------


def other_tritons() -> list[Path]:
    """The GPU machines' Triton beside the installed one, unless they are the same.

    Raises:
        ConfigError: it is not there.
    """
    if metadata.version("triton") == GPU_MACHINE_TRITON:
        return []
    folder = Path(sys.prefix) / f"triton-{GPU_MACHINE_TRITON}"
    if not folder.is_dir():
        raise ConfigError(
            f"Triton {GPU_MACHINE_TRITON}, which the GPU machines have, is not in {folder}.",
            f"Run: pip install --no-deps --target {folder} triton=={GPU_MACHINE_TRITON}, or name folders by --triton.",
        )
    return [folder]


def compile_cases(folder: Path | None, cases: str = CASES) -> Report:
    """The report of the Triton in ``folder``, None for the installed one.

    Args:
        folder: to be searched before all others.
        cases: ``module:function`` that returns the cases.

    Raises:
        ConfigError: there is no Triton in ``folder``.
        KernelError: the process crashed or hung.
    """
    if folder is not None and not (folder / "triton").is_dir():
        raise ConfigError(f"There is no Triton in {folder}.", f"Run: pip install --no-deps --target {folder} triton.")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "report.json"
        command = [*compiling_python(folder, scratch), "-m", "reelforge.bench.gate_worker", cases, str(path)]
        log = Path(scratch) / "log"
        with log.open("w") as stream:
            status = _run(command, stream)
        if status:
            lines = log.read_text(errors="replace").strip().splitlines()
            step = next((line for line in reversed(lines) if line.startswith(STEPS)), "starting")
            raise KernelError(f"The gate's process {status} while {step}:", "\n".join(lines[-8:]))
        return Report.of(json.loads(path.read_text(encoding="utf-8")))


def _run(command: Sequence[str], log: IO[str]) -> str:
    """How the command failed; empty where it did not."""
    try:
        status = subprocess.run(command, stderr=log, timeout=TIMEOUT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"took more than {TIMEOUT_S} s"
    return f"ended with status {status}" if status else ""


def compiling_python(folder: Path | None, scratch: str) -> list[str]:
    """The start of a command: Python without Triton's interpreter, with its cache in ``scratch`` and no GPU to see."""
    environment = {
        "PYTHONPATH": os.pathsep.join(str(path) for path in (folder, *sys.path) if path),
        "TRITON_CACHE_DIR": f"{scratch}/cache",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    settings = [f"{name}={value}" for name, value in environment.items()]
    return ["env", "-u", "TRITON_INTERPRET", *settings, sys.executable, "-P"]


def library_report() -> list[Report]:
    """The report of the CUDA library; none where it was not built."""
    path = library()
    if path is None:
        say("The CUDA library is not built here; its kernels are not looked at.")
        return []
    rows = [
        Row(
            stable_name(name),
            (path.stem,),
            registers=code.registers,
            stack=code.stack,
            shared=code.shared,
            counts=code.counts,
        )
        for name, code in sorted(sass.read(path).items())
    ]
    return [Report(f"nvcc-{_nvcc_version(path)}", rows)]


def library() -> Path | None:
    """The CUDA library that CMake built from csrc/, if it did."""
    return next((path for root in reelforge.kernels.__path__ for path in Path(root).glob(LIBRARY)), None)


def stable_name(mangled: str) -> str:
    """A mangled name with an anonymous namespace as C++ compilers write it; nvcc adds hashes of path and content."""
    found = re.search(r"(\d+)_GLOBAL__N_", mangled)
    if found is None:
        return mangled
    return mangled[: found.start()] + "12_GLOBAL__N_1" + mangled[found.end(1) + int(found[1]) :]


def _nvcc_version(library: Path) -> str:
    """Of the assembler that made the library, from the note it leaves in its code."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", library.read_bytes())
    return found[1].decode() if found else "unknown"


# -- rendering --------------------------------------------------------------------------------------------------------

_HEAD = (
    "kernel",
    "case",
    "types",
    "warps",
    "stages",
    "regs",
    "stored",
    "stack B",
    "shared B",
    "instructions",
    "verdict",
)


def render(report: Report, problems: Sequence[Problem]) -> str:
    """The table, the cases that the Triton implementations do not take, and what is wrong."""
    before = gate_table.stored(report.compiler) or []
    if not report.rows:
        return f"{report.compiler}, sm_90a: no kernels"
    cells: list[tuple[str, ...]] = [_HEAD]
    cells += [_cells(row, matches, problems) for row, matches, _ in gate_table.pair(report.rows, before) if row.kernel]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"{report.compiler}, sm_90a"]
    lines += ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines += [f"not taken by Triton: {row.cases[0]}: {row.refusal}" for row in report.rows if row.refusal]
    lines += [f"{'NEW' if problem.new else 'FAIL'}: {problem.text}" for problem in problems]
    return "\n".join(lines)


def _cells(row: Row, matches: Sequence[Row], problems: Sequence[Problem]) -> tuple[str, ...]:
    own = [problem.new for problem in problems if problem.row is row]
    numbers = (row.warps, row.stages, row.registers, matches[0].registers if matches else "-", row.stack, row.shared)
    return (
        row.kernel,
        row.cases[0] + (f" +{len(row.cases) - 1}" if len(row.cases) > 1 else ""),
        " ".join(dict.fromkeys(kind.removeprefix("*").split("/")[0] for kind in row.types.split() if "*" in kind)),
        *map(str, numbers),
        " ".join(f"{kind}:{count}" for kind, count in row.counts.items()),
        "ok" if not own else "new" if all(own) else "FAIL",
    )
