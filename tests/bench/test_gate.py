"""The compile gate: what it records, what it measures, and that each fault shuts it with a sentence that names it."""

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reelforge.bench import gate, gate_table, sass
from reelforge.bench.gate_table import Report, Row, broken_rules, regressions
from reelforge.engine.core.errors import ConfigError, DataError, KernelError

OTHER = Path(sys.prefix) / "triton-3.6.0"
FOLDERS = [None, *([OTHER] if OTHER.is_dir() else [])]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """The specimens by every Triton at hand, compiled once."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda folder: gate.compile_cases(folder, "gate_specimens:cases"), FOLDERS))
    finally:
        sys.path.pop(0)
    return {report.compiler: report for report in found}


def _row(report: Report, case: str) -> Row:
    (row,) = [row for row in report.rows if f"specimen {case}" in row.cases]
    return row


def _texts(report: Report) -> str:
    return "\n".join(problem.text for problem in broken_rules(report))


def test_each_triton_reports_under_its_own_version(reports: dict[str, Report]) -> None:
    assert len(reports) == len(FOLDERS)
    if OTHER.is_dir():
        assert "triton-3.6.0" in reports


def test_a_launch_that_is_as_it_should_be_has_no_problem(reports: dict[str, Report]) -> None:
    for report in reports.values():
        row = _row(report, "wide")
        assert row.counts["LDG.128"] and row.counts["STG.128"] and row.registers and not row.stack
        assert "specimen wide" not in _texts(report)
        assert _row(report, "large product").counts["HGMMA"]
        assert "large product" not in _texts(report)


def test_faults_are_named_with_kernel_value_and_limit(reports: dict[str, Report]) -> None:
    for report in reports.values():
        spilling, texts = _row(report, "spilling"), _texts(report)
        assert spilling.stack > 0
        assert f"gate_specimens.spilling_kernel [specimen spilling] spills: {spilling.stack} B of stack" in texts
        assert "gate_specimens.narrow_kernel [specimen narrow] moves 0% of its bytes 16 at a time; limit 50%." in texts
        assert "gate_specimens.dot_kernel [specimen small product] has 0 HGMMA; limit at least 1." in texts
        assert "[specimen small product] multiplies by" in texts and "HMMA, Ampere's instruction; limit 0." in texts
        assert "refused_by_compiler_kernel [specimen uncompilable] does not compile" in texts
        assert "no_such_method" in texts


def test_a_case_that_the_launcher_refuses_is_reported_as_refused(reports: dict[str, Report]) -> None:
    for report in reports.values():
        assert "does not take" in _row(report, "refused").refusal
        assert "specimen refused" not in _texts(report)
        assert _row(report, "launchless").refusal == "It launches no kernel."


def test_backward_options_and_grids_are_those_of_the_launchers(reports: dict[str, Report]) -> None:
    for report in reports.values():
        rows = [row for row in report.rows if "specimen wide backward" in row.cases]
        forward, backward = rows
        assert forward.cases == ("specimen wide", "specimen wide backward"), "equal launches are compiled once"
        assert (forward.constants, backward.constants) == ("BLOCK=1024", "BLOCK=2048")
        assert (forward.options, backward.options) == ("enable_fp_fusion=False", "")
        assert (forward.grid, backward.grid) == ((64,), (32,)), "a grid may be a function of the constants"


def test_every_configuration_of_an_autotuned_kernel_is_compiled(reports: dict[str, Report]) -> None:
    for report in reports.values():
        rows = [row for row in report.rows if row.cases == ("specimen tuned",)]
        assert [(row.constants, row.warps) for row in rows] == [("BLOCK=256", 2), ("BLOCK=512", 8)]


def test_arguments_are_specialised_as_documented(reports: dict[str, Report]) -> None:
    for report in reports.values():
        row = _row(report, "bound")
        assert row.types == "*bf16/16 *fp32 i32/16 i32 fp32 u1 i64/16"
        assert row.constants == "one=1 absent=None DECLARED=16"
        assert (row.warps, row.stages) == (2, 5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_recorded_launch_equals_what_tritons_binder_says(folder: Path | None, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    command = [*gate.compiling_python(folder, str(tmp_path)), "-m", "gate_specimens"]
    sys.path.pop(0)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    recorded, said = json.loads(done.stdout)
    assert recorded[2:] == said[2:]


def test_a_crash_says_what_the_process_was_at() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        with pytest.raises(KernelError, match="ended with status 1 while recording specimen crashing"):
            gate.compile_cases(None, "gate_specimens:crashing")
    finally:
        sys.path.pop(0)


def test_a_folder_without_triton_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"There is no Triton in {tmp_path}"):
        gate.compile_cases(tmp_path)


def test_the_gpu_machines_triton_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gate.metadata, "version", lambda name: "3.9.0")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ConfigError, match=r"pip install --no-deps --target .*triton-3.6.0 triton==3.6.0"):
        gate.other_tritons()
    monkeypatch.setattr(gate.metadata, "version", lambda name: "3.6.0")
    assert gate.other_tritons() == []


# -- the stored table -------------------------------------------------------------------------------------------------

GOOD = Row("norms._kernel", ("norm 1.3B", "norm 14B"), "*bf16/16", "BLOCK=64", 4, 3, "", (8, 1), "s1", 64, 0, 1024,
           {"HGMMA": 8, "LDG.128": 4})  # fmt: skip
OTHER_ROW = GOOD.but(kernel="norms._sum_kernel", registers=32, counts={})


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(gate_table, "FOLDER", tmp_path / "gate")
    return tmp_path / "gate"


def _regressions(rows: list[Row], before: list[Row]) -> list[str]:
    return [problem.text for problem in regressions(Report("triton-0", rows), before)]


def test_update_round_trips(folder: Path) -> None:
    rows = [GOOD, OTHER_ROW, Row("", ("norm fp64",), refusal="fp64 is not one of fp32")]
    gate_table.store(Report("triton-0", [*rows, GOOD.but(error="does not compile")]))
    assert gate_table.stored("triton-0") == rows
    assert len((folder / "triton-0.json").read_text().splitlines()) == len(rows) + 2, "one launch a line"
    assert _regressions(rows, rows) == []


def test_a_few_more_registers_pass_and_more_do_not() -> None:
    assert _regressions([GOOD.but(registers=72)], [GOOD]) == []
    assert _regressions([GOOD.but(registers=73, source="s2")], [GOOD]) == [
        "norms._kernel [norm 1.3B and 1 more] takes 73 registers; limit 72, the stored 64 and 8 (its source changed)."
    ]


def test_lost_instructions_and_changed_options_are_regressions() -> None:
    (text,) = _regressions([GOOD.but(counts={"HGMMA": 4, "LDG.128": 4})], [GOOD])
    assert "norms._kernel [norm 1.3B and 1 more] has 4 HGMMA; limit at least the stored 8" in text
    (text,) = _regressions([GOOD], [GOOD.but(options="enable_fp_fusion=False")])
    assert "is compiled with []; stored [enable_fp_fusion=False]" in text


def test_a_launch_that_vanished_from_one_case_is_a_regression() -> None:
    assert _regressions([GOOD], [GOOD, OTHER_ROW]) == [
        "norms._sum_kernel [norm 1.3B and 1 more] is no longer launched, as the stored table has it."
    ]
    (text,) = _regressions([GOOD.but(cases=("norm 1.3B",))], [GOOD])
    assert text == "norms._kernel [norm 14B] is no longer launched, as the stored table has it."


def test_a_second_launch_of_a_kernel_in_a_case_has_a_place_of_its_own() -> None:
    rows = [GOOD, GOOD.but(constants="BLOCK=128", registers=128)]
    assert _regressions(rows, rows) == []
    assert "no longer launched" in _regressions(rows[:1], rows)[0]


def test_a_new_launch_or_refusal_has_to_be_stored() -> None:
    (problem,) = regressions(Report("triton-0", [GOOD, OTHER_ROW]), [GOOD])
    assert problem.new and "norms._sum_kernel [norm 1.3B and 1 more] is launched" in problem.text
    (problem,) = regressions(Report("triton-0", [Row("", ("norm 1.3B",), refusal="why")]), [])
    assert problem.new and problem.text.startswith("norm 1.3B is refused (why)")
    (problem,) = regressions(Report("triton-0", [GOOD]), None)
    assert "no stored table for triton-0" in problem.text
    assert regressions(Report("nvcc-13.0.88", []), None) == []


def test_limits_that_need_no_stored_table() -> None:
    over = GOOD.but(registers=256, shared=232_449, grid=(1, 65_536))
    texts = _texts(Report("triton-0", [over], {}, ["reelforge.kernels.new._kernel"]))
    assert "takes 256 registers; limit 255." in texts
    assert "takes 232449 B of shared memory; limit 232448." in texts
    assert "has 65536 programs along axis 1 of its grid; limit 65535." in texts
    assert "reelforge.kernels.new._kernel is launched by no case" in texts


def test_a_scalar_store_beside_wide_loads_is_caught_and_an_unaligned_case_is_not_judged() -> None:
    row = GOOD.but(counts={"LDG.128": 4, "STG.16": 32})
    assert "has 32 global accesses of one or two bytes; limit 0." in _texts(
        Report("triton-0", [row], {"norm 1.3B": "memory"})
    )
    narrow = row.but(counts={"LDG.128": 4, "LDG.32": 1, "STG.32": 16})
    assert "moves 48% of its bytes 16 at a time" in _texts(Report("triton-0", [narrow], {"norm 1.3B": "memory"}))
    assert _texts(Report("triton-0", [row.but(types="*bf16")], {"norm 1.3B": "memory"})) == ""
    assert _texts(Report("triton-0", [row.but(counts={"LDG.128": 4, "STG.32": 1})], {"norm 1.3B": "memory"})) == ""


def test_tensor_core_products_that_wait_for_each_other_are_caught() -> None:
    waiting, enough = (GOOD.but(counts={"HGMMA": 24, "WARPGROUP": waits}) for waits in (25, 24))
    needs = dict.fromkeys(GOOD.cases, "HGMMA")
    assert "waits 25 times for 24 tensor-core products" in _texts(Report("triton-0", [waiting], needs))
    assert _texts(Report("triton-0", [enough], needs)) == ""


def test_a_damaged_table_is_an_error(folder: Path) -> None:
    folder.mkdir()
    (folder / "triton-0.json").write_text('[{"kernel": "a", "cases": [], "unknown": 1}]')
    with pytest.raises(DataError, match="is not a table of the gate"):
        gate_table.stored("triton-0")


# -- the command ------------------------------------------------------------------------------------------------------


def _run(capsys: pytest.CaptureFixture[str], **changes: object) -> tuple[int, str]:
    status = gate.main(argparse.Namespace(**{"update": False, "triton": [], "json": False, **changes}))
    return status, capsys.readouterr().out


def test_command_fails_until_the_table_is_stored_and_then_on_a_manipulated_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "compile_cases", lambda folder: Report("triton-0", [GOOD, OTHER_ROW]))
    monkeypatch.setattr(gate, "library", lambda: None)
    status, text = _run(capsys)
    assert status == 1 and "NEW: There is no stored table for triton-0" in text
    assert _run(capsys, update=True)[0] == 0
    status, text = _run(capsys)
    assert status == 0 and "FAIL" not in text and "norm 1.3B +1" in text and "HGMMA:8 LDG.128:4" in text
    path = folder / "triton-0.json"
    path.write_text(path.read_text().replace('"registers": 64', '"registers": 40'))
    status, text = _run(capsys)
    assert status == 1 and "FAIL: norms._kernel [norm 1.3B and 1 more] takes 64 registers; limit 48" in text
    status, text = _run(capsys, json=True)
    (report,) = json.loads(text)
    assert status == 1 and "limit 48" in report["problems"][0] and report["rows"][0]["registers"] == 64


def test_update_does_not_open_the_gate_for_a_spill(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "compile_cases", lambda folder: Report("triton-0", [GOOD.but(stack=8)]))
    monkeypatch.setattr(gate, "library", lambda: None)
    status, text = _run(capsys, update=True)
    assert status == 1 and "spills: 8 B of stack, 0 local loads, 0 local stores; limit 0." in text


# -- machine code -----------------------------------------------------------------------------------------------------

LISTING = """
Resource usage:
 Common:
  GLOBAL:0
 Function first:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:255 STACK:88 SHARED:0 LOCAL:16 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
