"""The gate's compiling process: ``python -m reelforge.bench.gate_worker CASES REPORT``.

A process of its own because Triton's interpreter and compiler cannot share one, and because each version of Triton
needs one. CASES names a function as ``module:function``; REPORT is the JSON file to write. Standard error says what
it is at, for the day the compiler crashes.
"""

import importlib
import json
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
import triton
from triton.compiler import ASTSource, CompiledKernel
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

from reelforge.bench import sass
from reelforge.bench.cases.case import Case
from reelforge.bench.gate_table import Report, Row
from reelforge.bench.launches import TARGET, Launch, launches
from reelforge.kernels import dispatch
from reelforge.kernels.errors import KernelError

_TENSOR_CORES = {
    torch.bfloat16: "HGMMA",
    torch.float16: "HGMMA",
    torch.float8_e4m3fn: "QGMMA",
    torch.float8_e5m2: "QGMMA",
}


def survey(cases: Collection[Case]) -> Report:
    """Compile every distinct launch of ``cases``."""
    found: dict[tuple, list[tuple[str, Launch]]] = {}
    refusals = []
    for case in cases:
        if "triton" not in dispatch.implementations().get(case.op, ["triton"]):
            continue  # a library's op alone: nothing of ours to compile
        _say(f"recording {case.name}")
        try:
            made = launches(case)
        except KernelError as error:
            refusals.append(Row("", (case.name,), refusal=str(error)))
            continue
        if not made:
            refusals.append(Row("", (case.name,), refusal="It launches no kernel."))
        for launch in made:
            found.setdefault(launch.key, []).append((case.name, launch))
    rows = [_row(uses) for uses in found.values()]
    return Report(
        f"triton-{triton.__version__}",
        [*rows, *refusals],
        {case.name: _need(case) for case in cases},
        _never_launched({uses[0][1].kernel for uses in found.values()}),
    )


def _need(case: Case) -> str:
    """The instruction that must do the case's work; ``"memory"`` where moving bytes is the work."""
    return _TENSOR_CORES.get(case.work.dtype, "") if case.work.flops else "memory"


def _row(uses: Sequence[tuple[str, Launch]]) -> Row:
    """Compile one launch that occurs in the named cases."""
    launch = uses[0][1]
    _say(f"compiling {launch.name} {launch.types} {launch.values}")
    row = Row(
        launch.name,
        tuple(dict.fromkeys(name for name, _ in uses)),
        types=launch.types,
        constants=launch.values,
        warps=launch.options.num_warps,
        stages=launch.options.num_stages,
        options=launch.switches,
        grid=tuple(map(max, zip(*(launch.grid for _, launch in uses), strict=True))),
        source=dispatch.source_hash(sys.modules[launch.kernel.module]),
    )
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    try:
        compiled = triton.compile(source, target=TARGET, options=launch.options.__dict__)
    except (TritonError, RuntimeError) as error:
        return row.but(error=" ".join(str(error).split())[:400])
    code = _disassemble(compiled)
    return row.but(registers=code.registers, stack=code.stack, shared=compiled.metadata.shared, counts=code.counts)


def _disassemble(compiled: CompiledKernel) -> sass.Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return sass.read(Path(file.name))[compiled.metadata.name]


def _never_launched(kernels: Collection[JITFunction]) -> list[str]:
    """Entry points (``..._kernel``) of the imported ops that no case launches."""
    names = [name for name in list(sys.modules) if name.startswith("reelforge.kernels.")]
    entries = {
        value
        for name in names
        for value in vars(sys.modules[name]).values()
        if isinstance(value, JITFunction) and value.__name__.endswith("_kernel")
    }
    return sorted(f"{kernel.module}.{kernel.__name__}" for kernel in entries - set(kernels))


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    place, path = arguments
    module, _, function = place.partition(":")
    report = survey(getattr(importlib.import_module(module), function)())
    Path(path).write_text(json.dumps(report.table()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