\t\tFunction : first
        /*0050*/              @!P0 LDG.E.128 R4, desc[UR14][R2.64] ;   /* 0x000000010c00788c */
        /*0060*/                   LDG.E.U16.CONSTANT R4, [R2.64] ;    /* 0x000000010c00788c */
        /*0070*/               @P1 LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR14][R2.64] ;
        /*10080*/                  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*10090*/             @UP2 UTMALDG.2D [UR8], [UR4] ;
        /*100a0*/                  STG.E.64 desc[UR4][R2.64], R4 ;
\t\tFunction : second
        /*0050*/                   STL [R1], R4 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R6, RZ ;
        /*0070*/                   STG.E desc[UR4][R2.64], R4 ;
"""


def test_names_of_the_librarys_kernels_do_not_depend_on_where_it_was_built() -> None:
    name = "_ZN53_GLOBAL__N__add397ac_20_sm90_f32_sde_step_cu_3beb9e3511fork_kernelIfLb1EEEvNS_4ForkE"
    assert gate.stable_name(name) == "_ZN12_GLOBAL__N_111fork_kernelIfLb1EEEvNS_4ForkE"
    assert gate.stable_name("fork_kernel") == "fork_kernel"


def test_listing_is_read_by_function() -> None:
    first, second = sass.parse(LISTING).values()
    assert first == sass.Code(
        40, 0, 1024, {"HGMMA": 1, "LDG.128": 1, "LDG.16": 1, "LDGSTS.128": 1, "STG.64": 1, "UTMALDG": 1}
    )
    assert second == sass.Code(255, 104, 0, {"HMMA": 1, "STG.32": 1, "STL": 1})


def test_wide_share_counts_bytes() -> None:
    assert sass.wide_share({"LDG.128": 3, "STG.64": 2, "MUFU": 9}) == 0.75
    assert sass.wide_share({"UTMALDG": 1, "STG.16": 1}) == 1.0
    assert sass.wide_share({}) == 0.0


LIBRARY = """
extern "C" __global__ void fine(float* x) { x[threadIdx.x] *= 2.0f; }
extern "C" __global__ void spilling(float* x, int at) {
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i];
  for (int i = 0; i < 64; ++i) local[(i * at) & 63] += x[i * threadIdx.x];
  for (int i = 0; i < 64; ++i) x[i] = local[i];
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_of_the_cuda_library_are_held_to_the_same_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, library = tmp_path / "lib.cu", tmp_path / "lib.so"
    source.write_text(LIBRARY)
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-Xcompiler=-fPIC", "-shared"]
    subprocess.run(["nvcc", *flags, "-o", library, source], check=True, capture_output=True)
    monkeypatch.setattr(gate, "library", lambda: library)
    (report,) = gate.library_report()
    assert report.compiler.startswith("nvcc-1") and [row.kernel for row in report.rows] == ["fine", "spilling"]
    (problem,) = broken_rules(report)
    assert problem.text.startswith("spilling [lib] spills: 256 B of stack")
